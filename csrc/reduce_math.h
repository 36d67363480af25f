// SPDX-License-Identifier: MIT
// Reductions to one number per sample, for host and device: the order of the sums, and the keys of selection. All
// backends add in this order, so they agree bit for bit on any number of threads.
//
// Sums. The elements of a sample, in memory order, form blocks of 1024. In a block, element i belongs to lane i % 64. A
// lane starts at 0 and adds its elements in order, in the compute dtype, by one add or fma each. The 64 lanes are
// folded in halves (lane i adds lane i + 32, then i + 16, …). A block's result is converted to float64, and the blocks
// are added the same way: block j belongs to lane j % 64. The last steps are in float64, rounded once. Missing elements
// of the last block count as 0, which changes no lane: a lane that starts at +0 never holds −0.
//
// The standard deviation takes one pass over memory: a block computes its mean c, then Σ(x−c) and Σ(x−c)², while it is
// in the cache. Σ(x−c) corrects the rounding of c (the corrected two-pass algorithm of Chan, Golub and LeVeque, The
// American Statistician 37, 1983), and blocks are combined by their formula in float64.
#pragma once

#include "step_math.h"

namespace fastdiff {

constexpr int kLanes = 64;
constexpr int kBlock = 1024;

enum class Sum : int { kMean = 0, kStd = 1, kNorm = 2, kDot = 3 };

// Partial results of a block: its sum; for the deviation its mean c, Σ(x−c) and Σ(x−c)².
FASTDIFF_INLINE constexpr int parts_of(Sum kind) { return kind == Sum::kStd ? 3 : 1; }

// One reduction. Samples are blocks of memory, one after another.
struct SumArgs {
    int64_t batch;
    int64_t inner;  // elements per sample, 1 or more
    const void* x;
    const void* y;      // of a dot product; null otherwise
    void* partials;     // [batch, blocks, parts_of(kind)], compute dtype
    void* out;          // [batch], compute dtype
    double correction;  // of the standard deviation
    Sum kind;
    DType dtype;
};

constexpr int kMostGram = 6;  // tensors of one Gram matrix

// Partial results of a block: one per pair of `count` tensors, i ≤ j row by row, then their sums if those are wanted.
FASTDIFF_INLINE constexpr int gram_parts(int count, bool sums) { return count * (count + 1) / 2 + (sums ? count : 0); }

// All scalar products of a few tensors. Samples are blocks of memory, one after another, alike in all tensors.
struct GramArgs {
    int64_t batch;
    int64_t inner;  // elements per sample, 1 or more
    int count;      // tensors, 2 to kMostGram
    bool sums;      // the sums of the tensors too
    const void* x[kMostGram];
    void* partials;  // [batch, blocks, gram_parts], compute dtype
    void* out;       // [batch, count, count + sums], compute dtype
    DType dtype;
};

// Write the total of part `part` of a sample to its one or two places in `out`, that sample's [count, count + sums].
template <typename C>
FASTDIFF_INLINE void store_gram(const GramArgs& args, int part, double total, C* out) {
    const int width = args.count + (args.sums ? 1 : 0);
    int i = 0, left = part;
    while (i < args.count && left >= args.count - i) left -= args.count - i++;
    if (i == args.count) {  // a sum
        out[left * width + args.count] = static_cast<C>(total);
        return;
    }
    const int j = i + left;
    out[i * width + j] = out[j * width + i] = static_cast<C>(total);
}

FASTDIFF_INLINE int64_t blocks_of(int64_t inner) { return (inner + kBlock - 1) / kBlock; }

// Number of elements of block j.
FASTDIFF_INLINE int64_t elements_of(int64_t inner, int64_t j) {
    const int64_t left = inner - j * kBlock;
    return left < kBlock ? left : kBlock;
}

// Add one element to a lane.
template <Sum K, typename C>
FASTDIFF_INLINE C take(C lane, C x, C y) {
    if (K == Sum::kNorm) return multiply_add(x, x, lane);
    if (K == Sum::kDot) return multiply_add(x, y, lane);
    return lane + x;
}

// Contribution of block j with `count` elements to its sample's total.
template <Sum K, typename C>
FASTDIFF_INLINE double block_total(const C* parts, int64_t count) {
    if (K != Sum::kStd) return static_cast<double>(parts[0]);
    return multiply_add(static_cast<double>(count), static_cast<double>(parts[0]), static_cast<double>(parts[1]));
}

// Contribution of a block to Σ(x−mean)²: its spread around its own mean, and the distance of that mean.
template <typename C>
FASTDIFF_INLINE double block_spread(const C* parts, int64_t count, double mean) {
    const double n = static_cast<double>(count), share = 1.0 / n, rest = static_cast<double>(parts[1]);
    const double own = multiply_add(-(rest * share), rest, static_cast<double>(parts[2]));
    const double away = multiply_add(block_total<Sum::kStd>(parts, count), share, -mean);
    return multiply_add(n * away, away, own);
}

FASTDIFF_INLINE double mean_of(double total, int64_t inner) { return total / static_cast<double>(inner); }

// One element gives 0/0, as in torch. A negative spread is a rounding error.
FASTDIFF_INLINE double std_of(double spread, int64_t inner, double correction) {
    const double freedom = static_cast<double>(inner) - correction;
    return square_root((spread < 0.0 ? 0.0 : spread) / (freedom < 0.0 ? 0.0 : freedom));
}

template <Sum K>
FASTDIFF_INLINE double value_of(double total, int64_t inner) {
    if (K == Sum::kMean) return mean_of(total, inner);
    if (K == Sum::kNorm) return square_root(total);
    return total;
}

// --- Selection -------------------------------------------------------------------------------------------------------

// A key is an unsigned integer with the order of the numbers: the bits, inverted for negative numbers, with the sign
// bit flipped; for magnitudes the bits without the sign. NaN is detected separately. Keys are compared from the top,
// kDigitBits at a time: a pass counts the values of the next bits, and only the elements at the rank go on to the next
// pass.
constexpr int kDigitBits = 11;
constexpr int kDigits = 1 << kDigitBits;

// The wanted elements: the one of rank `low` (from 0) and, if weight is above 0, the next one.
struct SelectArgs {
    int64_t batch;
    int64_t inner;  // elements per sample, 1 or more
    int64_t low;
    double weight;  // of the second, below 1
    const void* x;
    void* out;  // [batch], compute dtype
    bool absolute;
    DType dtype;
};

template <typename K>
FASTDIFF_INLINE K key_of(K bits, bool absolute) {
    constexpr int kSign = 8 * sizeof(K) - 1;
    const K sign = static_cast<K>(bits >> kSign);
    // All ones for a negative number, the sign bit alone otherwise.
    const K flip = static_cast<K>(static_cast<K>(K(0) - sign) | static_cast<K>(K(1) << kSign));
    const K magnitude = static_cast<K>(bits & static_cast<K>(~static_cast<K>(K(1) << kSign)));
    return absolute ? magnitude : static_cast<K>(bits ^ flip);
}

template <typename K>
FASTDIFF_INLINE K bits_of_key(K key, bool absolute) {
    constexpr int kSign = 8 * sizeof(K) - 1;
    const K top = static_cast<K>(K(1) << kSign);
    if (absolute) return key;
    return (key & top) != 0 ? static_cast<K>(key ^ top) : static_cast<K>(~key);
}

// Number of significant bits of a key, and the shift of its first digit. Keys of magnitudes have no sign bit.
FASTDIFF_INLINE constexpr int key_bits(int size, bool absolute) { return 8 * size - (absolute ? 1 : 0); }
FASTDIFF_INLINE constexpr int first_shift(int bits) { return bits > kDigitBits ? bits - kDigitBits : 0; }

// Linear interpolation of torch.quantile: from the nearer end, with a fused product like torch's builds for AVX2,
// AVX-512 and CUDA. Infinity minus infinity is NaN in both.
template <typename C>
FASTDIFF_INLINE C interpolate(C low, C high, C weight) {
    const C apart = high - low;
    return weight < C(0.5) ? multiply_add(weight, apart, low) : multiply_add(weight - C(1), apart, high);
}

}  // namespace fastdiff
