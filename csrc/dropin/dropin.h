// SPDX-License-Identifier: MIT
// The native runtime of drop-in schedulers: guards, plans, the executor and the caches of steps.
#pragma once

#include <pybind11/pybind11.h>

#include "cached_step_method.h"
#include "native_plan.h"
#include "step_cache.h"

namespace fastdiff::dropin {

inline void define(pybind11::module_& m) {
    define_native_plan(m);
    define_step_cache(m);
    define_cached_step_method(m);
}

}  // namespace fastdiff::dropin
