// SPDX-License-Identifier: MIT
// Sums of a sample on CUDA, in the order of csrc/reduce_math.h.
//
// A block of 1024 elements is read by as many threads as hold its 64 lanes at 16 bytes each. The second pass of the
// standard deviation reads it from the first-level cache. A second launch combines the blocks.
#include "fold.h"
#include "reduce_device.h"

namespace fastdiff {
namespace {

constexpr int kRounds = kBlock / kLanes;
constexpr int kAhead = 4;  // rounds loaded before the first is added
constexpr unsigned kWarp = 0xffffffffu;

// Fold the lanes of a group of threads, V each, in halves; every thread of the group gets the sum.
template <typename C, int V>
__device__ __forceinline__ C fold_lanes(C (&lanes)[V]) {
#pragma unroll
    for (int apart = kLanes / V / 2; apart > 0; apart /= 2) {
#pragma unroll
        for (int i = 0; i < V; ++i) lanes[i] += __shfl_xor_sync(kWarp, lanes[i], apart);
    }
#pragma unroll
    for (int half = V / 2; half > 0; half /= 2) {
#pragma unroll
        for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
    }
    return lanes[0];
}

// One thread's part of a block: in round r the elements from r · 64 + first on.
template <typename T>
struct Part {
    static constexpr int kSize = Vec<T>::kSize;
    const T* from;
    int first;
    int count;  // elements of the block; the rest counts as 0
    bool wide;

    __device__ __forceinline__ Vec<T> load(int round) const {
        const int at = round * kLanes + first;
        if (wide && count == kBlock) return *reinterpret_cast<const Vec<T>*>(from + at);
        Vec<T> vec;
#pragma unroll
        for (int i = 0; i < kSize; ++i) vec.values[i] = at + i < count ? from[at + i] : T{};
        return vec;
    }

    // Call `add(i, x, there)` for each of the thread's lanes, round after round.
    template <typename C, typename Add>
    __device__ __forceinline__ void each(Add add) const {
#pragma unroll 1
        for (int r = 0; r < kRounds; r += kAhead) {
            Vec<T> ahead[kAhead];
#pragma unroll
            for (int k = 0; k < kAhead; ++k) ahead[k] = load(r + k);
#pragma unroll
            for (int k = 0; k < kAhead; ++k) {
#pragma unroll
                for (int i = 0; i < kSize; ++i)
                    add(i, C(widen(ahead[k].values[i])), (r + k) * kLanes + first + i < count);
            }
        }
    }

    // The same for the elements of two tensors.
    template <typename C, typename Add>
    __device__ __forceinline__ void each_with(const Part& other, Add add) const {
#pragma unroll 1
        for (int r = 0; r < kRounds; r += kAhead) {
            Vec<T> ahead[kAhead], beside[kAhead];
#pragma unroll
            for (int k = 0; k < kAhead; ++k) {
                ahead[k] = load(r + k);
                beside[k] = other.load(r + k);
            }
#pragma unroll
            for (int k = 0; k < kAhead; ++k) {
#pragma unroll
                for (int i = 0; i < kSize; ++i) add(i, C(widen(ahead[k].values[i])), C(widen(beside[k].values[i])));
            }
        }
    }
};

template <typename T, typename C, int K>
__global__ void __launch_bounds__(kMostThreads) sum_kernel(const SumArgs args, int64_t blocks, bool wide) {
    constexpr int V = Vec<T>::kSize;
    constexpr int kGroup = kLanes / V;
    constexpr Sum kKind = static_cast<Sum>(K);
    const int64_t block = static_cast<int64_t>(blockIdx.x) * (blockDim.x / kGroup) + threadIdx.x / kGroup;
    const bool there = block < args.batch * blocks;  // other threads only take part in shuffles
    const int first = static_cast<int>(threadIdx.x % kGroup) * V;
    const int64_t b = there ? block / blocks : 0, j = there ? block - b * blocks : 0;
    const int64_t offset = b * args.inner + j * kBlock;
    const int count = there ? static_cast<int>(elements_of(args.inner, j)) : 0;
    const Part<T> x{static_cast<const T*>(args.x) + offset, first, count, wide};

    C lanes[V] = {};
    if (kKind == Sum::kDot) {
        const Part<T> y{static_cast<const T*>(args.y) + offset, first, count, wide};
        x.template each_with<C>(y, [&](int i, C left, C right) { lanes[i] = take<kKind>(lanes[i], left, right); });
    } else {
        x.template each<C>([&](int i, C value, bool) { lanes[i] = take<kKind>(lanes[i], value, C(0)); });
    }
    const C sum = fold_lanes(lanes);
    C* parts = static_cast<C*>(args.partials) + block * parts_of(kKind);
    if (kKind != Sum::kStd) {
        if (there && first == 0) parts[0] = sum;
        return;
    }
    const C center = sum / static_cast<C>(count > 0 ? count : 1);
    C rests[V] = {}, squares[V] = {};
    x.template each<C>([&](int i, C value, bool is) {
        const C away = is ? value - center : C(0);
        rests[i] += away;
        squares[i] = multiply_add(away, away, squares[i]);
    });
    const C rest = fold_lanes(rests), square = fold_lanes(squares);
    if (!there || first != 0) return;
    parts[0] = center;
    parts[1] = rest;
    parts[2] = square;
}

template <typename T, typename C, int K>
__global__ void __launch_bounds__(kLanes) finish_kernel(const SumArgs args, int64_t blocks) {
    constexpr Sum kKind = static_cast<Sum>(K);
    __shared__ double lanes[kLanes];
    const C* sample = static_cast<const C*>(args.partials) + blockIdx.x * blocks * parts_of(kKind);
    const auto of = [&](int64_t j) { return sample + j * parts_of(kKind); };
    const double total =
        fold_blocks(lanes, blocks, [&](int64_t j) { return block_total<kKind>(of(j), elements_of(args.inner, j)); });
    double value = value_of<kKind>(total, args.inner);
    if (kKind == Sum::kStd) {
        const double mean = mean_of(total, args.inner);
        const double spread = fold_blocks(
            lanes, blocks, [&](int64_t j) { return block_spread(of(j), elements_of(args.inner, j), mean); });
        value = std_of(spread, args.inner, args.correction);
    }
    if (threadIdx.x == 0) static_cast<C*>(args.out)[blockIdx.x] = static_cast<C>(value);
}

template <typename T, typename C, int K>
void launch_kind(const SumArgs& args, Launches& launches) {
    const int threads = launches.config.sum, blocks_a_cta = threads / (kLanes / Vec<T>::kSize);
    const int64_t blocks = blocks_of(args.inner), all = args.batch * blocks;
    // Samples are aligned to 16 bytes if their size is a multiple of that, or if there is only one.
    const bool wide = aligned(args.x) && (args.y == nullptr || aligned(args.y)) &&
                      (args.batch == 1 || args.inner % Vec<T>::kSize == 0);
    launches.run(sum_kernel<T, C, K>, (all + blocks_a_cta - 1) / blocks_a_cta, threads, args, blocks, wide);
    launches.run(finish_kernel<C, C, K>, args.batch, kLanes, args, blocks);
}

template <typename T, typename C>
void launch_as(Types<T, C>, const SumArgs& args, Launches& launches) {
    switch (args.kind) {
        case Sum::kMean:
            return launch_kind<T, C, static_cast<int>(Sum::kMean)>(args, launches);
        case Sum::kStd:
            return launch_kind<T, C, static_cast<int>(Sum::kStd)>(args, launches);
        case Sum::kNorm:
            return launch_kind<T, C, static_cast<int>(Sum::kNorm)>(args, launches);
        case Sum::kDot:
            return launch_kind<T, C, static_cast<int>(Sum::kDot)>(args, launches);
    }
}

}  // namespace

const char* launch_sum(const SumArgs& args, int device, void* stream) {
    return launch_for(args.dtype, device, stream,
                      [&](auto types, Launches& launches) { launch_as(types, args, launches); });
}

}  // namespace fastdiff
