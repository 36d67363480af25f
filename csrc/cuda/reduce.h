// SPDX-License-Identifier: MIT
#pragma once

#include "../reduce_math.h"

namespace fastdiff {

// Each launches one reduction on a stream (a cudaStream_t) of a device. All pointers are the device's. They return
// null, or what CUDA says of the launch. The current device is the caller's again afterwards.
const char* launch_sum(const SumArgs& args, int device, void* stream);

// `scratch`: select_scratch_bytes of it, aligned to 16 bytes, holding anything.
int64_t select_scratch_bytes(const SelectArgs& args);
const char* launch_select(const SelectArgs& args, void* scratch, int device, void* stream);

}  // namespace fastdiff
