// SPDX-License-Identifier: MIT
// Includes of the general bindings, which are one translation unit: torch's and pybind11's headers cost most of its
// compile time. csrc/dropin/ and csrc/bindings/*.cpp include tensors.h instead.
#pragma once

#include <torch/extension.h>

#include "tensors.h"

namespace fastdiff::bindings {

namespace py = pybind11;

}  // namespace fastdiff::bindings
