// SPDX-License-Identifier: MIT
// Conversions and 16-byte accesses shared by the CUDA kernels.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <string.h>

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

// Round two numbers to neighbours in memory: one instruction for half types.
template <typename C, typename T>
__device__ __forceinline__ void narrow_pair(C first, C second, T* out) {
    narrow(first, &out[0]);
    narrow(second, &out[1]);
}
__device__ __forceinline__ void narrow_pair(float first, float second, __half* out) {
    const __half2 pair = __floats2half2_rn(first, second);
    out[0] = pair.x;
    out[1] = pair.y;
}
__device__ __forceinline__ void narrow_pair(float first, float second, __nv_bfloat16* out) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(first, second);
    out[0] = pair.x;
    out[1] = pair.y;
}

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

// Widen the two elements of a word. The word stays whole until then: elements apart would take a register each.
__device__ __forceinline__ void widen_word(uint32_t word, const __half*, float* to) {
    __half2 pair;
    memcpy(&pair, &word, sizeof pair);
    to[0] = __low2float(pair);
    to[1] = __high2float(pair);
}
// A bfloat16 is the upper half of a float.
__device__ __forceinline__ void widen_word(uint32_t word, const __nv_bfloat16*, float* to) {
    to[0] = float_of(word << 16);
    to[1] = float_of(word & 0xffff0000u);
}

template <typename T, typename C, int V>
__device__ __forceinline__ void widen_vec(const Vec<T, V>& vec, C (&to)[V]) {
    if constexpr (sizeof(T) == 2 && V > 1) {
        uint32_t words[V / 2];
        memcpy(words, &vec, sizeof words);
#pragma unroll
        for (int i = 0; i < V / 2; ++i) widen_word(words[i], vec.values, &to[2 * i]);
    } else {
#pragma unroll
        for (int i = 0; i < V; ++i) to[i] = widen(vec.values[i]);
    }
}

// Round each element once.
template <typename T, typename C, int V>
__device__ __forceinline__ Vec<T, V> narrow_vec(const C (&from)[V]) {
    Vec<T, V> vec;
    if constexpr (V == 1) {
        narrow(from[0], &vec.values[0]);
    } else {
#pragma unroll
        for (int i = 0; i < V; i += 2) narrow_pair(from[i], from[i + 1], &vec.values[i]);
    }
    return vec;
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
