// SPDX-License-Identifier: MIT
// The folds of csrc/reduce_math.h for the threads of a block.
#pragma once

#include "../reduce_math.h"

namespace fastdiff {
namespace {

// Fold one sample's blocks: thread i of kLanes is lane i, `lanes` is shared memory.
template <typename Term>
__device__ __forceinline__ double fold_blocks(double* lanes, int64_t blocks, Term term) {
    const int lane = static_cast<int>(threadIdx.x);
    double sum = 0;
    for (int64_t j = lane; j < blocks; j += kLanes) sum += term(j);
    __syncthreads();  // until all have read the previous total
    lanes[lane] = sum;
    __syncthreads();
    for (int half = kLanes / 2; half > 0; half /= 2) {
        if (lane < half) lanes[lane] += lanes[lane + half];
        __syncthreads();
    }
    return lanes[0];
}

// Fold the 64 lanes of a warp, whose thread t holds lanes t and t + 32; every thread gets the sum.
template <typename C>
__device__ __forceinline__ C fold_warp(C first, C second) {
    C lane = first + second;
#pragma unroll
    for (int apart = kLanes / 4; apart > 0; apart /= 2) lane += __shfl_xor_sync(0xffffffffu, lane, apart);
    return lane;
}

}  // namespace
}  // namespace fastdiff
