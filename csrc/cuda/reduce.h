// SPDX-License-Identifier: MIT
#pragma once

#include "../reduce_math.h"

namespace fastdiff {

// Each launches one reduction on a stream (a cudaStream_t) of a device. All pointers are device pointers. They return
// null, or CUDA's error message, and restore the caller's current device.
const char* launch_sum(const SumArgs& args, int device, void* stream);
const char* launch_gram(const GramArgs& args, int device, void* stream);

// `scratch`: select_scratch_bytes of uninitialised memory, aligned to 16 bytes.
int64_t select_scratch_bytes(const SelectArgs& args);
const char* launch_select(const SelectArgs& args, void* scratch, int device, void* stream);

}  // namespace fastdiff
