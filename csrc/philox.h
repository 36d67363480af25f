// SPDX-License-Identifier: MIT
// Standard normal numbers from a counter, for host and device: Philox4x32-10 (Salmon et al., "Parallel random numbers:
// as easy as 1, 2, 3", SC 2011) and the Box–Muller transform.
//
// A chunk is four consecutive elements of a sample. Its numbers depend on the sample's seed, the chunk's index, the
// step and the purpose only. All backends compute the same bits: the operations are integer, correctly rounded
// conversions and square roots, and products and sums that are exact, rounded alone, or one fma.
#pragma once

#include "step_math.h"

namespace fastdiff {

struct Words {
    uint32_t w[4];
};

constexpr int kPhiloxRounds = 10;
constexpr uint32_t kPhiloxMultiplier0 = 0xD2511F53u, kPhiloxMultiplier1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxKeyStep0 = 0x9E3779B9u, kPhiloxKeyStep1 = 0xBB67AE85u;

struct Product {
    uint32_t high, low;
};

// Multiply 32-bit numbers to 64 bits. nvcc multiplies uint64_t as such and adds the 0 that the upper halves give.
FASTDIFF_INLINE Product multiply(uint32_t a, uint32_t b) {
#ifdef __CUDA_ARCH__
    Product product;
    asm("{.reg .u64 wide;\n mul.wide.u32 wide, %2, %3;\n mov.b64 {%1, %0}, wide;}"
        : "=r"(product.high), "=r"(product.low)
        : "r"(a), "r"(b));
    return product;
#else
    const uint64_t wide = static_cast<uint64_t>(a) * b;
    return {static_cast<uint32_t>(wide >> 32), static_cast<uint32_t>(wide)};
#endif
}

FASTDIFF_INLINE Words philox_round(Words c, uint32_t key0, uint32_t key1) {
    const Product a = multiply(c.w[0], kPhiloxMultiplier0);
    const Product b = multiply(c.w[2], kPhiloxMultiplier1);
    return {{b.high ^ c.w[1] ^ key0, b.low, a.high ^ c.w[3] ^ key1, a.low}};
}

FASTDIFF_INLINE Words philox(Words counter, uint32_t key0, uint32_t key1) {
    for (int round = 0; round < kPhiloxRounds; ++round) {
        counter = philox_round(counter, key0, key1);
        key0 += kPhiloxKeyStep0;
        key1 += kPhiloxKeyStep1;
    }
    return counter;
}

// ln u for u = (w + 1/2)·2⁻³², below 1. Near 1 the difference u − 1 is computed from the bits of ~w, which keeps digits
// that u has lost.
FASTDIFF_INLINE float log_of_uniform(uint32_t w) {
    const float u = fmaf(static_cast<float>(w), 0x1p-32f, 0x1p-33f);
    const uint32_t shifted = bits_of(u) + (0x3f800000u - 0x3f3504f3u);  // the exponent changes at √½
    const int32_t k = static_cast<int32_t>(shifted >> 23) - 127;
    const float mantissa = float_of((shifted & 0x007fffffu) + 0x3f3504f3u);
    const float near_one = -fmaf(static_cast<float>(~w), 0x1p-32f, 0x1p-33f);
    const float f = k == 0 ? near_one : mantissa - 1.0f;
    float q = 0.08700359612703f;
    q = fmaf(q, f, -0.14267475903034f);
    q = fmaf(q, f, 0.14914786815643f);
    q = fmaf(q, f, -0.16577586531639f);
    q = fmaf(q, f, 0.19963061809540f);
    q = fmaf(q, f, -0.25001338124275f);
    q = fmaf(q, f, 0.33333909511566f);
    const float square = f * f;
    const float n = static_cast<float>(k);
    float tail = fmaf(square * f, q, -0.5f * square);
    tail = fmaf(n, 9.058001e-6f, tail);
    // n times the high part of ln 2 is exact: that part has 17 bits, n has 6.
    return fmaf(n, 0.6931381225585938f, tail + f);
}

// √x, correctly rounded, for x from 2⁻¹⁰⁰ to 2¹²⁶. On a GPU these are the instructions that ptxas makes of sqrt.rn for
// such x (tests/kernels/test_cuda_compile.py compares them), without its branch for all others, which would keep the
// transforms of a thread from running side by side.
FASTDIFF_INLINE float root_of_normal(float x) {
#ifdef __CUDA_ARCH__
    float inverse, root, half;
    asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(x));
    asm("mul.rn.ftz.f32 %0, %1, %2;" : "=f"(root) : "f"(x), "f"(inverse));
    asm("mul.rn.ftz.f32 %0, %1, 0f3F000000;" : "=f"(half) : "f"(inverse));
    return fmaf(fmaf(-root, root, x), half, root);
#else
    return sqrtf(x);
#endif
}

struct NormalPair {
    float first, second;
};

// r·cos θ and r·sin θ with r = √(−2 ln u) from `radius` and θ from `angle`: its low three bits are the octant, the
// others the position y·π in the first octant.
FASTDIFF_INLINE NormalPair box_muller(uint32_t radius, uint32_t angle) {
    const float r = root_of_normal(-2.0f * log_of_uniform(radius));  // from 2⁻³² to 46
    const float y = fmaf(static_cast<float>(angle & ~7u), 0x1p-34f, 0x1p-32f);
    const float y2 = y * y;
    float sine = -0.5890122056f;
    sine = fmaf(sine, y2, 2.5497610569f);
    sine = fmaf(sine, y2, -5.1677079201f);
    sine = fmaf(sine, y2, 3.1415927410f);
    sine = sine * y;
    float cosine = -1.3067060709f;
    cosine = fmaf(cosine, y2, 4.0576515198f);
    cosine = fmaf(cosine, y2, -4.9347906113f);
    cosine = fmaf(cosine, y2, 1.0f);
    const bool swap = (angle & 1u) != 0;
    const float c = swap ? sine : cosine;
    const float s = swap ? cosine : sine;
    // Flip signs by exclusive or: bit 1 that of the sine, bit 2 that of the cosine.
    const float signed_s = float_of(bits_of(s) ^ ((angle & 2u) << 30));
    const float signed_c = float_of(bits_of(c) ^ ((angle & 4u) << 29));
    return {r * signed_c, r * signed_s};
}

}  // namespace fastdiff
