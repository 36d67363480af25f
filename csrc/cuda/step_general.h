// SPDX-License-Identifier: MIT
// The step of any form with tensors of one dtype: each thread takes 16 bytes of every tensor and issues all loads
// before the first store.
//
// The row is read from device memory, where all threads of a warp read the same word. Its coefficients are no kernel
// arguments, so a captured graph reads the table as it is at replay.
#pragma once

#include "step_parts.h"

namespace fastdiff {
namespace {

// Copy a skipped sample bit for bit, NaN payloads included.
template <typename T, typename C, int V, bool kNoiseOrModelInput>
__device__ __forceinline__ void copy_skipped(const StepArgs& args, int64_t here, int count) {
    const bool writes_input = kNoiseOrModelInput && args.model_input != nullptr;
    if (args.outputs[0] == args.sample && !writes_input) return;
    const Vec<T, V> sample = load_vec<T, V>(args.sample, here, count);
    if (args.outputs[0] != args.sample) store_vec(sample, args.outputs[0], here, count);
    if (writes_input) write_model_input(args, C(1), sample, here, count);
}

// kNoiseOrModelInput: noise may be drawn from seeds, and a model input written. A separate kernel, so that these take
// no registers of other steps. The bound is one block per multiprocessor: for two blocks of the largest size ptxas
// would spill. kMasked: a mask blends prev_sample.
template <typename T, typename C, int V, bool kNoiseOrModelInput, bool kMasked>
__global__ void __launch_bounds__(kMostThreads, 1) step_kernel(const StepArgs args, int64_t vecs_per_sample) {
    const int64_t vec = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    const int64_t b = vec / vecs_per_sample;
    if (b >= args.batch) return;
    const int64_t at = (vec - b * vecs_per_sample) * V;
    const int64_t left = args.inner - at;
    const int count = left < V ? static_cast<int>(left) : V;
    // Equal to b · inner + at, since vectors of more than one element fill their samples. In this form stores stay 16
    // bytes wide.
    const int64_t here = vec * V;
    const int64_t there = b * args.model_stride + at;
    const C* __restrict__ row = row_of<C>(args, b);
    if (row == nullptr) {
        copy_skipped<T, C, V, kNoiseOrModelInput>(args, here, count);
        return;
    }
    const int maps = maps_of(args, kMasked), outputs = outputs_of(args, kMasked);

    C terms[kColumns][V];
    bool present[kColumns] = {};
    C uncond[V], variance[V], mask[V];
    load<T>(args.sample, here, count, terms[kSample]);
    load<T>(args.model_output, there, count, terms[kModelOutput]);
    present[kSample] = present[kModelOutput] = present[kPrediction] = true;
    if (args.uncond != nullptr) load<T>(args.uncond, there, count, uncond);
#pragma unroll
    for (int j = 0; j < kRegisters; ++j) {
        // With one row per sample all solvers share the history slots, and most rows read few of them.
        present[kHistory0 + j] =
            args.history[j] != nullptr && (!args.scatter || row_reads(row, maps, int{kHistory0} + j));
        if (present[kHistory0 + j]) load<T>(args.history[j], here, count, terms[kHistory0 + j]);
    }
    const bool drawn = kNoiseOrModelInput && draws(args);
    present[kNoise] = drawn ? row_reads(row, maps, int{kNoise}) : args.noise != nullptr;
    const bool learned = present[kNoise] && args.variance_kind != Variance::kFixed;
    if (!drawn && present[kNoise]) load<T>(args.noise, here, count, terms[kNoise]);
    if (learned) load<T>(args.variance, there, count, variance);
    if (kMasked) load<T>(args.mask, here, count, mask);
    // After the loads, so that drawing overlaps with them.
    if (drawn && present[kNoise]) draw_normals(args.draw, args.inner, b, at, terms[kNoise]);

    prepare(args, row, b, learned, terms, uncond, variance);
#pragma unroll
    for (int o = 0; o < kMaxOutputs; ++o) {
        if (o >= outputs) break;
        void* const target = target_of(args, row, o);
        if (target == nullptr) continue;
        C sum[V];
        weighted_sum(row, o, present, terms, sum);
        if (kMasked && o == 0) blend_with_target(row, present, terms, mask, sum);
        const Vec<T, V> result = narrow_vec<T>(sum);
        store_vec(result, target, here, count);
        if (kNoiseOrModelInput && o == 0 && args.model_input != nullptr)
            write_model_input(args, row[kModelInputScale], result, here, count);
    }
}
template <typename T, typename C, int V>
void launch_vecs(const StepArgs& args, Launches& launches) {
    const int64_t vecs_per_sample = (args.inner + V - 1) / V;
    const bool more = draws(args) || args.model_input != nullptr || args.mask != nullptr;
    const auto kernel = args.mask != nullptr ? step_kernel<T, C, V, true, true>
                        : more               ? step_kernel<T, C, V, true, false>
                                             : step_kernel<T, C, V, false, false>;
    const int threads = more ? launches.config.draw : launches.config.step;
    launches.run(kernel, blocks_of_threads(args.batch * vecs_per_sample, threads), threads, args, vecs_per_sample);
}

template <typename T, typename C>
void launch_general(const StepArgs& args, Launches& launches) {
    constexpr int kVec = 16 / sizeof(T);
    if (vectorizable(args, kVec))
        launch_vecs<T, C, kVec>(args, launches);
    else
        launch_vecs<T, C, 1>(args, launches);
}

}  // namespace
}  // namespace fastdiff
