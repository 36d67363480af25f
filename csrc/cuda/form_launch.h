// SPDX-License-Identifier: MIT
// The launch of a step that has a compiled form.
#pragma once

#include "form_kernel.h"

namespace fastdiff {
namespace {

template <typename C>
using FormKernel = void (*)(FormArgs<C>);

// Return the kernel of a form; null where none is compiled.
template <typename T, typename C>
FormKernel<C> kernel_of(int key) {
    switch (key) {
#define FASTDIFF_STEP_FORM(row, noise, guided, histories, outputs)               \
    case key_of(RowSource::row, NoiseSource::noise, guided, histories, outputs): \
        return form_kernel<T, C, 16 / static_cast<int>(sizeof(T)),               \
                           key_of(RowSource::row, NoiseSource::noise, guided, histories, outputs)>;
#include "step_forms.inc"
#undef FASTDIFF_STEP_FORM
        default:
            return nullptr;
    }
}

template <typename C>
FormArgs<C> form_args(const StepArgs& args) {
    FormArgs<C> to = {};
    to.batch = static_cast<uint32_t>(args.batch);
    to.inner = static_cast<uint32_t>(args.inner);
    to.model_stride = static_cast<uint32_t>(args.model_stride);
    to.model_input_copies = args.model_input_copies;
    to.sample = args.sample;
    to.model_output = args.model_output;
    to.uncond = args.uncond;
    to.noise = args.noise;
    int count = 0;
    for (int j = 0; j < kRegisters; ++j) {
        if (args.history[j] == nullptr) continue;
        to.history[count] = args.history[j];
        to.slots[count++] = j;
    }
    for (int o = 0; o < args.num_outputs; ++o) to.outputs[o] = args.outputs[o];
    to.model_input = args.model_input;
    to.table = static_cast<const C*>(args.table) + (args.rows == nullptr ? args.row * kRowWidth : 0);
    to.num_rows = args.num_rows;
    to.rows = args.rows;
    to.rows_stride = static_cast<uint32_t>(args.rows_stride);
    to.guidance = static_cast<const C*>(args.guidance);
    to.guidance_stride = static_cast<uint32_t>(args.guidance_stride);
    to.guidance_value = static_cast<C>(args.guidance_value);
    to.draw = args.draw;
    return to;
}

// Launch the kernel of a step's form; false, with nothing launched, where none is compiled.
template <typename T, typename C>
bool launch_form(const StepArgs& args, Launches& launches) {
    constexpr int kVec = 16 / sizeof(T);
    const FormKernel<C> kernel = kernel_of<T, C>(key_of(args, kVec));
    if (kernel == nullptr) return false;
    const int64_t vecs = args.inner / kVec;
    int threads = draws(args) || args.model_input != nullptr ? launches.config.draw : launches.config.step;
    // A small sample fills no large block.
    while (threads > kFormThreads || (threads > 32 && threads / 2 >= vecs)) threads /= 2;
    const int64_t rows = args.batch < kMostGridRows ? args.batch : int64_t{kMostGridRows};
    launches.run_grid(kernel, blocks_of_threads(vecs, threads), rows, (args.batch + rows - 1) / rows, threads,
                      form_args<C>(args));
    return true;
}

}  // namespace
}  // namespace fastdiff
