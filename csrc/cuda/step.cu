// SPDX-License-Identifier: MIT
// The fused step on CUDA: the choice of its kernel, and the kernel for tensors with dtypes of their own.
#include "step_cuda.h"
#include "step_launches.h"
#include "step_parts.h"

namespace fastdiff {
namespace {

// Copy a skipped sample with different dtypes of sample and output.
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

// The step of tensors with dtypes of their own: all are fetched as bits before the first is converted. Vectors fill
// their samples: a tail would need code for each dtype.
template <typename C, int V, bool kMasked>
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
    const int maps = maps_of(args, kMasked), outputs = outputs_of(args, kMasked);
    const StreamTypes& types = args.types;

    bool present[kColumns] = {};
    present[kSample] = present[kModelOutput] = present[kPrediction] = true;
    const bool drawn = draws(args);
    present[kNoise] = drawn ? row_reads(row, maps, int{kNoise}) : args.noise != nullptr;
    const bool learned = present[kNoise] && args.variance_kind != Variance::kFixed;
    Bits<C, V> sample, output, history[kRegisters] = {}, noise = {}, other = {}, scale = {}, share = {};
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
    if (kMasked) share = fetch<C, V>(types.mask, args.mask, here);

    C terms[kColumns][V], uncond[V], variance[V], mask[V];
    numbers_of(types.sample, sample, terms[kSample]);
    numbers_of(types.model_output, output, terms[kModelOutput]);
    numbers_of(types.uncond, other, uncond);
#pragma unroll
    for (int j = 0; j < kRegisters; ++j) numbers_of(types.history[j], history[j], terms[kHistory0 + j]);
    numbers_of(types.noise, noise, terms[kNoise]);
    numbers_of(types.variance, scale, variance);
    if (kMasked) numbers_of(types.mask, share, mask);
    if (drawn && present[kNoise]) draw_normals(args.draw, args.inner, b, at, terms[kNoise]);
    prepare(args, row, b, learned, terms, uncond, variance);

#pragma unroll
    for (int o = 0; o < kMaxOutputs; ++o) {
        if (o >= outputs) break;
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
        if (kMasked && o == 0) blend_with_target(row, present, terms, mask, sum);
        store_as(dtype, sum, target, here, V);
        if (o > 0 || args.model_input == nullptr) continue;
        round_as(dtype, sum);
        write_model_input(args, row[kModelInputScale], sum, here, V);
    }
}

template <typename C>
void launch_mixed(const StepArgs& args, Launches& launches) {
    // 16 bytes of the widest dtype; with C float 16 bytes of a half type.
    constexpr int kVec = sizeof(C) == 8 ? 2 : 8;
    const bool wide = args.inner % kVec == 0 && vectorizable(args, kVec);
    const int64_t vecs_per_sample = wide ? args.inner / kVec : args.inner;
    const bool masked = args.mask != nullptr;
    const auto kernel = wide ? (masked ? mixed_kernel<C, kVec, true> : mixed_kernel<C, kVec, false>)
                             : (masked ? mixed_kernel<C, 1, true> : mixed_kernel<C, 1, false>);
    const int threads =
        draws(args) || args.model_input != nullptr || masked ? launches.config.draw : launches.config.step;
    launches.run(kernel, blocks_of_threads(args.batch * vecs_per_sample, threads), threads, args, vecs_per_sample);
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
            launch_step_f16(args, launches);
            break;
        case DType::kBFloat16:
            launch_step_bf16(args, launches);
            break;
        case DType::kFloat32:
            launch_step_f32(args, launches);
            break;
        case DType::kFloat64:
            launch_step_f64(args, launches);
            break;
    }
    return launches.finish();
}

// Defined here for all of csrc/cuda.
CudaConfig cuda_config(int device) { return config_of(device); }
bool set_cuda_config(const CudaConfig* config) { return override_config(config); }

}  // namespace fastdiff
