// SPDX-License-Identifier: MIT
// The training loss and its gradient on CUDA. Sixteen threads take a block of 1024 elements, four consecutive elements
// a thread and round: a thread holds four lanes of the sum, reads 16 bytes of float32, and draws a whole chunk of
// noise.
#include "diffusion_loss_cuda.h"
#include "fold.h"
#include "step_parts.h"

namespace fastdiff {
namespace {

constexpr int kVec = 4, kGroup = kLanes / kVec;

// Load elements [0, count) of four. V is 4 where all four are there and aligned, else 1.
template <typename C, int V>
__device__ __forceinline__ void load_four(DType dtype, const void* from, int64_t offset, int count, C (&to)[kVec]) {
    if constexpr (V == kVec) {
        numbers_of<C, kVec>(dtype, fetch<C, kVec>(dtype, from, offset), to);
    } else {
#pragma unroll
        for (int i = 0; i < kVec; ++i) {
            C value[1] = {C(0)};
            if (i < count) numbers_of<C, 1>(dtype, fetch<C, 1>(dtype, from, offset + i), value);
            to[i] = value[0];
        }
    }
}

template <typename C, int V>
__device__ __forceinline__ void store_four(DType dtype, const C (&from)[kVec], void* to, int64_t offset, int count) {
    if constexpr (V == kVec) {
        store_as(dtype, from, to, offset, count);
    } else {
#pragma unroll
        for (int i = 0; i < kVec; ++i) {
            const C value[1] = {from[i]};
            if (i < count) store_as(dtype, value, to, offset + i, 1);
        }
    }
}

// The row's coefficients of the target; NaN for a skipped sample.
template <typename C>
struct Target {
    C of_sample, of_noise;

    __device__ __forceinline__ explicit Target(const C* row)
        : of_sample(row != nullptr ? row[kTargetSample] : static_cast<C>(NAN)),
          of_noise(row != nullptr ? row[kTargetNoise] : static_cast<C>(NAN)) {}
};

// Compute output − target of four elements from element `at` of sample b on.
template <typename C, int V>
__device__ __forceinline__ void residual_of(const StepArgs& step, const Target<C>& map, int64_t b, int64_t at,
                                            int count, C (&r)[kVec]) {
    const StreamTypes& types = step.types;
    const int64_t here = b * step.inner + at;
    C sample[kVec] = {}, noise[kVec] = {};
    load_four<C, V>(types.model_output, step.model_output, b * step.model_stride + at, count, r);
    const bool reads = map.of_sample != C(0), noisy = map.of_noise != C(0), drawn = step.draw.seeds != nullptr;
    if (reads) load_four<C, V>(types.sample, step.sample, here, count, sample);
    if (noisy && !drawn) load_four<C, V>(types.noise, step.noise, here, count, noise);
    // After the loads, so that drawing overlaps with them.
    if (noisy && drawn) draw_normals(step.draw, step.inner, b, at, noise);
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
        C target = reads ? multiply_add(map.of_sample, sample[i], C(0)) : C(0);
        target = noisy ? multiply_add(map.of_noise, noise[i], target) : target;
        r[i] = r[i] - target;
    }
}

template <typename C>
__device__ __forceinline__ C add_loss(Loss loss, C lane, C r, C c, C square) {
    if (loss == Loss::kL2) return multiply_add(r, r, lane);
    return lane + (loss == Loss::kL1 ? magnitude(r) : pseudo_huber(r, c, square));
}

template <typename C>
__device__ __forceinline__ C slope_at(Loss loss, C r, C square) {
    if (loss == Loss::kL2) return slope_of<Loss::kL2>(r, square);
    return loss == Loss::kL1 ? slope_of<Loss::kL1>(r, square) : slope_of<Loss::kHuber>(r, square);
}

// The place of a group of threads: a block of a sample.
struct Place {
    bool there;  // other groups only take part in shuffles
    int64_t block, b, first;
    int thread, count;

    __device__ __forceinline__ Place(const StepArgs& step, int64_t blocks) {
        block = static_cast<int64_t>(blockIdx.x) * (blockDim.x / kGroup) + threadIdx.x / kGroup;
        there = block < step.batch * blocks;
        thread = static_cast<int>(threadIdx.x % kGroup);
        b = there ? block / blocks : 0;
        const int64_t j = there ? block - b * blocks : 0;
        first = j * kBlock;
        count = there ? static_cast<int>(elements_of(step.inner, j)) : 0;
    }
};

__device__ __forceinline__ int at_most_four(int left) { return left < kVec ? left : kVec; }

template <typename C, int V>
__global__ void __launch_bounds__(kMostThreads, 1) diffusion_loss_kernel(const LossArgs args, int64_t blocks) {
    const Place place(args.step, blocks);
    const Target<C> map(place.there ? row_of<C>(args.step, place.b) : nullptr);
    const C c = static_cast<C>(args.c), square = static_cast<C>(args.c * args.c);
    C lanes[kVec] = {};
#pragma unroll 1
    for (int at = kVec * place.thread; at < place.count; at += kLanes) {
        const int count = at_most_four(place.count - at);
        C r[kVec];
        residual_of<C, V>(args.step, map, place.b, place.first + at, count, r);
#pragma unroll
        for (int i = 0; i < kVec; ++i)
            if (i < count) lanes[i] = add_loss(args.loss, lanes[i], r[i], c, square);
    }
    // Thread t holds lanes 4t to 4t + 3.
#pragma unroll
    for (int apart = kGroup / 2; apart > 0; apart /= 2) {
#pragma unroll
        for (int i = 0; i < kVec; ++i) lanes[i] += __shfl_xor_sync(0xffffffffu, lanes[i], apart);
    }
    const C sum = (lanes[0] + lanes[2]) + (lanes[1] + lanes[3]);
    if (place.there && place.thread == 0) static_cast<C*>(args.partials)[place.block] = sum;
}

template <typename C, int V>
__global__ void __launch_bounds__(kMostThreads, 1) diffusion_loss_gradient_kernel(const LossArgs args, int64_t blocks) {
    const StepArgs& step = args.step;
    const Place place(step, blocks);
    if (!place.there) return;
    const C* __restrict__ row = row_of<C>(step, place.b);
    const Target<C> map(row);
    const C factor = static_cast<const C*>(args.factor)[place.b], square = static_cast<C>(args.c * args.c);
    // The gradients of x0 and noise of a skipped sample are NaN like its output's.
    const C weights[] = {row != nullptr ? -map.of_sample : C(0), row != nullptr ? -map.of_noise : C(0)};
#pragma unroll 1
    for (int at = kVec * place.thread; at < place.count; at += kLanes) {
        const int count = at_most_four(place.count - at);
        const int64_t here = place.b * step.inner + place.first + at;
        C r[kVec];
        residual_of<C, V>(step, map, place.b, place.first + at, count, r);
#pragma unroll
        for (int i = 0; i < kVec; ++i) r[i] = factor * slope_at(args.loss, r[i], square);
        if (step.outputs[0] != nullptr)
            store_four<C, V>(step.types.model_output, r, step.outputs[0],
                             place.b * step.model_stride + place.first + at, count);
#pragma unroll
        for (int o = 0; o < 2; ++o) {
            if (step.outputs[1 + o] == nullptr) continue;
            C scaled[kVec];
#pragma unroll
            for (int i = 0; i < kVec; ++i) scaled[i] = weights[o] * r[i];
            store_four<C, V>(o == 0 ? step.types.sample : step.types.noise, scaled, step.outputs[1 + o], here, count);
        }
    }
}

template <typename C>
__global__ void __launch_bounds__(kLanes) finish_diffusion_loss_kernel(const LossArgs args, int64_t blocks) {
    __shared__ double lanes[kLanes];
    const C* sample = static_cast<const C*>(args.partials) + blockIdx.x * blocks;
    const double total = fold_blocks(lanes, blocks, [&](int64_t j) { return static_cast<double>(sample[j]); });
    if (threadIdx.x == 0) static_cast<C*>(args.out)[blockIdx.x] = static_cast<C>(mean_of(total, args.step.inner));
}

bool in_fours(const StepArgs& step) {
    bool fits = step.inner % kVec == 0 && step.model_stride % kVec == 0;
    for (const void* tensor : {step.sample, step.model_output, step.noise, static_cast<const void*>(step.outputs[0]),
                               static_cast<const void*>(step.outputs[1]), static_cast<const void*>(step.outputs[2])})
        fits = fits && aligned(tensor);
    return fits;
}

template <typename C, int V>
void launch_vecs(const LossArgs& args, Launches& launches) {
    const int threads = launches.config.sum, groups = threads / kGroup;
    const int64_t blocks = blocks_of(args.step.inner);
    const int64_t grid = (args.step.batch * blocks + groups - 1) / groups;
    if (args.factor != nullptr) {
        launches.run(diffusion_loss_gradient_kernel<C, V>, grid, threads, args, blocks);
        return;
    }
    launches.run(diffusion_loss_kernel<C, V>, grid, threads, args, blocks);
    launches.run(finish_diffusion_loss_kernel<C>, args.step.batch, kLanes, args, blocks);
}

template <typename C>
void launch_as(const LossArgs& args, Launches& launches) {
    if (in_fours(args.step))
        launch_vecs<C, kVec>(args, launches);
    else
        launch_vecs<C, 1>(args, launches);
}

}  // namespace

const char* launch_diffusion_loss(const LossArgs& given, int device, void* stream) {
    Launches launches(device, stream);
    LossArgs args = given;
    StepArgs& step = args.step;
    if (!step.mixed) step.types.sample = step.types.model_output = step.types.noise = step.dtype;
    if (step.mixed ? step.wide : step.dtype == DType::kFloat64)
        launch_as<double>(args, launches);
    else
        launch_as<float>(args, launches);
    return launches.finish();
}

}  // namespace fastdiff
