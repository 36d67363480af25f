// SPDX-License-Identifier: MIT
// One element's arithmetic of the fused step, for host and device alike, and the layout of a table row.
// Every product that feeds a sum goes through an explicit fma, so that all builds round alike.
#pragma once

#include <math.h>
#include <stdint.h>

#ifdef __CUDACC__
#define FASTDIFF_INLINE __host__ __device__ __forceinline__
#else
#define FASTDIFF_INLINE inline __attribute__((always_inline))
#endif

namespace fastdiff {

// The layout of a row; fastdiff/row_layout.py holds the same numbers.
enum RowLayout : int {
    kPredictionSample = 0,
    kPredictionOutput = 1,
    kClip = 2,
    kVarianceOffset = 3,
    kVarianceSlope = 4,
    kModelInputScale = 5,
    kStore0 = 6,  // the register that keep_0 goes to where rows are a sample's own; negative for none
    kStore1 = 7,
    kPrevSample = 8,
    kKeep0 = 16,
    kKeep1 = 24,
    kRowWidth = 32,
};

// The columns of one affine map.
enum Column : int { kSample, kModelOutput, kPrediction, kHistory0, kNoise = kHistory0 + 4, kColumns };

constexpr int kRegisters = 4;
constexpr int kMaxOutputs = 3;  // prev_sample, keep_0, keep_1
constexpr int kOutputMaps[kMaxOutputs] = {kPrevSample, kKeep0, kKeep1};

enum class Variance : int { kFixed = 0, kLearnedRange = 1, kLearned = 2 };
enum class DType : int { kFloat16 = 0, kBFloat16 = 1, kFloat32 = 2, kFloat64 = 3 };

FASTDIFF_INLINE constexpr int64_t item_size(DType dtype) {
    return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

// How the tensors of a step are stored; of one that is absent it is not looked at.
struct StreamTypes {
    DType sample, model_output, uncond, variance, noise;
    DType history[kRegisters];
    DType outputs[kMaxOutputs];
};

// What noise is drawn from, and for whom; see philox.h.
struct NoiseArgs {
    const int64_t* seeds;  // [batch]; null where no noise is drawn
    const int64_t* steps;  // [1] or [batch]; null where all samples are at `step`
    int64_t steps_stride;  // 0 or 1
    uint32_t step;
    uint32_t purpose;
    // Noise belongs to places in the sample, counted row-major: with 1 that is the order of memory, with more it is
    // channels-last memory of so many channels.
    int64_t channels;
};

// One call of the step. Tensors like the samples share one dense layout of batch × inner elements; pointers may be null
// where the row has no coefficient for them.
struct StepArgs {
    int64_t batch;
    int64_t inner;         // elements a sample
    int64_t model_stride;  // elements from sample to sample in model_output, uncond and variance (>= inner)
    const void* sample;
    const void* model_output;
    const void* uncond;
    const void* variance;
    const void* noise;
    void* history[kRegisters];  // written only by `scatter`
    const void* table;          // [num_rows, 32], compute dtype
    int64_t num_rows;
    int64_t row;              // of all samples, where `rows` is null
    const int64_t* rows;      // [1] or [batch]; a sample whose row is not in the table stays as it is
    int64_t rows_stride;      // 0 or 1
    const void* guidance;     // [1] or [batch], compute dtype
    const void* threshold;    // [batch], compute dtype
    int64_t guidance_stride;  // 0 or 1
    NoiseArgs draw;           // instead of `noise`
    void* outputs[kMaxOutputs];
    int num_outputs;
    bool scatter;       // the kept tensors go to the registers that each sample's row names, not to outputs[1] and [2]
    void* model_input;  // scale · prev_sample, `model_input_copies` times, each batch × inner after the other
    int model_input_copies;
    DType model_input_dtype;
    Variance variance_kind;
    DType dtype;        // of the samples, and unless `mixed` of all tensors like them
    bool mixed;         // tensors like the samples are stored as `types` says
    bool wide;          // the compute dtype is float64, which one of them has
    StreamTypes types;  // filled in where `mixed`
};

// A run of normal numbers: out[b, i] for a contiguous batch × inner.
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

// A float as its bits, and back.
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

// d = p·x + q·m, without a term whose weight is 0: 0·∞ and 0·NaN are NaN.
template <typename C>
FASTDIFF_INLINE C predict(C p, C q, C sample, C output) {
    const C of_sample = p != C(0) ? p * sample : C(0);
    return q != C(0) ? multiply_add(q, output, of_sample) : of_sample;
}

// Clamp to ±bound. Comparisons rather than fmin and fmax, which would turn NaN into a number; the upper bound last, so
// that a negative one is the result, as torch.clamp has it.
template <typename C>
FASTDIFF_INLINE C clamp_to(C value, C bound) {
    value = value < -bound ? -bound : value;
    return value > bound ? bound : value;
}

// The learned standard deviation that multiplies the noise.
template <typename C>
FASTDIFF_INLINE C learned_std(C v, C offset, C slope, Variance kind) {
    return kind == Variance::kLearnedRange ? exponential(multiply_add(slope, v, offset)) : square_root(v);
}

}  // namespace fastdiff
