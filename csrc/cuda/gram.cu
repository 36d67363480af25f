// SPDX-License-Identifier: MIT
// The Gram matrix of a sample on CUDA, in the order of csrc/reduce_math.h.
//
// A warp takes a block of 1024 elements; thread t holds lanes t and t + 32 of every product, so the accumulators of
// six tensors fit into registers, and each round of 32 elements is one coalesced access of every tensor.
#include "fold.h"
#include "reduce_device.h"

namespace fastdiff {
namespace {

constexpr int kWarpSize = 32;
constexpr int kRounds = kBlock / kLanes;
constexpr int kGramThreads = 256;  // of a block at most: six tensors of doubles need more registers than 512 leave

template <typename T, typename C, int K, bool kSums>
__global__ void __launch_bounds__(kGramThreads) gram_kernel(const GramArgs args, int64_t blocks) {
    constexpr int kParts = gram_parts(K, kSums), kPairs = gram_parts(K, false);
    const int64_t block = static_cast<int64_t>(blockIdx.x) * (blockDim.x / kWarpSize) + threadIdx.x / kWarpSize;
    const bool there = block < args.batch * blocks;  // other warps only take part in shuffles
    const int thread = static_cast<int>(threadIdx.x % kWarpSize);
    const int64_t b = there ? block / blocks : 0, j = there ? block - b * blocks : 0;
    const int64_t offset = b * args.inner + j * kBlock;
    const int count = there ? static_cast<int>(elements_of(args.inner, j)) : 0;

    C lanes[2][kParts];
#pragma unroll
    for (int p = 0; p < kParts; ++p) lanes[0][p] = lanes[1][p] = C(0);
#pragma unroll 1
    for (int r = 0; r < kRounds; ++r) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int at = r * kLanes + half * kWarpSize + thread;
            C x[K];
#pragma unroll
            for (int i = 0; i < K; ++i)
                x[i] = at < count ? C(widen(static_cast<const T*>(args.x[i])[offset + at])) : C(0);
            int p = 0;
#pragma unroll
            for (int i = 0; i < K; ++i) {
#pragma unroll
                for (int k = i; k < K; ++k) {
                    lanes[half][p] = take<Sum::kDot>(lanes[half][p], x[i], x[k]);
                    ++p;
                }
            }
#pragma unroll
            for (int i = 0; i < (kSums ? K : 0); ++i) lanes[half][kPairs + i] += x[i];
        }
    }
    C* parts = static_cast<C*>(args.partials) + block * kParts;
#pragma unroll
    for (int p = 0; p < kParts; ++p) {
        const C sum = fold_warp(lanes[0][p], lanes[1][p]);
        if (there && thread == 0) parts[p] = sum;
    }
}

// One block of threads a part of a sample.
template <typename C>
__global__ void __launch_bounds__(kLanes) finish_gram_kernel(const GramArgs args, int64_t blocks, int parts) {
    __shared__ double lanes[kLanes];
    const int64_t b = blockIdx.x / parts;
    const int part = static_cast<int>(blockIdx.x - b * parts);
    const C* sample = static_cast<const C*>(args.partials) + b * blocks * parts + part;
    const double total = fold_blocks(lanes, blocks, [&](int64_t j) { return static_cast<double>(sample[j * parts]); });
    if (threadIdx.x == 0)
        store_gram(args, part, total, static_cast<C*>(args.out) + b * args.count * (args.count + (args.sums ? 1 : 0)));
}

template <typename T, typename C, int K, bool kSums>
void launch_count(const GramArgs& args, Launches& launches) {
    const int threads = launches.config.sum < kGramThreads ? launches.config.sum : kGramThreads;
    const int warps = threads / kWarpSize;
    const int64_t blocks = blocks_of(args.inner);
    constexpr int kParts = gram_parts(K, kSums);
    launches.run(gram_kernel<T, C, K, kSums>, (args.batch * blocks + warps - 1) / warps, threads, args, blocks);
    launches.run(finish_gram_kernel<C>, args.batch * kParts, kLanes, args, blocks, kParts);
}

template <typename T, typename C, int K>
void launch_sums(const GramArgs& args, Launches& launches) {
    if (args.sums)
        launch_count<T, C, K, true>(args, launches);
    else
        launch_count<T, C, K, false>(args, launches);
}

template <typename T, typename C>
void launch_as(Types<T, C>, const GramArgs& args, Launches& launches) {
    switch (args.count) {
        case 2:
            return launch_sums<T, C, 2>(args, launches);
        case 3:
            return launch_sums<T, C, 3>(args, launches);
        case 4:
            return launch_sums<T, C, 4>(args, launches);
        case 5:
            return launch_sums<T, C, 5>(args, launches);
        case 6:
            return launch_sums<T, C, 6>(args, launches);
    }
}

}  // namespace

const char* launch_gram(const GramArgs& args, int device, void* stream) {
    return launch_for(args.dtype, device, stream,
                      [&](auto types, Launches& launches) { launch_as(types, args, launches); });
}

}  // namespace fastdiff
