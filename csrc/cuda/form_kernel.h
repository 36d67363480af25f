// SPDX-License-Identifier: MIT
// The step of one form (step_form.h): each thread takes 16 bytes of every tensor of the form, and of the row what the
// form reads. No load depends on another but those of a row whose index is in memory.
//
// The grid is (blocks within a sample) × (samples), so no thread divides.
#pragma once

#include "access.h"
#include "draw.h"
#include "step_form.h"

namespace fastdiff {
namespace {

// Arguments of a form. Its history tensors come first, whatever their slots; absent tensors are null.
template <typename C>
struct FormArgs {
    uint32_t batch;
    uint32_t inner;
    uint32_t model_stride;
    int model_input_copies;
    const void* sample;
    const void* model_output;
    const void* uncond;
    const void* noise;
    void* history[kRegisters];
    int slots[kRegisters];  // the history slot of each
    void* outputs[kMaxOutputs];
    void* model_input;
    const C* table;  // with RowSource::kByValue the row
    int64_t num_rows;
    const int64_t* rows;
    const C* guidance;
    uint32_t rows_stride, guidance_stride;
    C guidance_value;
    NoiseArgs draw;
};

// Move V elements, which are there, by one access.
template <typename T, int V>
__device__ __forceinline__ Vec<T, V> load_whole(const void* from, uint64_t offset) {
    return *reinterpret_cast<const Vec<T, V>*>(static_cast<const T*>(from) + offset);
}

template <typename T, int V>
__device__ __forceinline__ void store_whole(const Vec<T, V>& vec, void* to, uint64_t offset) {
    *reinterpret_cast<Vec<T, V>*>(static_cast<T*>(to) + offset) = vec;
}

// Load N scalars of a row by accesses of 16 bytes.
template <typename C, int N>
__device__ __forceinline__ void load_scalars(const C* from, C (&to)[N]) {
    constexpr int kPart = 16 / static_cast<int>(sizeof(C));
    static_assert(N % kPart == 0, "whole accesses");
#pragma unroll
    for (int i = 0; i < N; i += kPart) {
        const auto part = *reinterpret_cast<const Vec<C, kPart>*>(from + i);
#pragma unroll
        for (int j = 0; j < kPart; ++j) to[i + j] = part.values[j];
    }
}

// clamp_to for a finite bound and a value of which only sums are stored. A minimum and a maximum that keep NaN give the
// same numbers by two instructions instead of four, but another NaN, and a sum's NaN does not depend on its terms'.
__device__ __forceinline__ float clamp_term(float value, float bound) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    float result;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(value), "f"(-bound));
    asm("min.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(result), "f"(bound));
    return result;
#else
    return clamp_to(value, bound);
#endif
}
__device__ __forceinline__ double clamp_term(double value, double bound) { return clamp_to(value, bound); }

// Add weight · term, unless the weight is 0: 0·∞ and 0·NaN are NaN.
template <typename C, int V>
__device__ __forceinline__ void add_term(C weight, const C (&term)[V], C (&sum)[V]) {
    if (weight == C(0)) return;
#pragma unroll
    for (int i = 0; i < V; ++i) sum[i] = multiply_add(weight, term[i], sum[i]);
}

template <typename T, typename C, int V, int kKey>
__global__ void __launch_bounds__(kFormThreads, form_of_key(kKey).resident_blocks())
    form_kernel(const FormArgs<C> args) {
    constexpr StepForm kForm = form_of_key(kKey);
    constexpr bool kGuided = kForm.guided, kByIndex = kForm.row == RowSource::kByIndex;
    constexpr bool kGiven = kForm.noise == NoiseSource::kGiven, kDrawn = kForm.noise == NoiseSource::kDrawn;
    constexpr int kHistories = kForm.histories, kOutputs = kForm.outputs;

    const uint32_t b = blockIdx.y + gridDim.y * blockIdx.z;
    const uint32_t at = (blockIdx.x * blockDim.x + threadIdx.x) * V;
    if (at >= args.inner || b >= args.batch) return;
    const uint64_t here = static_cast<uint64_t>(b) * args.inner + at;
    const uint64_t there = static_cast<uint64_t>(b) * args.model_stride + at;

    const C* __restrict__ row = args.table;
    bool skipped = false;
    if (kByIndex) {
        // A skipped sample reads row 0 and does not use it: a branch would hold back the loads below.
        const int64_t index = args.rows[b * args.rows_stride];
        skipped = index < 0 || index >= args.num_rows;
        row += (skipped ? 0 : index) * int{kRowWidth};
    }
    const Vec<T, V> sample = load_whole<T, V>(args.sample, here);
    const Vec<T, V> output = load_whole<T, V>(args.model_output, there);
    Vec<T, V> uncond, noise, history[kHistories + 1];
    if (kGuided) uncond = load_whole<T, V>(args.uncond, there);
#pragma unroll
    for (int k = 0; k < kHistories; ++k) history[k] = load_whole<T, V>(args.history[k], here);
    if (kGiven) noise = load_whole<T, V>(args.noise, here);
    C scale = args.guidance_value;
    if (kGuided && args.guidance != nullptr) scale = args.guidance[b * args.guidance_stride];
    NoiseKey key;
    if (kDrawn) key = noise_key_here(args.draw, b);

    C head[4], weights[kOutputs][4], of_history[kOutputs][kHistories + 1], of_noise[kOutputs];
    load_scalars(row, head);
#pragma unroll
    for (int o = 0; o < kOutputs; ++o) {
        const C* map = row + int{kPrevSample} + o * int{kColumns};
        load_scalars(map, weights[o]);
#pragma unroll
        for (int k = 0; k < kHistories; ++k) of_history[o][k] = map[int{kHistory0} + args.slots[k]];
        if (kGiven || kDrawn) of_noise[o] = map[int{kNoise}];
    }
    const bool writes_input = args.model_input != nullptr;
    C input_scale = C(1);
    if (writes_input) input_scale = row[int{kModelInputScale}];
    C store[2];
    if (kByIndex && kOutputs > 1) store[0] = row[int{kStore0}], store[1] = row[int{kStore1}];

    C z[V];
    if (kGiven) widen_vec(noise, z);
    if (kDrawn) {
        bool reads = false;
#pragma unroll
        for (int o = 0; o < kOutputs; ++o) reads = reads || of_noise[o] != C(0);
        if (reads) draw_in_order(key, at, z);
    }
    C x[V], m[V], d[V];
    widen_vec(sample, x);
    widen_vec(output, m);
    if (kGuided) {
        C u[V];
        widen_vec(uncond, u);
#pragma unroll
        for (int i = 0; i < V; ++i) m[i] = guide(m[i], u[i], scale);
    }
    const C p = head[kPredictionSample], q = head[kPredictionOutput], clip = head[kClip];
#pragma unroll
    for (int i = 0; i < V; ++i) d[i] = predict(p, q, x[i], m[i]);
    if (clip < C(INFINITY)) {
#pragma unroll
        for (int i = 0; i < V; ++i) d[i] = clamp_term(d[i], clip);
    }
#pragma unroll
    for (int o = 0; o < kOutputs; ++o) {
        void* target = args.outputs[o];
        if (kByIndex && o > 0) {
            target = nullptr;
#pragma unroll
            for (int k = 0; k < kHistories; ++k)
                if (store[o - 1] == static_cast<C>(args.slots[k])) target = args.history[k];
            if (skipped || target == nullptr) continue;
        }
        C sum[V];
#pragma unroll
        for (int i = 0; i < V; ++i) sum[i] = C(0);
        add_term(weights[o][kSample], x, sum);
        add_term(weights[o][kModelOutput], m, sum);
        add_term(weights[o][kPrediction], d, sum);
#pragma unroll
        for (int k = 0; k < kHistories; ++k) {
            C h[V];
            widen_vec(history[k], h);
            add_term(of_history[o][k], h, sum);
        }
        if (kGiven || kDrawn) add_term(of_noise[o], z, sum);
        Vec<T, V> result = narrow_vec<T>(sum);
        if (kByIndex && o == 0 && skipped) {
            result = sample;  // bit for bit, NaN payloads included
            input_scale = C(1);
        }
        store_whole(result, target, here);
        if (o > 0 || !writes_input) continue;
        widen_vec(result, sum);
#pragma unroll
        for (int i = 0; i < V; ++i) sum[i] = input_scale * sum[i];
        const Vec<T, V> input = narrow_vec<T>(sum);
        store_whole(input, args.model_input, here);
        if (args.model_input_copies > 1)
            store_whole(input, args.model_input, static_cast<uint64_t>(args.batch) * args.inner + here);
    }
}

}  // namespace
}  // namespace fastdiff
