// SPDX-License-Identifier: MIT
// The CUDA driver's launch function, looked up in the driver's library at run time: neither a CUDA toolkit nor a torch
// with CUDA headers is needed to build this.
#pragma once

#include <string>

namespace fastdiff::triton {

// Load the driver's library; the usual one where `path` is null. Return why it cannot be used; empty where it can.
// A second call with the same path does nothing.
std::string load_driver(const char* path);

// Return whether `load_driver` has succeeded.
bool driver_loaded();

// Return the device of this thread's current context; -1 where it has none.
int current_device();

// Launch a function (a CUfunction) on a stream of the current context. Return null, or the driver's error message.
const char* launch_function(void* function, unsigned programs, unsigned threads, unsigned shared_bytes, void* stream,
                            void** parameters);

}  // namespace fastdiff::triton
