// SPDX-License-Identifier: MIT
#pragma once

#include "../step_math.h"

namespace fastdiff {

// Launches normal numbers on a stream (a cudaStream_t) of a device. All pointers of `args` are the device's.
// Returns null, or what CUDA says of the launch. The current device is the caller's again afterwards.
const char* launch_randn(const RandnArgs& args, int device, void* stream);

}  // namespace fastdiff
