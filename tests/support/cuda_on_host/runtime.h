// SPDX-License-Identifier: MIT
// The state of the runtime and of the threads' accesses, for ctypes. One source of a library includes it, before the
// kernels, in place of blocks.h.
#pragma once

#include "blocks.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

static bool misaligned = false;

// -fsanitize=alignment calls this: a device refuses an access that is not at a multiple of its type's alignment.
extern "C" void __ubsan_handle_type_mismatch_v1(void*, void*) { misaligned = true; }

EXPORT void set_runtime(int device, int backwards, int next_launch) {
    cuda_on_host::state = {};
    cuda_on_host::state.device = device;
    cuda_on_host::state.backwards = backwards != 0;
    cuda_on_host::state.next_launch = static_cast<cudaError_t>(next_launch);
    cuda_on_host::block.diverged = false;
    misaligned = false;
}

// device, launches, the device launched on, the stream launched on, whether threads met at different places, whether
// an access was misaligned
EXPORT void get_runtime(int64_t* values) {
    const auto& state = cuda_on_host::state;
    values[0] = state.device;
    values[1] = state.launches;
    values[2] = state.launched_on;
    values[3] = reinterpret_cast<int64_t>(state.stream);
    values[4] = cuda_on_host::block.diverged;
    values[5] = misaligned;
}
