// SPDX-License-Identifier: MIT
// The native runtime of drop-in schedulers: guards, plans, the executor and the caches of steps.
#pragma once

#include <pybind11/pybind11.h>

#include "cached_step_method.h"
#include "native_plan.h"
#include "step_cache.h"

namespace fastdiff::dropin {

inline void define(pybind11::module_& m) {
    // The enumerations that Python has too, for the test that compares them.
    pybind11::dict kinds, sources;
    kinds["ANY"] = static_cast<int>(GuardKind::kAny);
    kinds["ID"] = static_cast<int>(GuardKind::kId);
    kinds["EQUALS"] = static_cast<int>(GuardKind::kEquals);
    kinds["TENSOR"] = static_cast<int>(GuardKind::kTensor);
    kinds["ARRAY"] = static_cast<int>(GuardKind::kArray);
    kinds["TIMESTEP"] = static_cast<int>(GuardKind::kTimestep);
    sources["TORCH"] = static_cast<int>(NoiseSource::kTorch);
    sources["SEEDS"] = static_cast<int>(NoiseSource::kSeeds);
    sources["PATH"] = static_cast<int>(NoiseSource::kPath);
    m.attr("guard_kinds") = kinds;
    m.attr("noise_sources") = sources;
    define_native_plan(m);
    define_step_cache(m);
    define_cached_step_method(m);
}

}  // namespace fastdiff::dropin
