// SPDX-License-Identifier: MIT
// csrc/cuda/diffusion_loss.cu, compiled for the CPU against the headers beside this file, behind an interface for
// ctypes.
#include "runtime.h"

#include "cuda/diffusion_loss.cu"

// `sizes`: dtypes of x0, output and noise, batch, inner, stride of the output, num_rows, row, rows_stride, channels,
// loss, device. `pointers`: partials, out, x0, output, noise, table, rows, seeds, factor, gradients of output, x0 and
// noise. The number is c.
EXPORT const char* diffusion_loss_on_host(const int64_t* sizes, void* const* pointers, double c, void* stream) {
    using fastdiff::DType;
    fastdiff::LossArgs args{};
    fastdiff::StepArgs& step = args.step;
    step.dtype = static_cast<DType>(sizes[0]);
    step.types.sample = step.dtype;
    step.types.model_output = static_cast<DType>(sizes[1]);
    step.types.noise = static_cast<DType>(sizes[2]);
    step.mixed = sizes[0] != sizes[1] || sizes[0] != sizes[2];
    step.wide = step.types.sample == DType::kFloat64 || step.types.model_output == DType::kFloat64 ||
                step.types.noise == DType::kFloat64;
    step.batch = sizes[3];
    step.inner = sizes[4];
    step.model_stride = sizes[5];
    step.num_rows = sizes[6];
    step.row = sizes[7];
    step.rows_stride = sizes[8];
    args.loss = static_cast<fastdiff::Loss>(sizes[10]);
    args.c = c;
    args.partials = pointers[0];
    args.out = pointers[1];
    step.sample = pointers[2];
    step.model_output = pointers[3];
    step.noise = pointers[4];
    step.table = pointers[5];
    step.rows = static_cast<const int64_t*>(pointers[6]);
    step.draw = {static_cast<const int64_t*>(pointers[7]), nullptr, 0, 3, 3, sizes[9], 1};
    args.factor = pointers[8];
    for (int o = 0; o < 3; ++o) step.outputs[o] = pointers[9 + o];
    return fastdiff::launch_diffusion_loss(args, static_cast<int>(sizes[11]), stream);
}
