// SPDX-License-Identifier: MIT
// csrc/cuda/reduce.cu, compiled for the CPU against the headers beside this file, behind an interface for ctypes.
#include "runtime.h"

#include "cuda/reduce.cu"

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
