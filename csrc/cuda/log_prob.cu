// SPDX-License-Identifier: MIT
// A step with its log-probability on CUDA. A warp takes a block of 1024 elements; thread t holds lanes t and t + 32 of
// the sum of squares. Each element is read, stepped and written once, and its distance from the mean goes to the sum.
#include "fold.h"
#include "log_prob_cuda.h"
#include "step_parts.h"

namespace fastdiff {
namespace {

constexpr int kWarpSize = 32;

// The dtype of a tensor like the samples; `own` is its entry in the types.
__device__ __forceinline__ DType stored_as(const StepArgs& args, DType own) { return args.mixed ? own : args.dtype; }

template <typename C>
__device__ __forceinline__ C number(DType dtype, const void* from, int64_t offset) {
    C value[1];
    numbers_of<C, 1>(dtype, fetch<C, 1>(dtype, from, offset), value);
    return value[0];
}

// Step element `at` of sample b and return its distance from the mean.
template <typename C>
__device__ __forceinline__ C step_element(const LogProbArgs& args, const C* __restrict__ row, int64_t b, int64_t at) {
    const StepArgs& step = args.step;
    const StreamTypes& types = step.types;
    const int64_t here = b * step.inner + at, there = b * step.model_stride + at;
    C terms[kColumns][1];
    bool present[kColumns] = {};
    C uncond[1] = {}, variance[1] = {};
    terms[kSample][0] = number<C>(stored_as(step, types.sample), step.sample, here);
    terms[kModelOutput][0] = number<C>(stored_as(step, types.model_output), step.model_output, there);
    present[kSample] = present[kModelOutput] = present[kPrediction] = true;
    if (step.uncond != nullptr) uncond[0] = number<C>(stored_as(step, types.uncond), step.uncond, there);
#pragma unroll
    for (int j = 0; j < kRegisters; ++j) {
        present[kHistory0 + j] = step.history[j] != nullptr;
        if (present[kHistory0 + j])
            terms[kHistory0 + j][0] = number<C>(stored_as(step, types.history[j]), step.history[j], here);
    }
    C given = C(0);
    if (step.noise != nullptr) given = number<C>(stored_as(step, types.noise), step.noise, here);
    prepare(step, row, b, false, terms, uncond, variance);
    C mean[1], prev[1];
    weighted_sum(row, 0, present, terms, mean);
    if (args.replay) return given - mean[0];

    terms[kNoise][0] = given;
    if (step.draw.seeds != nullptr) draw_normals(step.draw, step.inner, b, at, terms[kNoise]);
    present[kNoise] = true;
    const C weight = row[static_cast<int>(kPrevSample) + static_cast<int>(kNoise)];
    prev[0] = weight != C(0) ? multiply_add(weight, terms[kNoise][0], mean[0]) : mean[0];
#pragma unroll
    for (int o = 1; o < kMaxOutputs; ++o) {
        if (o >= step.num_outputs) break;
        C kept[1];
        weighted_sum(row, o, present, terms, kept);
        store_as(stored_as(step, types.outputs[o]), kept, step.outputs[o], here, 1);
    }
    const DType stored = stored_as(step, types.outputs[0]);
    store_as(stored, prev, step.outputs[0], here, 1);
    round_as(stored, prev);
    return prev[0] - mean[0];
}

template <typename C>
__device__ __forceinline__ void copy_element(const StepArgs& args, int64_t here) {
    C sample[1] = {number<C>(stored_as(args, args.types.sample), args.sample, here)};
    store_as(stored_as(args, args.types.outputs[0]), sample, args.outputs[0], here, 1);
}

template <typename C>
__global__ void __launch_bounds__(kMostThreads, 1) log_prob_kernel(const LogProbArgs args, int64_t blocks) {
    const int64_t block = static_cast<int64_t>(blockIdx.x) * (blockDim.x / kWarpSize) + threadIdx.x / kWarpSize;
    const bool there = block < args.step.batch * blocks;  // other warps only take part in shuffles
    const int thread = static_cast<int>(threadIdx.x % kWarpSize);
    const int64_t b = there ? block / blocks : 0, j = there ? block - b * blocks : 0;
    const C* __restrict__ row = there ? row_of<C>(args.step, b) : nullptr;
    const bool noisy = row != nullptr && row[static_cast<int>(kPrevSample) + static_cast<int>(kNoise)] != C(0);
    const int count = there ? static_cast<int>(elements_of(args.step.inner, j)) : 0;
    C lanes[2] = {C(0), C(0)};
#pragma unroll 1
    for (int at = thread; at < count; at += kWarpSize) {
        const int64_t element = j * kBlock + at;
        if (row == nullptr) {
            if (!args.replay) copy_element<C>(args.step, b * args.step.inner + element);
            continue;
        }
        const C apart = step_element(args, row, b, element);
        // Two lanes in turn, without an index that would put them into local memory.
        const bool second = (at / kWarpSize) % 2 != 0;
        const C sum = multiply_add(apart, apart, second ? lanes[1] : lanes[0]);
        lanes[0] = second ? lanes[0] : sum;
        lanes[1] = second ? sum : lanes[1];
    }
    const C squares = fold_warp(lanes[0], lanes[1]);
    if (there && thread == 0) static_cast<C*>(args.partials)[block] = noisy ? squares : C(0);
}

template <typename C>
__global__ void __launch_bounds__(kLanes) finish_log_prob_kernel(const LogProbArgs args, int64_t blocks) {
    __shared__ double lanes[kLanes];
    const C* sample = static_cast<const C*>(args.partials) + blockIdx.x * blocks;
    const double squares = fold_blocks(lanes, blocks, [&](int64_t j) { return static_cast<double>(sample[j]); });
    if (threadIdx.x != 0) return;
    const C* row = row_of<C>(args.step, blockIdx.x);
    const C weight = row == nullptr ? C(0) : row[static_cast<int>(kPrevSample) + static_cast<int>(kNoise)];
    static_cast<C*>(args.out)[blockIdx.x] =
        static_cast<C>(log_prob_of(squares, static_cast<double>(weight), args.step.inner, args.mean));
}

template <typename C>
void launch_as(const LogProbArgs& args, Launches& launches) {
    const int threads = launches.config.sum, warps = threads / kWarpSize;
    const int64_t blocks = blocks_of(args.step.inner);
    launches.run(log_prob_kernel<C>, (args.step.batch * blocks + warps - 1) / warps, threads, args, blocks);
    launches.run(finish_log_prob_kernel<C>, args.step.batch, kLanes, args, blocks);
}

}  // namespace

const char* launch_log_prob(const LogProbArgs& args, int device, void* stream) {
    Launches launches(device, stream);
    if (args.step.mixed ? args.step.wide : args.step.dtype == DType::kFloat64)
        launch_as<double>(args, launches);
    else
        launch_as<float>(args, launches);
    return launches.finish();
}

}  // namespace fastdiff
