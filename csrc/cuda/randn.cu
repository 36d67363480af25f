// SPDX-License-Identifier: MIT
// Normal numbers on their own: a thread makes whole chunks and stores 16 bytes an access.
#include "access.h"
#include "draw.h"
#include "randn_cuda.h"

namespace fastdiff {
namespace {

// V is a multiple of 4: no chunk is made twice, whatever the size of a sample.
template <typename T, int V>
__global__ void __launch_bounds__(kMostThreads) randn_kernel(const RandnArgs args, int64_t packs_a_sample, bool wide) {
    const int64_t pack = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    const int64_t b = pack / packs_a_sample;
    if (b >= args.batch) return;
    const int64_t at = (pack - b * packs_a_sample) * V;
    const int64_t left = args.inner - at;
    float z[V];
    draw_in_order(stream_of(args.draw, b), at, z);
    if (wide && left >= V) {
        // b · inner + at, since samples are whole packs or there is one; written so, stores stay 16 bytes wide.
        store<T>(z, args.out, pack * V, V);
        return;
    }
    T* target = static_cast<T*>(args.out) + b * args.inner + at;
#pragma unroll
    for (int i = 0; i < V; ++i)
        if (i < left) narrow(z[i], target + i);
}

template <typename T>
void launch_as(const RandnArgs& args, Launches& launches) {
    constexpr int kPack = 16 / sizeof(T) < 4 ? 4 : 16 / sizeof(T);
    const int64_t packs_a_sample = (args.inner + kPack - 1) / kPack;
    const bool wide = aligned(args.out) && (args.batch == 1 || args.inner % kPack == 0);
    const int threads = launches.config.randn;
    const int64_t blocks = blocks_of_threads(args.batch * packs_a_sample, threads);
    launches.run(randn_kernel<T, kPack>, blocks, threads, args, packs_a_sample, wide);
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
