// SPDX-License-Identifier: MIT
// The type `CachedStepMethod`: a step method of a drop-in scheduler. It takes the step by the scheduler's `StepCache`
// where that knows the step, and calls a Python function with the same arguments where it does not.
#pragma once

#include <pybind11/pybind11.h>

namespace fastdiff::dropin {

void define_cached_step_method(pybind11::module_& m);

}  // namespace fastdiff::dropin
