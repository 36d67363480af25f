// SPDX-License-Identifier: MIT
// Conversions, 16-byte accesses and launches by dtype, shared by the kernels of the reductions.
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

// The types of a reduction: of an element in memory, and of the arithmetic.
template <typename T, typename C>
struct Types {
    using Element = T;
    using Compute = C;
};

// Call `run(types, launches)` with the types of a dtype; return null, or CUDA's error message.
template <typename Run>
const char* launch_for(DType dtype, int device, void* stream, Run run) {
    Launches launches(device, stream);
    switch (dtype) {
        case DType::kFloat16:
            run(Types<__half, float>{}, launches);
            break;
        case DType::kBFloat16:
            run(Types<__nv_bfloat16, float>{}, launches);
            break;
        case DType::kFloat32:
            run(Types<float, float>{}, launches);
            break;
        case DType::kFloat64:
            run(Types<double, double>{}, launches);
            break;
    }
    return launches.finish();
}

}  // namespace
}  // namespace fastdiff
