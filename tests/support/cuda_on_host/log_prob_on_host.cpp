// SPDX-License-Identifier: MIT
// csrc/cuda/gram.cu and log_prob.cu, compiled for the CPU against the headers beside this file, behind an interface for
// ctypes.
#include "runtime.h"

#ifdef GRAM_ON_HOST
#include "cuda/gram.cu"
#else
#include "cuda/log_prob.cu"
#endif

#ifdef GRAM_ON_HOST
// `sizes`: dtype, batch, inner, count, sums, device. `pointers`: partials, out, the tensors.
EXPORT const char* gram_on_host(const int64_t* sizes, void* const* pointers, double, void* stream) {
    fastdiff::GramArgs args{};
    args.dtype = static_cast<fastdiff::DType>(sizes[0]);
    args.batch = sizes[1];
    args.inner = sizes[2];
    args.count = static_cast<int>(sizes[3]);
    args.sums = sizes[4] != 0;
    args.partials = pointers[0];
    args.out = pointers[1];
    for (int i = 0; i < args.count; ++i) args.x[i] = pointers[2 + i];
    return fastdiff::launch_gram(args, static_cast<int>(sizes[5]), stream);
}
#else
// `sizes`: dtype, batch, inner, num_rows, row, rows_stride, num_outputs, replay, mean, channels, device, mixed, dtype
// of the model output. `pointers`: partials, out, sample, model_output, uncond, noise, history, table, guidance, rows,
// seeds, prev_sample, kept. The number is the guidance scale where there is no tensor of it.
EXPORT const char* log_prob_on_host(const int64_t* sizes, void* const* pointers, double guidance, void* stream) {
    fastdiff::LogProbArgs args{};
    fastdiff::StepArgs& step = args.step;
    step.dtype = static_cast<fastdiff::DType>(sizes[0]);
    step.batch = sizes[1];
    step.inner = step.model_stride = sizes[2];
    step.num_rows = sizes[3];
    step.row = sizes[4];
    step.rows_stride = sizes[5];
    step.num_outputs = static_cast<int>(sizes[6]);
    args.replay = sizes[7] != 0;
    args.mean = sizes[8] != 0;
    step.mixed = sizes[11] != 0;
    const auto other = static_cast<fastdiff::DType>(sizes[12]);
    step.wide = step.dtype == fastdiff::DType::kFloat64 || (step.mixed && other == fastdiff::DType::kFloat64);
    step.types = {step.dtype, other, step.dtype, step.dtype, step.dtype, step.dtype, {}, {}};
    for (auto& type : step.types.history) type = step.dtype;
    for (auto& type : step.types.outputs) type = step.dtype;
    args.partials = pointers[0];
    args.out = pointers[1];
    step.sample = pointers[2];
    step.model_output = pointers[3];
    step.uncond = pointers[4];
    step.noise = pointers[5];
    step.history[0] = pointers[6];
    step.table = pointers[7];
    step.guidance = pointers[8];
    step.guidance_stride = pointers[8] != nullptr ? 1 : 0;
    step.guidance_value = guidance;
    step.rows = static_cast<const int64_t*>(pointers[9]);
    step.draw = {static_cast<const int64_t*>(pointers[10]), nullptr, 0, 3, 1, sizes[9], 1};
    step.outputs[0] = pointers[11];
    step.outputs[1] = pointers[12];
    return fastdiff::launch_log_prob(args, static_cast<int>(sizes[10]), stream);
}
#endif
