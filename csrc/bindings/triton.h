// SPDX-License-Identifier: MIT
// Launches of Triton's compiled step kernels from C++. Light: see tensors.h.
#pragma once

#include <pybind11/pybind11.h>

#include "../triton/step_kernels.h"
#include "tensors.h"

namespace fastdiff::bindings {

// Return whether launches are enabled for tensors on this device, and nothing that the guards name has changed since,
// such as a launch hook of a profiler.
bool triton_serves(const at::Tensor& sample);

// Define enable_triton, set_triton_block, install_triton_kernel and clear_triton_kernels, which
// fastdiff/ops/triton_launch.py calls.
void define_triton(pybind11::module_& module);

}  // namespace fastdiff::bindings
