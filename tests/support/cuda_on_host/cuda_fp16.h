// SPDX-License-Identifier: MIT
// CUDA's half type and its conversions, written from the format's definition: csrc/cpu/half.h has its own.
#pragma once

#include <cmath>
#include <cstdint>

struct __half {
    uint16_t bits;
};

inline float __half2float(__half value) {
    const int exponent = value.bits >> 10 & 31;
    const int fraction = value.bits & 1023;
    const float sign = value.bits & 0x8000 ? -1.0f : 1.0f;
    if (exponent == 31) return fraction != 0 ? NAN : sign * INFINITY;
    return sign * (exponent == 0 ? std::ldexp(fraction, -24) : std::ldexp(1024 + fraction, exponent - 25));
}

// Round to nearest even.
inline __half __float2half_rn(float value) {
    if (std::isnan(value)) return {0x7fff};
    const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
    const float size = std::fabs(value);
    if (size >= 65520.0f) return {static_cast<uint16_t>(sign | 0x7c00)};  // halfway from the largest to 2^16
    int exponent = 0;
    std::frexp(size, &exponent);
    const int unit = exponent - 11 < -24 ? -24 : exponent - 11;
    // So many units in the last place: up to 2048, which is the next exponent's first.
    const auto count = static_cast<int>(std::nearbyint(std::ldexp(size, -unit)));
    const int bits = count < 1024 ? count : ((unit + 25) << 10) + (count - 1024);
    return {static_cast<uint16_t>(sign | bits)};
}

struct __half2 {
    __half x, y;
};

inline __half2 __floats2half2_rn(float low, float high) { return {__float2half_rn(low), __float2half_rn(high)}; }
inline float __low2float(__half2 pair) { return __half2float(pair.x); }
inline float __high2float(__half2 pair) { return __half2float(pair.y); }
