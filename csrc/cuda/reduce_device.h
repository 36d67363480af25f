// SPDX-License-Identifier: MIT
// Conversions and 16-byte accesses shared by the kernels of the reductions.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "launches.h"
#include "reduce.h"

namespace fastdiff {
namespace {

__device__ __forceinline__ float widen(__half value) { return __half2float(value); }
__device__ __forceinline__ float widen(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ __forceinline__ float widen(float value) { return value; }
__device__ __forceinline__ double widen(double value) { return value; }

// Consecutive elements that are 16 bytes together.
template <typename T>
struct alignas(16) Vec {
    static constexpr int kSize = 16 / sizeof(T);
    T values[kSize];
};

inline bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

}  // namespace
}  // namespace fastdiff
