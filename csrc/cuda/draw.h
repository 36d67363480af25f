// SPDX-License-Identifier: MIT
// Normal numbers for V consecutive elements in a thread's registers.
#pragma once

#include "../philox.h"

namespace fastdiff {

// Philox key and counter of one sample: the seed is the key, step and purpose are the upper half of the counter.
struct NoiseKey {
    uint64_t seed;
    uint32_t step;
    uint32_t purpose;

    __device__ __forceinline__ Words words(uint64_t at) const {
        const Words counter = {{static_cast<uint32_t>(at), static_cast<uint32_t>(at >> 32), step, purpose}};
        return philox(counter, static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
    }
};

// Load a number here. An ordinary load whose value only a branch needs is moved into it by ptxas, behind the loads on
// which the branch depends; a relaxed one is not, and may come from the first-level cache like it.
__device__ __forceinline__ int64_t load_here(const int64_t* from) {
#ifdef __CUDA_ARCH__
    int64_t value;
    asm volatile("ld.relaxed.cta.global.b64 %0, [%1];" : "=l"(value) : "l"(__cvta_generic_to_global(from)));
    return value;
#else
    return *from;
#endif
}

__device__ __forceinline__ NoiseKey noise_key(const NoiseArgs& draw, int64_t b) {
    const uint32_t step = draw.steps == nullptr ? draw.step : static_cast<uint32_t>(draw.steps[b * draw.steps_stride]);
    return {static_cast<uint64_t>(draw.seeds[draw.parts == 1 ? b : b / draw.parts]), step, draw.purpose};
}

// Return the key of `noise_key`, for samples of one part, by loads that stay where they are.
__device__ __forceinline__ NoiseKey noise_key_here(const NoiseArgs& draw, int64_t b) {
    const uint64_t seed = static_cast<uint64_t>(load_here(draw.seeds + b));
    const uint32_t step =
        draw.steps == nullptr ? draw.step : static_cast<uint32_t>(load_here(draw.steps + b * draw.steps_stride));
    return {seed, step, draw.purpose};
}

// Return the numbers at `place`, which is even, and `place` + 1: one transform of two words of a chunk.
__device__ __forceinline__ NormalPair normal_pair(const NoiseKey& key, int64_t place) {
    const Words words = key.words(static_cast<uint64_t>(place) / 4);
    const bool second = (place & 2) != 0;
    return box_muller(second ? words.w[2] : words.w[0], second ? words.w[3] : words.w[1]);
}

__device__ __forceinline__ float normal_at(const NoiseKey& key, int64_t place) {
    const NormalPair pair = normal_pair(key, place & ~int64_t{1});
    return (place & 1) != 0 ? pair.second : pair.first;
}

// Draw elements [at, at + V) of a sample in row-major order; `at` is a multiple of V, of 32 or 64 bits.
template <typename Place, typename C, int V>
__device__ __forceinline__ void draw_in_order(const NoiseKey& key, Place at, C (&z)[V]) {
    if constexpr (V == 1) {
        z[0] = static_cast<C>(normal_at(key, at));
    } else if constexpr (V == 2) {
        const NormalPair pair = normal_pair(key, at);
        z[0] = static_cast<C>(pair.first);
        z[1] = static_cast<C>(pair.second);
    } else {
#pragma unroll
        for (int i = 0; i < V; i += 4) {
            const Words words = key.words(static_cast<uint64_t>(at) / 4 + i / 4);
            const NormalPair a = box_muller(words.w[0], words.w[1]);
            const NormalPair b = box_muller(words.w[2], words.w[3]);
            z[i] = static_cast<C>(a.first);
            z[i + 1] = static_cast<C>(a.second);
            z[i + 2] = static_cast<C>(b.first);
            z[i + 3] = static_cast<C>(b.second);
        }
    }
}

// Draw elements [at, at + V) in memory order.
template <typename C, int V>
__device__ __forceinline__ void draw_normals(const NoiseArgs& draw, int64_t inner, int64_t b, int64_t at, C (&z)[V]) {
    const NoiseKey key = noise_key(draw, b);
    const int64_t before = draw.parts == 1 ? 0 : b % draw.parts * inner;
    if (draw.channels == 1) {
        draw_in_order(key, before + at, z);
        return;
    }
    // Channels-last: neighbours in memory are far apart in the sample. One division per thread instead of one per
    // element.
    const int64_t places = inner / draw.channels;
    int64_t s = at / draw.channels;
    int64_t c = at - s * draw.channels;
#pragma unroll
    for (int i = 0; i < V; ++i) {
        z[i] = static_cast<C>(normal_at(key, before + c * places + s));
        if (++c == draw.channels) c = 0, ++s;
    }
}

}  // namespace fastdiff
