// SPDX-License-Identifier: MIT
// Normal numbers alone: a thread makes whole chunks and stores 16 bytes per access.
#include "access.h"
#include "draw.h"
#include "randn_cuda.h"

namespace fastdiff {
namespace {

// V is a multiple of 4, so that each chunk is made once for any size of a sample.
template <typename T, int V>
__global__ void __launch_bounds__(kMostThreads) randn_kernel(const RandnArgs args, int64_t vecs_per_sample, bool wide) {
    const int64_t vec = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    const int64_t b = vec / vecs_per_sample;
    if (b >= args.batch) return;
    const int64_t at = (vec - b * vecs_per_sample) * V;
    const int64_t left = args.inner - at;
    float z[V];
    draw_in_order(noise_key(args.draw, b), at, z);
    if (wide && left >= V) {
        // Equal to b · inner + at, since samples are whole vectors or there is only one. In this form stores stay 16
        // bytes wide.
        store<T>(z, args.out, vec * V, V);
        return;
    }
    T* target = static_cast<T*>(args.out) + b * args.inner + at;
#pragma unroll
    for (int i = 0; i < V; ++i)
        if (i < left) narrow(z[i], target + i);
}

template <typename T>
void launch_as(const RandnArgs& args, Launches& launches) {
    constexpr int kVec = 16 / sizeof(T) < 4 ? 4 : 16 / sizeof(T);
    const int64_t vecs_per_sample = (args.inner + kVec - 1) / kVec;
    const bool wide = aligned(args.out) && (args.batch == 1 || args.inner % kVec == 0);
    const int threads = launches.config.randn;
    const int64_t blocks = blocks_of_threads(args.batch * vecs_per_sample, threads);
    launches.run(randn_kernel<T, kVec>, blocks, threads, args, vecs_per_sample, wide);
}

}  // namespace

const char* launch_randn(const RandnArgs& args, int device, void* stream) {
    Launches launches(device, stream);
    switch (args.dtype) {
        case DType::kFloat16:
            launch_as<__half>(args, launches);
            break;
        case DType::kBFloat16:
            launch_as<__nv_bfloat16>(args, launches);
            break;
        case DType::kFloat32:
            launch_as<float>(args, launches);
            break;
        case DType::kFloat64:
            launch_as<double>(args, launches);
            break;
    }
    return launches.finish();
}

}  // namespace fastdiff
