// SPDX-License-Identifier: MIT
#pragma once

#include "../log_prob_math.h"

namespace fastdiff {

// Launch one step with its log-probability, or its replay, on a stream (a cudaStream_t) of a device. All pointers of
// `args` are device pointers. Return null, or CUDA's error message; the caller's current device is restored.
const char* launch_log_prob(const LogProbArgs& args, int device, void* stream);

}  // namespace fastdiff
