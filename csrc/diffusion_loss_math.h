// SPDX-License-Identifier: MIT
// The training loss of a diffusion model, for host and device: a sample's mean of ρ(output − target), and its gradient.
//
// The target is the map of a row's first kept output on x0 and the noise, as a step computes it; the noise may be drawn
// from seeds, again in each pass. The values of ρ are summed in the order of reduce_math.h; the mean is float64
// arithmetic on one number per sample, rounded once.
#pragma once

#include "reduce_math.h"

namespace fastdiff {

enum class Loss : int { kL2 = 0, kL1 = 1, kHuber = 2 };

struct LossArgs {
    // x0 is its sample, the model's output its model output. Samples are blocks. Where `factor` is given, outputs are
    // the gradients of output (with its stride from sample to sample), x0 and noise; null where not wanted.
    StepArgs step;
    Loss loss;
    double c;            // of the pseudo-Huber loss
    void* partials;      // [batch, blocks], compute dtype
    void* out;           // [batch], compute dtype
    const void* factor;  // [batch], compute dtype: the gradient of each sample's loss, over its elements, for l2 twice
};

constexpr int kTargetSample = int{kKeep0} + int{kSample}, kTargetNoise = int{kKeep0} + int{kNoise};

// ρ(r) of the losses that are plain sums. √(r² + c²) − c is written without cancellation; `square` is c².
template <typename C>
FASTDIFF_INLINE C magnitude(C r) {
    return r < C(0) ? -r : r;
}
template <typename C>
FASTDIFF_INLINE C pseudo_huber(C r, C c, C square) {
    return r * r / (square_root(multiply_add(r, r, square)) + c);
}

// ρ'(r); half of it for l2, whose factor has the 2. NaN stays NaN.
template <Loss L, typename C>
FASTDIFF_INLINE C slope_of(C r, C square) {
    if (L == Loss::kL1) return r > C(0) ? C(1) : r < C(0) ? C(-1) : r;
    if (L == Loss::kHuber) return r / square_root(multiply_add(r, r, square));
    return r;
}

}  // namespace fastdiff
