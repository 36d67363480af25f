// SPDX-License-Identifier: MIT
// Elements of a dtype known only at launch: fetched as bits, so that all loads are issued before the first is used, and
// converted afterwards. All threads of a launch take the same branches.
#pragma once

#include <string.h>

#include "access.h"

namespace fastdiff {

// The bits of V elements, in room for V of type C. Elements of 2 bytes are stored two to a word, the first one low.
template <typename C, int V>
struct Bits {
    static constexpr int kWords = V * static_cast<int>(sizeof(C)) / 4;
    uint32_t words[kWords];

    __device__ __forceinline__ uint32_t half(int i) const { return (words[i / 2] >> (16 * (i % 2))) & 0xffffu; }
};

// N words in accesses of 16 bytes, or in one access if there are fewer.
template <int N>
struct WordAccess {
    static constexpr int kPart = N > 4 ? 4 : N;
    static constexpr int kParts = N / kPart;
};

template <typename C, int V, int N>
__device__ __forceinline__ void fetch_words(const void* from, Bits<C, V>* bits) {
    using W = WordAccess<N>;
#pragma unroll
    for (int p = 0; p < W::kParts; ++p) {
        const auto part = static_cast<const Vec<uint32_t, W::kPart>*>(from)[p];
#pragma unroll
        for (int i = 0; i < W::kPart; ++i) bits->words[p * W::kPart + i] = part.values[i];
    }
}

// Fetch V elements at `from`; with V above 1 aligned to 16 bytes, or to their own size if smaller.
template <typename C, int V>
__device__ __forceinline__ Bits<C, V> fetch(DType dtype, const void* from, int64_t offset) {
    Bits<C, V> bits;
    const char* source = static_cast<const char*>(from) + offset * item_size(dtype);
    if (dtype == DType::kFloat32)
        fetch_words<C, V, V>(source, &bits);
    else if (sizeof(C) == 8 && dtype == DType::kFloat64)
        fetch_words<C, V, Bits<C, V>::kWords>(source, &bits);
    else if constexpr (V > 1)
        fetch_words<C, V, V / 2>(source, &bits);
    else
        bits.words[0] = *reinterpret_cast<const uint16_t*>(source);
    return bits;
}

__device__ __forceinline__ float half_of(uint32_t bits) {
    const auto stored = static_cast<uint16_t>(bits);
    __half value;
    memcpy(&value, &stored, sizeof value);
    return widen(value);
}

__device__ __forceinline__ double double_of(uint32_t low, uint32_t high) {
#ifdef __CUDA_ARCH__
    return __hiloint2double(static_cast<int>(high), static_cast<int>(low));
#else
    const uint64_t bits = (uint64_t{high} << 32) | low;
    double value;
    memcpy(&value, &bits, sizeof value);
    return value;
#endif
}

// Convert bits to numbers, exactly.
template <typename C, int V>
__device__ __forceinline__ void numbers_of(DType dtype, const Bits<C, V>& bits, C (&to)[V]) {
    switch (dtype) {
        case DType::kFloat16:
#pragma unroll
            for (int i = 0; i < V; ++i) to[i] = half_of(bits.half(i));
            break;
        case DType::kBFloat16:
#pragma unroll
            for (int i = 0; i < V; ++i) to[i] = float_of(bits.half(i) << 16);
            break;
        case DType::kFloat32:
#pragma unroll
            for (int i = 0; i < V; ++i) to[i] = float_of(bits.words[i]);
            break;
        case DType::kFloat64:  // C is then double
            if constexpr (sizeof(C) == 8) {
#pragma unroll
                for (int i = 0; i < V; ++i) to[i] = double_of(bits.words[2 * i], bits.words[2 * i + 1]);
            }
            break;
    }
}

// Store elements [0, count) of `from`, each rounded once.
template <typename C, int V>
__device__ __forceinline__ void store_as(DType dtype, const C (&from)[V], void* to, int64_t offset, int count) {
    switch (dtype) {
        case DType::kFloat16:
            store<__half>(from, to, offset, count);
            break;
        case DType::kBFloat16:
            store<__nv_bfloat16>(from, to, offset, count);
            break;
        case DType::kFloat32:
            store<float>(from, to, offset, count);
            break;
        case DType::kFloat64:
            store<double>(from, to, offset, count);
            break;
    }
}

// Round elements to a dtype and back.
template <typename T, typename C, int V>
__device__ __forceinline__ void round_to(C (&values)[V]) {
#pragma unroll
    for (int i = 0; i < V; ++i) {
        T rounded;
        narrow(values[i], &rounded);
        values[i] = widen(rounded);
    }
}

template <typename C, int V>
__device__ __forceinline__ void round_as(DType dtype, C (&values)[V]) {
    switch (dtype) {
        case DType::kFloat16:
            round_to<__half>(values);
            break;
        case DType::kBFloat16:
            round_to<__nv_bfloat16>(values);
            break;
        case DType::kFloat32:
            round_to<float>(values);
            break;
        case DType::kFloat64:
            break;
    }
}

}  // namespace fastdiff
