// SPDX-License-Identifier: MIT
// The quantile on CUDA: radix selection on order-preserving keys, without a sort.
//
// The first pass counts the top digits of all elements. The second reads the elements again, copies those at the rank
// to scratch memory and counts their next digits; later passes read only those. Each pass is one launch: the last block
// of threads to finish in a sample reads the counts and chooses the digits for the next pass. If the two wanted
// elements have different digits, one is the largest of its digit and the other the smallest of its own: a pass of a
// maximum and a minimum ends the search. Blocks share integers only, so their order does not matter.
#include <string.h>

#include "reduce_device.h"

namespace fastdiff {
namespace {

constexpr int kThreads = 256;
constexpr int kOwn = kDigits / kThreads;  // digits per thread
// Equal digits in one warp serialise: neighbouring threads count in separate tables.
constexpr int kTables = 4;
constexpr int64_t kMostBlocks = 1056;  // eight per multiprocessor of the largest GPU so far

using Count = unsigned long long;

template <typename T>
struct KeyOf;
template <>
struct KeyOf<__half> {
    using Key = uint16_t;
    using Atomic = unsigned;
    static constexpr uint64_t kInfinity = 0x7c00u;
};
template <>
struct KeyOf<__nv_bfloat16> {
    using Key = uint16_t;
    using Atomic = unsigned;
    static constexpr uint64_t kInfinity = 0x7f80u;
};
template <>
struct KeyOf<float> {
    using Key = uint32_t;
    using Atomic = unsigned;
    static constexpr uint64_t kInfinity = 0x7f800000u;
};
template <>
struct KeyOf<double> {
    using Key = uint64_t;
    using Atomic = unsigned long long;
    static constexpr uint64_t kInfinity = 0x7ff0000000000000u;
};

// State shared by the launches of one sample.
struct State {
    Count low, high;    // known digits of the two elements; in the end their keys
    Count least, most;  // of the two digits, where they differ
    Count rank;         // of the first among the elements that have its digits
    Count kept;         // elements in scratch memory
    unsigned nan;       // whether an element is NaN
    unsigned finished;  // blocks of threads of this pass
    unsigned done;      // whether both keys are known
    unsigned unused;
};

struct Scratch {
    State* states;  // [batch]
    Count* counts;  // [batch, kDigits]
    void* keys;     // [batch, inner]
};

template <typename T>
__device__ __forceinline__ T number_of(typename KeyOf<T>::Key bits) {
    T value;
    static_assert(sizeof value == sizeof bits, "a key is as wide as its number");
    memcpy(&value, &bits, sizeof value);
    return value;
}

template <typename T, typename C, int Unused>
__global__ void __launch_bounds__(kThreads) clear_kernel(Scratch scratch, int64_t low) {
    const int64_t b = blockIdx.x;
    for (int d = static_cast<int>(threadIdx.x); d < kDigits; d += kThreads) scratch.counts[b * kDigits + d] = 0;
    if (threadIdx.x == 0) {
        State state = {};
        state.rank = static_cast<Count>(low);
        state.least = ~Count(0);
        scratch.states[b] = state;
    }
}

// Write the interpolated number, once both keys are known.
template <typename T, typename C>
__device__ void write_result(const SelectArgs& args, int64_t b, Count low, Count high, bool nan) {
    using Key = typename KeyOf<T>::Key;
    const C below = C(widen(number_of<T>(bits_of_key(static_cast<Key>(low), args.absolute))));
    const C above = C(widen(number_of<T>(bits_of_key(static_cast<Key>(high), args.absolute))));
    const C value = interpolate(below, above, static_cast<C>(args.weight));
    static_cast<C*>(args.out)[b] = nan ? C(NAN) : value;
}

// Find the digits of the elements of rank `rank` and `rank + next`, by all threads of a block; shared[0] and [1] get
// the digits and shared[2] the number of elements before the first.
__device__ void find_digits(const Count* counts, Count rank, int next, Count* sums, Count* shared) {
    const int thread = static_cast<int>(threadIdx.x);
    Count own[kOwn], mine = 0;
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
        own[i] = __ldcg(counts + thread * kOwn + i);
        mine += own[i];
    }
    sums[thread] = mine;
    __syncthreads();
    for (int apart = 1; apart < kThreads; apart *= 2) {
        const Count left = thread >= apart ? sums[thread - apart] : 0;
        __syncthreads();
        sums[thread] += left;
        __syncthreads();
    }
    for (int which = 0; which < 2; ++which) {
        const Count wanted = rank + static_cast<Count>(which * next);
        Count before = sums[thread] - mine;
        if (wanted < before || wanted >= sums[thread]) continue;
        int digit = 0;
#pragma unroll
        for (int i = 0; i < kOwn - 1; ++i) {
            if (digit == i && before + own[i] <= wanted) {
                before += own[i];
                ++digit;
            }
        }
        shared[which] = static_cast<Count>(thread * kOwn + digit);
        if (which == 0) shared[2] = before;
    }
    __syncthreads();
}

// One pass over a sample's elements (Pass 0 and 1) or over those copied by pass 1 (2). The key's bits from `known` on
// are known; those from `shift` on are counted.
template <typename T, typename C, int Pass>
__global__ void __launch_bounds__(kThreads)
    select_kernel(const SelectArgs args, Scratch scratch, int known, int shift, int64_t chunks, bool wide) {
    using Key = typename KeyOf<T>::Key;
    using Atomic = typename KeyOf<T>::Atomic;
    __shared__ unsigned tables[kTables][kDigits];
    __shared__ Count sums[kThreads];
    __shared__ Count found[3];
    __shared__ Atomic edges[2];  // the largest of the lower digit, the smallest of the upper one
    __shared__ unsigned last;
    const int thread = static_cast<int>(threadIdx.x);
    const int64_t b = blockIdx.x / chunks, chunk = blockIdx.x - b * chunks;
    State& state = scratch.states[b];
    if (Pass > 0 && state.done != 0) return;
    const Count low = Pass > 0 ? state.low : 0, high = Pass > 0 ? state.high : 0;
    const bool apart = Pass > 0 && low != high;
    const Key mask = static_cast<Key>((Key(1) << (known - shift)) - 1);
    Key* kept = static_cast<Key*>(scratch.keys) + b * args.inner;

    for (int d = thread; d < kDigits; d += kThreads)
        for (int t = 0; t < kTables; ++t) tables[t][d] = 0;
    if (thread == 0) {
        edges[0] = 0;
        edges[1] = ~Atomic(0);
    }
    __syncthreads();

    bool nan = false;
    const auto look = [&](Key key) {
        if (Pass > 0) {
            const Count digits = static_cast<Count>(key >> known);
            if (apart) {
                if (digits == low) atomicMax(&edges[0], Atomic(key));
                if (digits == high) atomicMin(&edges[1], Atomic(key));
                return;
            }
            if (digits != low) return;
            if (Pass == 1) kept[atomicAdd(&state.kept, Count(1))] = key;
        }
        atomicAdd(&tables[thread % kTables][static_cast<Key>(key >> shift) & mask], 1u);
    };
    const auto look_at_bits = [&](Key bits) {
        if (Pass == 0) nan |= static_cast<uint64_t>(key_of(bits, true)) > KeyOf<T>::kInfinity;
        look(key_of(bits, args.absolute));
    };
    if (Pass == 2) {
        const int64_t count = static_cast<int64_t>(state.kept);
        for (int64_t i = chunk * kThreads + thread; i < count; i += chunks * kThreads) look(kept[i]);
    } else {
        const Key* from = static_cast<const Key*>(args.x) + b * args.inner;
        constexpr int V = Vec<Key>::kSize;
        const int64_t vecs = wide ? args.inner / V : 0;
        for (int64_t i = chunk * kThreads + thread; i < vecs; i += chunks * kThreads) {
            const Vec<Key> vec = reinterpret_cast<const Vec<Key>*>(from)[i];
#pragma unroll
            for (int k = 0; k < V; ++k) look_at_bits(vec.values[k]);
        }
        for (int64_t i = vecs * V + chunk * kThreads + thread; i < args.inner; i += chunks * kThreads)
            look_at_bits(from[i]);
    }
    if (nan) atomicOr(&state.nan, 1u);
    __syncthreads();

    Count* counts = scratch.counts + b * kDigits;
    if (apart) {
        if (thread == 0) {
            atomicMax(&state.most, Count(edges[0]));
            // An upper edge that no thread has found is the maximum of its type, not of Count.
            if (edges[1] != ~Atomic(0)) atomicMin(&state.least, Count(edges[1]));
        }
    } else {
        for (int d = thread; d < kDigits; d += kThreads) {
            Count sum = 0;
            for (int t = 0; t < kTables; ++t) sum += tables[t][d];
            if (sum != 0) atomicAdd(&counts[d], sum);
        }
    }
    __threadfence();
    __syncthreads();
    if (thread == 0) last = atomicAdd(&state.finished, 1u) + 1 == static_cast<unsigned>(chunks) ? 1u : 0u;
    __syncthreads();
    if (last == 0) return;
    __threadfence();

    const int next = args.weight > 0 ? 1 : 0;
    if (!apart) {
        find_digits(counts, state.rank, next, sums, found);
        for (int d = thread; d < kDigits; d += kThreads) counts[d] = 0;
    }
    if (thread != 0) return;
    Count first, second;
    if (apart) {
        // Read by atomics, past the first-level cache.
        first = atomicMax(&state.most, Count(0));
        second = atomicMin(&state.least, ~Count(0));
    } else {
        const int width = known - shift;
        first = (Pass > 0 ? low << width : 0) | found[0];
        second = (Pass > 0 ? low << width : 0) | found[1];
        state.rank -= found[2];
    }
    state.low = first;
    state.high = second;
    state.finished = 0;
    if (!apart && shift > 0) return;
    state.done = 1;
    write_result<T, C>(args, b, first, second, atomicOr(&state.nan, 0u) != 0);
}

int64_t aligned_size(int64_t bytes) { return (bytes + 15) / 16 * 16; }

int64_t size_of(DType dtype) { return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2; }

Scratch scratch_at(const SelectArgs& args, void* memory) {
    char* at = static_cast<char*>(memory);
    Scratch scratch;
    scratch.states = reinterpret_cast<State*>(at);
    at += aligned_size(args.batch * static_cast<int64_t>(sizeof(State)));
    scratch.counts = reinterpret_cast<Count*>(at);
    at += aligned_size(args.batch * kDigits * static_cast<int64_t>(sizeof(Count)));
    scratch.keys = at;
    return scratch;
}

template <typename T, typename C>
void launch_as(Types<T, C>, const SelectArgs& args, void* memory, Launches& launches) {
    using Key = typename KeyOf<T>::Key;
    const Scratch scratch = scratch_at(args, memory);
    const int64_t share = int64_t{kThreads} * launches.config.select;
    const int64_t most = kMostBlocks / args.batch > 0 ? kMostBlocks / args.batch : 1;
    const int64_t wanted = (args.inner + share - 1) / share;
    const int64_t chunks = wanted < most ? wanted : most;
    const bool wide = aligned(args.x) && (args.batch == 1 || args.inner % Vec<Key>::kSize == 0);
    launches.run(clear_kernel<T, C, 0>, args.batch, kThreads, scratch, args.low);
    const int bits = key_bits(sizeof(Key), args.absolute);
    for (int known = bits, pass = 0; known > 0; ++pass) {
        const int shift = known > kDigitBits ? known - kDigitBits : 0;
        auto* kernel = pass == 0 ? select_kernel<T, C, 0> : pass == 1 ? select_kernel<T, C, 1> : select_kernel<T, C, 2>;
        launches.run(kernel, args.batch * chunks, kThreads, args, scratch, known, shift, chunks, wide);
        known = shift;
    }
}

}  // namespace

int64_t select_scratch_bytes(const SelectArgs& args) {
    return aligned_size(args.batch * static_cast<int64_t>(sizeof(State))) +
           aligned_size(args.batch * kDigits * static_cast<int64_t>(sizeof(Count))) +
           args.batch * args.inner * size_of(args.dtype);
}

const char* launch_select(const SelectArgs& args, void* scratch, int device, void* stream) {
    return launch_for(args.dtype, device, stream,
                      [&](auto types, Launches& launches) { launch_as(types, args, scratch, launches); });
}

}  // namespace fastdiff
