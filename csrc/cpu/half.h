// SPDX-License-Identifier: MIT
// The two half types as 16 bits, converted by integer arithmetic without branches, so that loops vectorise.
#pragma once

#include <type_traits>

#include "cpu.h"

namespace fastdiff {

struct Half {
    uint16_t bits;
};
struct BFloat16 {
    uint16_t bits;
};

FASTDIFF_INLINE float widen(BFloat16 value) { return float_of(static_cast<uint32_t>(value.bits) << 16); }

// Round to nearest even; NaN stays NaN.
FASTDIFF_INLINE void narrow(float value, BFloat16* out) {
    const uint32_t bits = bits_of(value);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    out->bits = static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

FASTDIFF_INLINE float widen(Half value) {
    const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
    const uint32_t rest = static_cast<uint32_t>(value.bits & 0x7fffu);
    // Normal numbers: shift the fields and add 112 to the exponent; infinity and NaN need it twice.
    const uint32_t normal = (rest << 13) + (rest >= 0x7c00u ? 2u * (112u << 23) : (112u << 23));
    // Subnormal numbers: `rest` counts units of 2^-24, exact in float.
    const float small = static_cast<float>(static_cast<int32_t>(rest)) * 0x1p-24f;
    return float_of(sign | (rest < 0x0400u ? bits_of(small) : normal));
}

// Round to nearest even, overflow to infinity, subnormals kept; NaN stays NaN.
FASTDIFF_INLINE void narrow(float value, Half* out) {
    const uint32_t bits = bits_of(value);
    const uint32_t sign = (bits >> 16) & 0x8000u;
    const uint32_t rest = bits & 0x7fffffffu;
    const uint32_t rebased = rest - (112u << 23);
    const uint32_t normal = (rebased + 0x0fffu + ((rebased >> 13) & 1u)) >> 13;
    // Adding 0.5 moves the unit of a half's subnormals, 2^-24, to a float's last place, so that the sum rounds
    // correctly.
    const uint32_t small = bits_of(float_of(rest) + 0.5f) - 0x3f000000u;
    uint32_t result = rest < 0x38800000u ? small : normal;
    result = rest >= 0x47800000u ? 0x7c00u : result;
    result = rest > 0x7f800000u ? 0x7e00u : result;
    out->bits = static_cast<uint16_t>(sign | result);
}

}  // namespace fastdiff
