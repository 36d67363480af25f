// SPDX-License-Identifier: MIT
// csrc/cuda/reduce.cu, compiled for the CPU against the headers beside this file, behind an interface for ctypes.
#include "blocks.h"

#include "cuda/reduce.cu"

#define EXPORT extern "C" __attribute__((visibility("default")))

static bool misaligned = false;

// -fsanitize=alignment calls this: a device refuses an access that is not at a multiple of its type's alignment.
extern "C" void __ubsan_handle_type_mismatch_v1(void*, void*) { misaligned = true; }

// `sizes`: kind, dtype, batch, inner, device. `pointers`: x, y, partials, out.
EXPORT const char* sum_on_host(const int64_t* sizes, void* const* pointers, double correction, void* stream) {
    fastdiff::SumArgs args{};
    args.kind = static_cast<fastdiff::Sum>(sizes[0]);
    args.dtype = static_cast<fastdiff::DType>(sizes[1]);
    args.batch = sizes[2];
    args.inner = sizes[3];
    args.x = pointers[0];
    args.y = pointers[1];
    args.partials = pointers[2];
    args.out = pointers[3];
    args.correction = correction;
    return fastdiff::launch_sum(args, static_cast<int>(sizes[4]), stream);
}

// As in step_on_host.cpp.
EXPORT int set_config(const int* values) {
    if (values == nullptr) return fastdiff::override_config(nullptr);
    const fastdiff::CudaConfig config{values[0], values[1], values[2], values[3], values[4]};
    return fastdiff::override_config(&config);
}

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
