// SPDX-License-Identifier: MIT
// Arguments of the fused step and its arithmetic on one element, for host and device.
// Every product that feeds a sum is an explicit fma, so that all builds round alike.
#pragma once

#include <math.h>
#include <stdint.h>

#include "row_layout.h"

#ifdef __CUDACC__
#define FASTDIFF_INLINE __host__ __device__ __forceinline__
#else
#define FASTDIFF_INLINE inline __attribute__((always_inline))
#endif

namespace fastdiff {

enum class DType : int { kFloat16 = 0, kBFloat16 = 1, kFloat32 = 2, kFloat64 = 3 };

FASTDIFF_INLINE constexpr int64_t item_size(DType dtype) {
    return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

// Dtypes of a step's tensors; the entry of an absent tensor is not read.
struct StreamTypes {
    DType sample, model_output, uncond, variance, noise, mask;
    DType history[kRegisters];
    DType outputs[kMaxOutputs];
};

// Counter-based noise: seeds, step and purpose; see philox.h.
struct NoiseArgs {
    const int64_t* seeds;  // [batch]; null where no noise is drawn
    const int64_t* steps;  // [1] or [batch]; null where all samples are at `step`
    int64_t steps_stride;  // 0 or 1
    uint32_t step;
    uint32_t purpose;
    // Each element's noise is indexed by its row-major place in the sample. 1: memory is in row-major order; more:
    // memory is channels-last with so many channels.
    int64_t channels;
    // Consecutive samples of the batch that are the parts of one: they share a seed, [batch / parts], and their
    // elements are counted through.
    int64_t parts;
};

// One call of the step. Tensors like the samples share one dense layout of batch × inner elements. A pointer may be
// null where the row has no coefficient for its tensor.
struct StepArgs {
    int64_t batch;
    int64_t inner;         // elements per sample
    int64_t model_stride;  // elements from sample to sample in model_output, uncond and variance (>= inner)
    const void* sample;
    const void* model_output;
    const void* uncond;
    const void* variance;
    const void* noise;
    const void* mask;           // blends prev_sample with the map of keep_1, which is then no output
    void* history[kRegisters];  // written only by `scatter`
    const void* table;          // [num_rows, 32], compute dtype
    int64_t num_rows;
    int64_t row;            // of all samples, where `rows` is null
    const int64_t* rows;    // [1] or [batch]; a sample with a row outside the table is skipped: its elements are copied
    int64_t rows_stride;    // 0 or 1
    const void* guidance;   // [1] or [batch], compute dtype; null: `guidance_value` for all samples
    double guidance_value;  // read where `uncond` is given and `guidance` is null, never by the CPU's loops
    const void* threshold;  // [batch], compute dtype
    int64_t guidance_stride;  // 0 or 1
    NoiseArgs draw;           // instead of `noise`
    void* outputs[kMaxOutputs];
    int num_outputs;
    bool scatter;       // kept tensors go to the history slots that each sample's row names, not to outputs[1] and [2]
    void* model_input;  // scale · prev_sample, `model_input_copies` times in a row, batch × inner each
    int model_input_copies;
    DType model_input_dtype;
    Variance variance_kind;
    DType dtype;        // of the samples, and unless `mixed` of all tensors like them
    bool mixed;         // tensors like the samples have the dtypes in `types`
    bool wide;          // one of them is float64, so the compute dtype is too
    StreamTypes types;  // read only where `mixed`
};

// Normal numbers out[b, i] for a contiguous batch × inner.
struct RandnArgs {
    int64_t batch;
    int64_t inner;
    NoiseArgs draw;
    void* out;
    DType dtype;
};

FASTDIFF_INLINE float multiply_add(float a, float b, float c) { return fmaf(a, b, c); }
FASTDIFF_INLINE double multiply_add(double a, double b, double c) { return fma(a, b, c); }
FASTDIFF_INLINE float exponential(float x) { return expf(x); }
FASTDIFF_INLINE double exponential(double x) { return exp(x); }
FASTDIFF_INLINE float square_root(float x) { return sqrtf(x); }
FASTDIFF_INLINE double square_root(double x) { return sqrt(x); }

// Bit casts between float and uint32_t.
FASTDIFF_INLINE uint32_t bits_of(float value) {
#ifdef __CUDA_ARCH__
    return __float_as_uint(value);
#else
    uint32_t bits;
    __builtin_memcpy(&bits, &value, sizeof bits);
    return bits;
#endif
}

FASTDIFF_INLINE float float_of(uint32_t bits) {
#ifdef __CUDA_ARCH__
    return __uint_as_float(bits);
#else
    float value;
    __builtin_memcpy(&value, &bits, sizeof value);
    return value;
#endif
}

// m = u + g·(c − u)
template <typename C>
FASTDIFF_INLINE C guide(C cond, C uncond, C scale) {
    return multiply_add(scale, cond - uncond, uncond);
}

// d = p·x + q·m. A term of weight 0 is skipped: 0·∞ and 0·NaN are NaN.
template <typename C>
FASTDIFF_INLINE C predict(C p, C q, C sample, C output) {
    const C of_sample = p != C(0) ? p * sample : C(0);
    return q != C(0) ? multiply_add(q, output, of_sample) : of_sample;
}

// Clamp to ±bound. Comparisons keep NaN, which fmin and fmax would replace by a number. The upper bound is applied
// last, so that a negative bound is the result, as in torch.clamp.
template <typename C>
FASTDIFF_INLINE C clamp_to(C value, C bound) {
    value = value < -bound ? -bound : value;
    return value > bound ? bound : value;
}

// prev + mask·(target − prev), in a form that is `prev` where the mask is 0 and `target` where it is 1, to the bit.
template <typename C>
FASTDIFF_INLINE C blend(C prev, C target, C mask) {
    const C soft = multiply_add(mask, target, (C(1) - mask) * prev);
    return mask == C(0) ? prev : mask == C(1) ? target : soft;
}

// Learned standard deviation, the factor of the noise.
template <typename C>
FASTDIFF_INLINE C learned_std(C v, C offset, C slope, Variance kind) {
    return kind == Variance::kLearnedRange ? exponential(multiply_add(slope, v, offset)) : square_root(v);
}

}  // namespace fastdiff
