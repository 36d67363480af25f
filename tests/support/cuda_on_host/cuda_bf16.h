// SPDX-License-Identifier: MIT
// CUDA's bfloat16 and its conversions: a float without its lower half.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

struct __nv_bfloat16 {
    uint16_t bits;
};

inline float __bfloat162float(__nv_bfloat16 value) {
    const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
    float result;
    std::memcpy(&result, &bits, sizeof result);
    return result;
}

// Round to nearest even.
inline __nv_bfloat16 __float2bfloat16_rn(float value) {
    if (std::isnan(value)) return {0x7fff};
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    const uint32_t rest = bits & 0xffff;
    uint32_t kept = bits >> 16;
    if (rest > 0x8000 || (rest == 0x8000 && (kept & 1) != 0)) ++kept;
    return {static_cast<uint16_t>(kept)};
}

struct __nv_bfloat162 {
    __nv_bfloat16 x, y;
};

inline __nv_bfloat162 __floats2bfloat162_rn(float low, float high) {
    return {__float2bfloat16_rn(low), __float2bfloat16_rn(high)};
}
