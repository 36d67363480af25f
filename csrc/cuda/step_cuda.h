// SPDX-License-Identifier: MIT
#pragma once

#include "../step_math.h"

namespace fastdiff {

// Launch one step on a stream (a cudaStream_t) of a device. All pointers of `args` are device pointers.
// Return null, or CUDA's error message; the caller's current device is restored.
const char* launch_step(const StepArgs& args, int device, void* stream);

}  // namespace fastdiff
