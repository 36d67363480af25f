// SPDX-License-Identifier: MIT
// csrc/cuda, compiled for the CPU against the headers beside this file, behind an interface for ctypes.
#include "cuda/step.cu"
#include "cuda/step_bf16.cu"
#include "cuda/step_f16.cu"
#include "cuda/step_f32.cu"
#include "cuda/step_f64.cu"
#include "cuda/randn.cu"

#include "accesses.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

// What is around the kernel is not what is watched.
#define UNWATCHED __attribute__((no_sanitize("thread")))

namespace {

// Null, what the launch returned, or what is wrong with an access. `frame` is that of the function which holds the
// arguments.
template <typename Launch>
UNWATCHED const char* watched(accesses::Span* spans, int64_t num_spans, const void* frame, const Launch& launch) {
    switch (setjmp(accesses::refused)) {
        case accesses::kFine:
            break;
        case accesses::kOutside:
            return "an access outside the tensors";
        default:
            return "an access that is not aligned as a device wants it";
    }
    accesses::watch(spans, num_spans, frame);
    const char* error = launch();
    accesses::stop();
    return error;
}

UNWATCHED fastdiff::NoiseArgs noise_args(const int64_t* sizes, const void* seeds, const void* steps) {
    return {static_cast<const int64_t*>(seeds),
            static_cast<const int64_t*>(steps),
            sizes[0],
            static_cast<uint32_t>(sizes[1]),
            static_cast<uint32_t>(sizes[2]),
            sizes[3],
            1};
}

}  // namespace

// `sizes`: batch, inner, model_stride, guidance_stride, num_outputs, variance_kind, dtype, num_rows, row, rows_stride,
// scatter, model_input_copies, model_input_dtype; steps_stride, step, purpose, channels; mixed, wide, and the dtypes in
// the order of StreamTypes without the mask's; the bits of guidance_value; parts, the mask's dtype. `inputs`: sample,
// model_output, uncond, variance, noise, four histories, table, guidance, threshold, rows, seeds, steps, model_input,
// mask.
EXPORT UNWATCHED const char* step_on_host(const int64_t* sizes, void* const* inputs, void* const* outputs, int device,
                                          void* stream, accesses::Span* spans, int64_t num_spans) {
    fastdiff::StepArgs args{};
    args.batch = sizes[0];
    args.inner = sizes[1];
    args.model_stride = sizes[2];
    args.guidance_stride = sizes[3];
    args.num_outputs = static_cast<int>(sizes[4]);
    args.variance_kind = static_cast<fastdiff::Variance>(sizes[5]);
    args.dtype = static_cast<fastdiff::DType>(sizes[6]);
    args.num_rows = sizes[7];
    args.row = sizes[8];
    args.rows_stride = sizes[9];
    args.scatter = sizes[10] != 0;
    args.model_input_copies = static_cast<int>(sizes[11]);
    args.model_input_dtype = static_cast<fastdiff::DType>(sizes[12]);
    args.sample = inputs[0];
    args.model_output = inputs[1];
    args.uncond = inputs[2];
    args.variance = inputs[3];
    args.noise = inputs[4];
    for (int j = 0; j < fastdiff::kRegisters; ++j) args.history[j] = inputs[5 + j];
    args.table = inputs[9];
    args.guidance = inputs[10];
    args.threshold = inputs[11];
    args.rows = static_cast<const int64_t*>(inputs[12]);
    args.draw = noise_args(sizes + 13, inputs[13], inputs[14]);
    args.draw.parts = sizes[32];
    args.model_input = inputs[15];
    args.mask = inputs[16];
    for (int o = 0; o < args.num_outputs; ++o) args.outputs[o] = outputs[o];
    args.mixed = sizes[17] != 0;
    args.wide = sizes[18] != 0;
    const auto type = [&](int i) { return static_cast<fastdiff::DType>(sizes[19 + i]); };
    args.types = {type(0),
                  type(1),
                  type(2),
                  type(3),
                  type(4),
                  static_cast<fastdiff::DType>(sizes[33]),
                  {type(5), type(6), type(7), type(8)},
                  {type(9), type(10), type(11)}};
    memcpy(&args.guidance_value, &sizes[31], sizeof args.guidance_value);
    return watched(spans, num_spans, __builtin_frame_address(0),
                   [&] { return fastdiff::launch_step(args, device, stream); });
}

// `sizes`: batch, inner, dtype; steps_stride, step, purpose, channels. `tensors`: out, seeds, steps.
EXPORT UNWATCHED const char* randn_on_host(const int64_t* sizes, void* const* tensors, int device, void* stream,
                                           accesses::Span* spans, int64_t num_spans) {
    fastdiff::RandnArgs args{};
    args.batch = sizes[0];
    args.inner = sizes[1];
    args.dtype = static_cast<fastdiff::DType>(sizes[2]);
    args.draw = noise_args(sizes + 3, tensors[1], tensors[2]);
    args.out = tensors[0];
    return watched(spans, num_spans, __builtin_frame_address(0),
                   [&] { return fastdiff::launch_randn(args, device, stream); });
}

// The variables that every thread of a device has, for the list of spans; and the state of the runtime.
EXPORT int64_t runtime_spans(accesses::Span* spans) {
    const accesses::Span own[] = {
        {&gridDim, sizeof gridDim, 1, 0, 0},
        {&blockDim, sizeof blockDim, 1, 0, 0},
        {&blockIdx, sizeof blockIdx, 1, 0, 0},
        {&threadIdx, sizeof threadIdx, 1, 0, 0},
        {&cuda_on_host::state, sizeof cuda_on_host::state, 1, 0, 0},
        {&fastdiff::configurations, sizeof fastdiff::configurations, 1, 0, 0},
    };
    int64_t count = 0;
    for (const auto& span : own) spans[count++] = span;
    return count;
}

EXPORT void set_runtime(int device, int backwards, int next_launch) {
    cuda_on_host::state = {};
    cuda_on_host::state.device = device;
    cuda_on_host::state.backwards = backwards != 0;
    cuda_on_host::state.next_launch = static_cast<cudaError_t>(next_launch);
}

// The configuration of what follows, in the order of CudaConfig's fields; the table's where there is none. Whether it
// was taken.
EXPORT int set_config(const int* values) {
    if (values == nullptr) return fastdiff::set_cuda_config(nullptr);
    const fastdiff::CudaConfig config{values[0], values[1], values[2], values[3], values[4]};
    return fastdiff::set_cuda_config(&config);
}

// What launches on a device take now.
EXPORT void get_config(int device, int* values) {
    const fastdiff::CudaConfig config = fastdiff::cuda_config(device);
    const int found[] = {config.step, config.draw, config.randn, config.sum, config.select};
    for (int i = 0; i < 5; ++i) values[i] = found[i];
}

// Of the last launch, threads a block, blocks; how often a device was asked for its capability; the grid.
EXPORT void get_launch(int64_t* values) {
    const auto& state = cuda_on_host::state;
    values[0] = state.threads;
    values[1] = state.blocks;
    values[2] = state.attributes;
    values[3] = state.grid.x;
    values[4] = state.grid.y;
    values[5] = state.grid.z;
}

// The key of the form whose kernel was launched last; kNoForm for another kernel.
EXPORT int get_form() {
    for (int key = 0; key < 6 * 2 * (fastdiff::kRegisters + 1) * fastdiff::kMaxOutputs; ++key) {
        const auto launched = [](auto kernel) {
            return kernel != nullptr && cuda_on_host::state.kernel == reinterpret_cast<void (*)()>(kernel);
        };
        if (launched(fastdiff::kernel_of<__half, float>(key)) ||
            launched(fastdiff::kernel_of<__nv_bfloat16, float>(key)) ||
            launched(fastdiff::kernel_of<float, float>(key)))
            return key;
    }
    return fastdiff::kNoForm;
}

// row, noise, guided, histories, outputs of a key.
EXPORT void describe_form(int key, int* values) {
    const fastdiff::StepForm form = fastdiff::form_of_key(key);
    values[0] = static_cast<int>(form.row);
    values[1] = static_cast<int>(form.noise);
    values[2] = form.guided;
    values[3] = form.histories;
    values[4] = form.outputs;
}

// device, launches, the device launched on, the stream launched on
EXPORT void get_runtime(int64_t* values) {
    const auto& state = cuda_on_host::state;
    values[0] = state.device;
    values[1] = state.launches;
    values[2] = state.launched_on;
    values[3] = reinterpret_cast<int64_t>(state.stream);
}
