// SPDX-License-Identifier: MIT
// csrc/cuda/select.cu, likewise; see sum_on_host.cpp, with which it is linked.
#include "blocks.h"

#include "cuda/select.cu"

#define EXPORT extern "C" __attribute__((visibility("default")))

static fastdiff::SelectArgs arguments(const int64_t* sizes) {
    fastdiff::SelectArgs args{};
    args.dtype = static_cast<fastdiff::DType>(sizes[0]);
    args.batch = sizes[1];
    args.inner = sizes[2];
    args.low = sizes[3];
    args.absolute = sizes[4] != 0;
    return args;
}

EXPORT int64_t scratch_on_host(const int64_t* sizes) { return fastdiff::select_scratch_bytes(arguments(sizes)); }

// `sizes`: dtype, batch, inner, low, absolute, device. `pointers`: x, scratch, out.
EXPORT const char* select_on_host(const int64_t* sizes, void* const* pointers, double weight, void* stream) {
    fastdiff::SelectArgs args = arguments(sizes);
    args.weight = weight;
    args.x = pointers[0];
    args.out = pointers[2];
    return fastdiff::launch_select(args, pointers[1], static_cast<int>(sizes[5]), stream);
}
