// SPDX-License-Identifier: MIT
// Launches of Triton's compiled step kernels from C++. Light: see tensors.h.
#pragma once

#include <pybind11/pybind11.h>

#include <optional>
#include <string>

#include "../triton/step_kernels.h"
#include "tensors.h"

namespace fastdiff::bindings {

// Return whether launches are enabled for tensors on this device, and nothing that the guards name has changed since,
// such as a launch hook of a profiler.
bool triton_serves(const at::Tensor& sample);

// Launch compiled kernels from now on while each (owner, attribute, expected value) of the guards holds: the attribute
// is that object, and empty where it is a list. Return why that cannot be, or an empty string. For tests: the path of
// the driver's library, and whether it takes CPU tensors.
std::string enable_triton(const pybind11::list& guards, const std::optional<std::string>& driver, bool host_memory);
void disable_triton();

// Keep a compiled kernel for calls of a key that `step` returned; see csrc/triton/step_kernels.h.
void install_triton_kernel(const pybind11::bytes& key, uintptr_t function, unsigned threads, unsigned shared_bytes,
                           const std::string& layout);

}  // namespace fastdiff::bindings
