// SPDX-License-Identifier: MIT
// Parts of the kernels that take any step: its row, the terms of the sums, the next model input.
#pragma once

#include "access.h"
#include "draw.h"
#include "step_form.h"
#include "stored.h"

namespace fastdiff {
namespace {

// Return the sample's row; null for a skipped sample.
template <typename C>
__device__ __forceinline__ const C* row_of(const StepArgs& args, int64_t b) {
    const int64_t index = args.rows == nullptr ? args.row : args.rows[b * args.rows_stride];
    if (index < 0 || index >= args.num_rows) return nullptr;
    return static_cast<const C*>(args.table) + index * kRowWidth;
}

// Return the address of output `o`; null where it is not written.
template <typename C>
__device__ __forceinline__ void* target_of(const StepArgs& args, const C* row, int o) {
    if (o == 0) return args.outputs[0];
    if (!args.scatter) return o < args.num_outputs ? args.outputs[o] : nullptr;
    const C slot = row[static_cast<int>(kStore0) + o - 1];
    // Compare with each slot instead of indexing: indexing kernel arguments copies them to the stack.
    void* target = nullptr;
#pragma unroll
    for (int j = 0; j < kRegisters; ++j)
        if (slot == static_cast<C>(j)) target = args.history[j];
    return target;
}

// Return true if a map of this row has a coefficient in this column. Maps that are not written are 0, or cost one
// needless read.
template <typename C>
__device__ __forceinline__ bool row_reads(const C* row, int maps, int column) {
    bool reads = false;
#pragma unroll
    for (int o = 0; o < kMaxOutputs; ++o)
        reads =
            reads || (o < maps && row[static_cast<int>(kPrevSample) + o * static_cast<int>(kColumns) + column] != C(0));
    return reads;
}

// Write the next model input: scale times the sample as rounded to its dtype.
template <typename C, int V>
__device__ __forceinline__ void write_model_input(const StepArgs& args, C scale, C (&sample)[V], int64_t here,
                                                  int count) {
#pragma unroll
    for (int i = 0; i < V; ++i) sample[i] = scale * sample[i];
    for (int copy = 0; copy < args.model_input_copies; ++copy)
        store_as(args.model_input_dtype, sample, args.model_input, copy * args.batch * args.inner + here, count);
}

template <typename T, typename C, int V>
__device__ __forceinline__ void write_model_input(const StepArgs& args, C scale, const Vec<T, V>& sample, int64_t here,
                                                  int count) {
    C values[V];
    widen_vec(sample, values);
    write_model_input(args, scale, values, here, count);
}

// Compute the terms of the sums from the tensors: guidance, the prediction, and the scaled noise.
template <typename C, int V>
__device__ __forceinline__ void prepare(const StepArgs& args, const C* __restrict__ row, int64_t b, bool learned,
                                        C (&terms)[kColumns][V], const C (&uncond)[V], const C (&variance)[V]) {
    if (args.uncond != nullptr) {
        const C scale = args.guidance == nullptr ? static_cast<C>(args.guidance_value)
                                                 : static_cast<const C*>(args.guidance)[b * args.guidance_stride];
#pragma unroll
        for (int i = 0; i < V; ++i) terms[kModelOutput][i] = guide(terms[kModelOutput][i], uncond[i], scale);
    }
    const C p = row[kPredictionSample], q = row[kPredictionOutput], clip = row[kClip];
#pragma unroll
    for (int i = 0; i < V; ++i)
        terms[kPrediction][i] = clamp_to(predict(p, q, terms[kSample][i], terms[kModelOutput][i]), clip);
    if (args.threshold != nullptr) {
        const C threshold = static_cast<const C*>(args.threshold)[b];
#pragma unroll
        for (int i = 0; i < V; ++i) terms[kPrediction][i] = clamp_to(terms[kPrediction][i], threshold) / threshold;
    }
    if (learned) {
#pragma unroll
        for (int i = 0; i < V; ++i)
            terms[kNoise][i] *= learned_std(variance[i], row[kVarianceOffset], row[kVarianceSlope], args.variance_kind);
    }
}

// The maps of the row that a step computes, the target of a blend included, and those that are outputs.
__device__ __forceinline__ int maps_of(const StepArgs& args, bool masked) {
    return args.scatter || masked ? int{kMaxOutputs} : args.num_outputs;
}
__device__ __forceinline__ int outputs_of(const StepArgs& args, bool masked) {
    return !args.scatter ? args.num_outputs : masked ? kMaxOutputs - 1 : int{kMaxOutputs};
}

// Sum map `o` of the row.
template <typename C, int V>
__device__ __forceinline__ void weighted_sum(const C* __restrict__ row, int o, const bool (&present)[kColumns],
                                             const C (&terms)[kColumns][V], C (&sum)[V]) {
#pragma unroll
    for (int i = 0; i < V; ++i) sum[i] = C(0);
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
        const C weight = row[static_cast<int>(kPrevSample) + o * static_cast<int>(kColumns) + c];
        if (!present[c] || weight == C(0)) continue;
#pragma unroll
        for (int i = 0; i < V; ++i) sum[i] = multiply_add(weight, terms[c][i], sum[i]);
    }
}

// Blend prev_sample with its target, the last map of the row.
template <typename C, int V>
__device__ __forceinline__ void blend_with_target(const C* __restrict__ row, const bool (&present)[kColumns],
                                                  const C (&terms)[kColumns][V], const C (&mask)[V], C (&prev)[V]) {
    C target[V];
    weighted_sum(row, kMaxOutputs - 1, present, terms, target);
#pragma unroll
    for (int i = 0; i < V; ++i) prev[i] = blend(prev[i], target[i], mask[i]);
}

static_assert(int{kKeep0} == int{kPrevSample} + int{kColumns} && int{kKeep1} == int{kKeep0} + int{kColumns},
              "the maps of a row follow one another");

}  // namespace
}  // namespace fastdiff
