// SPDX-License-Identifier: MIT
// The fused step on CUDA: each thread takes 16 bytes of every tensor and issues all loads before the first store.
//
// The row is read from device memory, where all threads of a warp read the same word. Its coefficients are no kernel
// arguments, so a captured graph reads the table as it is at replay.
#include "access.h"
#include "draw.h"
#include "step_cuda.h"
#include "stored.h"

#include <initializer_list>

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

// Copy a skipped sample bit for bit, NaN payloads included.
template <typename T, typename C, int V, bool kNoiseOrModelInput>
__device__ __forceinline__ void copy_skipped(const StepArgs& args, int64_t here, int count) {
    const bool writes_input = kNoiseOrModelInput && args.model_input != nullptr;
    if (args.outputs[0] == args.sample && !writes_input) return;
    const Vec<T, V> sample = load_vec<T, V>(args.sample, here, count);
    if (args.outputs[0] != args.sample) store_vec(sample, args.outputs[0], here, count);
    if (writes_input) write_model_input(args, C(1), sample, here, count);
}

// The same with different dtypes of sample and output.
template <typename C, int V>
__device__ __forceinline__ void copy_skipped_mixed(const StepArgs& args, int64_t here) {
    const DType from = args.types.sample, to = args.types.outputs[0];
    C sample[V];
    numbers_of(from, fetch<C, V>(from, args.sample, here), sample);
    // With one dtype the numbers are unchanged, except for NaN payloads.
    if (args.outputs[0] != args.sample) store_as(to, sample, args.outputs[0], here, V);
    if (args.model_input == nullptr) return;
    round_as(to, sample);
    write_model_input(args, C(1), sample, here, V);
}

// Return true if the step draws noise.
FASTDIFF_INLINE bool draws(const StepArgs& args) { return args.noise == nullptr && args.draw.seeds != nullptr; }

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

// kNoiseOrModelInput: noise may be drawn from seeds, and a model input written. A separate kernel, so that these take
// no registers of other steps. The bound is one block per multiprocessor: for two blocks of the largest size ptxas
// would spill.
template <typename T, typename C, int V, bool kNoiseOrModelInput>
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
    const int maps = args.scatter ? int{kMaxOutputs} : args.num_outputs;

    C terms[kColumns][V];
    bool present[kColumns] = {};
    C uncond[V], variance[V];
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
    // After the loads, so that drawing overlaps with them.
    if (drawn && present[kNoise]) draw_normals(args.draw, args.inner, b, at, terms[kNoise]);

    prepare(args, row, b, learned, terms, uncond, variance);
#pragma unroll
    for (int o = 0; o < kMaxOutputs; ++o) {
        if (o >= maps) break;
        void* const target = target_of(args, row, o);
        if (target == nullptr) continue;
        C sum[V];
        weighted_sum(row, o, present, terms, sum);
        Vec<T, V> result;
#pragma unroll
        for (int i = 0; i < V; ++i) narrow(sum[i], &result.values[i]);
        store_vec(result, target, here, count);
        if (kNoiseOrModelInput && o == 0 && args.model_input != nullptr)
            write_model_input(args, row[kModelInputScale], result, here, count);
    }
}
static_assert(int{kKeep0} == int{kPrevSample} + int{kColumns} && int{kKeep1} == int{kKeep0} + int{kColumns},
              "the maps of a row follow one another");

// The step of tensors with dtypes of their own: all are fetched as bits before the first is converted. Vectors fill
// their samples: a tail would need code for each dtype.
template <typename C, int V>
__global__ void __launch_bounds__(kMostThreads, 1) mixed_kernel(const StepArgs args, int64_t vecs_per_sample) {
    const int64_t vec = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    const int64_t b = vec / vecs_per_sample;
    if (b >= args.batch) return;
    const int64_t at = (vec - b * vecs_per_sample) * V;
    const int64_t here = vec * V;
    const int64_t there = b * args.model_stride + at;
    const C* __restrict__ row = row_of<C>(args, b);
    if (row == nullptr) {
        copy_skipped_mixed<C, V>(args, here);
        return;
    }
    const int maps = args.scatter ? int{kMaxOutputs} : args.num_outputs;
    const StreamTypes& types = args.types;

    bool present[kColumns] = {};
    present[kSample] = present[kModelOutput] = present[kPrediction] = true;
    const bool drawn = draws(args);
    present[kNoise] = drawn ? row_reads(row, maps, int{kNoise}) : args.noise != nullptr;
    const bool learned = present[kNoise] && args.variance_kind != Variance::kFixed;
    Bits<C, V> sample, output, history[kRegisters] = {}, noise = {}, other = {}, scale = {};
    sample = fetch<C, V>(types.sample, args.sample, here);
    output = fetch<C, V>(types.model_output, args.model_output, there);
    if (args.uncond != nullptr) other = fetch<C, V>(types.uncond, args.uncond, there);
#pragma unroll
    for (int j = 0; j < kRegisters; ++j) {
        present[kHistory0 + j] =
            args.history[j] != nullptr && (!args.scatter || row_reads(row, maps, int{kHistory0} + j));
        if (present[kHistory0 + j]) history[j] = fetch<C, V>(types.history[j], args.history[j], here);
    }
    if (!drawn && present[kNoise]) noise = fetch<C, V>(types.noise, args.noise, here);
    if (learned) scale = fetch<C, V>(types.variance, args.variance, there);

    C terms[kColumns][V], uncond[V], variance[V];
    numbers_of(types.sample, sample, terms[kSample]);
    numbers_of(types.model_output, output, terms[kModelOutput]);
    numbers_of(types.uncond, other, uncond);
#pragma unroll
    for (int j = 0; j < kRegisters; ++j) numbers_of(types.history[j], history[j], terms[kHistory0 + j]);
    numbers_of(types.noise, noise, terms[kNoise]);
    numbers_of(types.variance, scale, variance);
    if (drawn && present[kNoise]) draw_normals(args.draw, args.inner, b, at, terms[kNoise]);
    prepare(args, row, b, learned, terms, uncond, variance);

#pragma unroll
    for (int o = 0; o < kMaxOutputs; ++o) {
        if (o >= maps) break;
        DType dtype = types.outputs[o];
        void* const target = target_of(args, row, o);
        if (target == nullptr) continue;
        if (o > 0 && args.scatter) {
#pragma unroll
            for (int j = 0; j < kRegisters; ++j)
                if (target == args.history[j]) dtype = types.history[j];
        }
        C sum[V];
        weighted_sum(row, o, present, terms, sum);
        store_as(dtype, sum, target, here, V);
        if (o > 0 || args.model_input == nullptr) continue;
        round_as(dtype, sum);
        write_model_input(args, row[kModelInputScale], sum, here, V);
    }
}

// Return true if every access of `elements` elements is aligned to 16 bytes.
bool vectorizable(const StepArgs& args, int elements) {
    if (args.batch > 1 && (args.inner % elements != 0 || args.model_stride % elements != 0)) return false;
    for (const void* pointer : {args.sample, args.model_output, args.uncond, args.variance, args.noise})
        if (!aligned(pointer)) return false;
    for (const void* pointer : args.history)
        if (!aligned(pointer)) return false;
    for (int o = 0; o < args.num_outputs; ++o)
        if (!aligned(args.outputs[o])) return false;
    // A second copy begins at the end of the first.
    return aligned(args.model_input) && (args.model_input_copies < 2 || args.inner % elements == 0);
}

template <typename T, typename C, int V>
void launch_vecs(const StepArgs& args, Launches& launches) {
    const int64_t vecs_per_sample = (args.inner + V - 1) / V;
    const bool more = draws(args) || args.model_input != nullptr;
    const auto kernel = more ? step_kernel<T, C, V, true> : step_kernel<T, C, V, false>;
    const int threads = more ? launches.config.draw : launches.config.step;
    launches.run(kernel, blocks_of_threads(args.batch * vecs_per_sample, threads), threads, args, vecs_per_sample);
}

template <typename C>
void launch_mixed(const StepArgs& args, Launches& launches) {
    // 16 bytes of the widest dtype; with C float 16 bytes of a half type.
    constexpr int kVec = sizeof(C) == 8 ? 2 : 8;
    const bool wide = args.inner % kVec == 0 && vectorizable(args, kVec);
    const int64_t vecs_per_sample = wide ? args.inner / kVec : args.inner;
    const auto kernel = wide ? mixed_kernel<C, kVec> : mixed_kernel<C, 1>;
    const int threads = draws(args) || args.model_input != nullptr ? launches.config.draw : launches.config.step;
    launches.run(kernel, blocks_of_threads(args.batch * vecs_per_sample, threads), threads, args, vecs_per_sample);
}

template <typename T, typename C>
void launch_as(const StepArgs& args, Launches& launches) {
    constexpr int kVec = 16 / sizeof(T);
    if (vectorizable(args, kVec))
        launch_vecs<T, C, kVec>(args, launches);
    else
        launch_vecs<T, C, 1>(args, launches);
}

}  // namespace

const char* launch_step(const StepArgs& args, int device, void* stream) {
    Launches launches(device, stream);
    if (args.mixed) {
        args.wide ? launch_mixed<double>(args, launches) : launch_mixed<float>(args, launches);
        return launches.finish();
    }
    switch (args.dtype) {
        case DType::kFloat16:
            launch_as<__half, float>(args, launches);
            break;
        case DType::kBFloat16:
            launch_as<__nv_bfloat16, float>(args, launches);
            break;
        case DType::kFloat32:
            launch_as<float, float>(args, launches);
            break;
        case DType::kFloat64:
            launch_as<double, double>(args, launches);
            break;
    }
    return launches.finish();
}

// Defined here for all of csrc/cuda.
CudaConfig cuda_config(int device) { return config_of(device); }
bool set_cuda_config(const CudaConfig* config) { return override_config(config); }

}  // namespace fastdiff
