// SPDX-License-Identifier: MIT
// Conversions and 16-byte accesses shared by the CUDA kernels.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "../step_math.h"
#include "launches.h"

namespace fastdiff {

__device__ __forceinline__ float widen(__half value) { return __half2float(value); }
__device__ __forceinline__ float widen(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ __forceinline__ float widen(float value) { return value; }
__device__ __forceinline__ double widen(double value) { return value; }

__device__ __forceinline__ void narrow(float value, __half* out) { *out = __float2half_rn(value); }
__device__ __forceinline__ void narrow(float value, __nv_bfloat16* out) { *out = __float2bfloat16_rn(value); }
__device__ __forceinline__ void narrow(float value, float* out) { *out = value; }
__device__ __forceinline__ void narrow(float value, double* out) { *out = static_cast<double>(value); }
__device__ __forceinline__ void narrow(double value, double* out) { *out = value; }
__device__ __forceinline__ void narrow(double value, float* out) { *out = static_cast<float>(value); }
// double is rounded to float and then to a half type, as in torch.
__device__ __forceinline__ void narrow(double value, __half* out) { narrow(static_cast<float>(value), out); }
__device__ __forceinline__ void narrow(double value, __nv_bfloat16* out) { narrow(static_cast<float>(value), out); }

// V consecutive elements, one access where they take 16 bytes.
template <typename T, int V>
struct alignas(V * sizeof(T)) Vec {
    T values[V];
};

// Load elements [0, count) at `from`, count <= V; the rest is 0.
template <typename T, int V>
__device__ __forceinline__ Vec<T, V> load_vec(const void* from, int64_t offset, int count) {
    const T* source = static_cast<const T*>(from) + offset;
    Vec<T, V> vec;
    if (count == V) {
        vec = *reinterpret_cast<const Vec<T, V>*>(source);
    } else {
#pragma unroll
        for (int i = 0; i < V; ++i) narrow(0.0f, &vec.values[i]);
#pragma unroll
        for (int i = 0; i < V; ++i)
            if (i < count) vec.values[i] = source[i];
    }
    return vec;
}

template <typename T, int V, typename C>
__device__ __forceinline__ void widen_vec(const Vec<T, V>& vec, C (&to)[V]) {
#pragma unroll
    for (int i = 0; i < V; ++i) to[i] = widen(vec.values[i]);
}

template <typename T, typename C, int V>
__device__ __forceinline__ void load(const void* from, int64_t offset, int count, C (&to)[V]) {
    widen_vec(load_vec<T, V>(from, offset, count), to);
}

// Store elements [0, count) of a vector.
template <typename T, int V>
__device__ __forceinline__ void store_vec(const Vec<T, V>& vec, void* to, int64_t offset, int count) {
    T* target = static_cast<T*>(to) + offset;
    if (count == V) {
        *reinterpret_cast<Vec<T, V>*>(target) = vec;
        return;
    }
#pragma unroll
    for (int i = 0; i < V; ++i)
        if (i < count) target[i] = vec.values[i];
}

// Store elements [0, count) of `from` as T, in vectors of at most 16 bytes.
template <typename T, typename C, int V>
__device__ __forceinline__ void store(const C (&from)[V], void* to, int64_t offset, int count) {
    constexpr int kPart = V * sizeof(T) > 16 ? 16 / static_cast<int>(sizeof(T)) : V;
    T* target = static_cast<T*>(to) + offset;
    Vec<T, kPart> parts[V / kPart];
#pragma unroll
    for (int i = 0; i < V; ++i) narrow(from[i], &parts[i / kPart].values[i % kPart]);
    if (count == V) {
#pragma unroll
        for (int i = 0; i < V; i += kPart) *reinterpret_cast<Vec<T, kPart>*>(target + i) = parts[i / kPart];
        return;
    }
#pragma unroll
    for (int i = 0; i < V; ++i)
        if (i < count) target[i] = parts[i / kPart].values[i % kPart];
}

inline bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

}  // namespace fastdiff
