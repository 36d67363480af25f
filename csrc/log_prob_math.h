// SPDX-License-Identifier: MIT
// The log-probability of a step, for host and device: Σ log N(prev; mean, σ²) over the elements of a sample.
//
// The mean is the row's first map without its noise term, σ the magnitude of that term's coefficient, and prev the
// previous sample as it is stored, rounded to its dtype: a replay reads the same number and gets the same bits. The
// squares of prev − mean are summed in the order of reduce_math.h, and the rest is float64 arithmetic on one number per
// sample, rounded once.
#pragma once

#include "reduce_math.h"

namespace fastdiff {

struct LogProbArgs {
    StepArgs step;   // samples are blocks, of a fixed variance, without model input and history slots to write
    bool replay;     // `step.noise` is the previous sample, which is read; nothing is drawn or written
    bool mean;       // the mean over the elements instead of their sum
    void* partials;  // [batch, blocks], compute dtype
    void* out;       // [batch], compute dtype
};

// Natural logarithm of a positive finite number, to 2 units in the last place, by the same operations everywhere:
// log(2^e·m) = e·ln 2 + 2·atanh(f), f = (m − 1)/(m + 1), for m from √½ to √2.
FASTDIFF_INLINE double logarithm(double x) {
    int64_t bits;
#ifdef __CUDA_ARCH__
    bits = __double_as_longlong(x);
#else
    __builtin_memcpy(&bits, &x, sizeof bits);
#endif
    // 0x3fe6a09e667f3bcd are the bits of √½.
    const int64_t exponent = (bits - 0x3fe6a09e667f3bcd) >> 52;
    bits -= exponent << 52;
    double m;
#ifdef __CUDA_ARCH__
    m = __longlong_as_double(bits);
#else
    __builtin_memcpy(&m, &bits, sizeof m);
#endif
    const double f = (m - 1.0) / (m + 1.0), g = f * f;
    double series = 1.0 / 25.0;
    series = multiply_add(series, g, 1.0 / 23.0);
    series = multiply_add(series, g, 1.0 / 21.0);
    series = multiply_add(series, g, 1.0 / 19.0);
    series = multiply_add(series, g, 1.0 / 17.0);
    series = multiply_add(series, g, 1.0 / 15.0);
    series = multiply_add(series, g, 1.0 / 13.0);
    series = multiply_add(series, g, 1.0 / 11.0);
    series = multiply_add(series, g, 1.0 / 9.0);
    series = multiply_add(series, g, 1.0 / 7.0);
    series = multiply_add(series, g, 1.0 / 5.0);
    series = multiply_add(series, g, 1.0 / 3.0);
    const double twice = f + f;
    return multiply_add(static_cast<double>(exponent), 0.69314718055994531, multiply_add(twice * g, series, twice));
}

// Log-probability of a sample from its sum of squares; 0 where the row adds no noise, or skips the sample.
FASTDIFF_INLINE double log_prob_of(double squares, double weight, int64_t inner, bool mean) {
    const double sigma = weight < 0.0 ? -weight : weight, n = static_cast<double>(inner);
    if (!(sigma > 0.0)) return sigma == 0.0 ? 0.0 : sigma;
    const double apart = -0.5 * (squares / (sigma * sigma));
    const double constant = logarithm(sigma) + 0.91893853320467274;  // ½·log 2π
    return mean ? apart / n - constant : multiply_add(-n, constant, apart);
}

}  // namespace fastdiff
