// SPDX-License-Identifier: MIT
#pragma once

#include "../diffusion_loss_math.h"

namespace fastdiff {

// Launch the training loss or, where `args.factor` is given, its gradient, on a stream (a cudaStream_t) of a device.
// All pointers of `args` are device pointers. Return null, or CUDA's error message; the caller's current device is
// restored.
const char* launch_diffusion_loss(const LossArgs& args, int device, void* stream);

}  // namespace fastdiff
