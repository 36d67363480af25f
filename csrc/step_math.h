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

// The layout of a row; fastdiff/table.py holds the same numbers.
enum RowLayout : int {
    kPredictionSample = 0,
    kPredictionOutput = 1,
    kClip = 2,
    kVarianceOffset = 3,
    kVarianceSlope = 4,
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

// One call of the step. Tensors of the samples' dtype share one dense layout of batch × inner elements;
// pointers may be null where the row has no coefficient for them.
struct StepArgs {
    int64_t batch;
    int64_t inner;         // elements a sample
    int64_t model_stride;  // elements from sample to sample in model_output, uncond and variance (>= inner)
    const void* sample;
    const void* model_output;
    const void* uncond;
    const void* variance;
    const void* noise;
    const void* history[kRegisters];
    const void* row;          // [32], compute dtype
    const void* guidance;     // [1] or [batch], compute dtype
    const void* threshold;    // [batch], compute dtype
    int64_t guidance_stride;  // 0 or 1
    void* outputs[kMaxOutputs];
    int num_outputs;
    Variance variance_kind;
    DType dtype;
};

FASTDIFF_INLINE float multiply_add(float a, float b, float c) { return fmaf(a, b, c); }
FASTDIFF_INLINE double multiply_add(double a, double b, double c) { return fma(a, b, c); }
FASTDIFF_INLINE float exponential(float x) { return expf(x); }
FASTDIFF_INLINE double exponential(double x) { return exp(x); }
FASTDIFF_INLINE float square_root(float x) { return sqrtf(x); }
FASTDIFF_INLINE double square_root(double x) { return sqrt(x); }

// m = u + g·(c − u)
template <typename C>
FASTDIFF_INLINE C guide(C cond, C uncond, C scale) {
    return multiply_add(scale, cond - uncond, uncond);
}

// d = p·x + q·m
template <typename C>
FASTDIFF_INLINE C predict(C p, C q, C sample, C output) {
    return multiply_add(q, output, p * sample);
}

// Clamp to ±bound. Comparisons rather than fmin and fmax, which would turn NaN into a number.
template <typename C>
FASTDIFF_INLINE C clamp_to(C value, C bound) {
    value = value > bound ? bound : value;
    return value < -bound ? -bound : value;
}

// The learned standard deviation that multiplies the noise.
template <typename C>
FASTDIFF_INLINE C learned_std(C v, C offset, C slope, Variance kind) {
    return kind == Variance::kLearnedRange ? exponential(multiply_add(slope, v, offset)) : square_root(v);
}

}  // namespace fastdiff
