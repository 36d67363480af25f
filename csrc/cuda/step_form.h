// SPDX-License-Identifier: MIT
// Forms of a step: which tensors there are, as far as kernels are compiled for it.
#pragma once

#include <initializer_list>

#include "access.h"

namespace fastdiff {

enum class NoiseSource : int { kNone = 0, kGiven = 1, kDrawn = 2 };

// kByValue: one row for all samples, known at launch. kByIndex: the index of one row or of each sample's own in device
// memory; kept outputs, if there are any, go to the history slots that the row names.
enum class RowSource : int { kByValue = 0, kByIndex = 1 };

struct StepForm {
    RowSource row;
    NoiseSource noise;
    bool guided;
    int histories;  // 0 to 4
    int outputs;    // 1 to 3

    // Blocks of kFormThreads that a multiprocessor has registers for: four leave each thread 64, three 80, two 128. A
    // form with several of history tensors, noise and a row by index would spill at 64.
    FASTDIFF_INLINE constexpr int resident_blocks() const {
        const int many = histories + (noise == NoiseSource::kNone ? 0 : 1) + (row == RowSource::kByIndex ? 1 : 0);
        return many < 3 ? 4 : many < 5 ? 3 : 2;
    }
};

// Number a form, and back.
FASTDIFF_INLINE constexpr int key_of(RowSource row, NoiseSource noise, bool guided, int histories, int outputs) {
    const int sources = static_cast<int>(row) * 3 + static_cast<int>(noise);
    return ((sources * 2 + (guided ? 1 : 0)) * (kRegisters + 1) + histories) * kMaxOutputs + outputs - 1;
}

FASTDIFF_INLINE constexpr StepForm form_of_key(int key) {
    const int outputs = key % kMaxOutputs + 1, histories = key / kMaxOutputs % (kRegisters + 1);
    const int sources = key / kMaxOutputs / (kRegisters + 1);
    return {static_cast<RowSource>(sources / 6), static_cast<NoiseSource>(sources / 2 % 3), sources % 2 != 0, histories,
            outputs};
}

// Threads of the largest block of a form's kernel.
constexpr int kFormThreads = 256;

constexpr int kNoForm = -1;

// Return true if the step draws noise.
FASTDIFF_INLINE bool draws(const StepArgs& args) { return args.noise == nullptr && args.draw.seeds != nullptr; }

// Return true if every access of `elements` elements is aligned to 16 bytes.
inline bool vectorizable(const StepArgs& args, int elements) {
    if (args.batch > 1 && (args.inner % elements != 0 || args.model_stride % elements != 0)) return false;
    for (const void* pointer : {args.sample, args.model_output, args.uncond, args.variance, args.noise, args.mask})
        if (!aligned(pointer)) return false;
    for (const void* pointer : args.history)
        if (!aligned(pointer)) return false;
    for (int o = 0; o < args.num_outputs; ++o)
        if (!aligned(args.outputs[o])) return false;
    // A second copy begins at the end of the first.
    return aligned(args.model_input) && (args.model_input_copies < 2 || args.inner % elements == 0);
}

// Return the key of a step's form where `elements` elements of its tensors are 16 bytes; kNoForm where it has none.
inline int key_of(const StepArgs& args, int elements) {
    const bool drawn = draws(args), noisy = drawn || args.noise != nullptr, by_index = args.rows != nullptr;
    // Only the last vector of one run of elements could be a part of one.
    if (args.mixed || args.inner % elements != 0 || !vectorizable(args, elements) || !aligned(args.table))
        return kNoForm;
    if (args.threshold != nullptr || (noisy && args.variance_kind != Variance::kFixed)) return kNoForm;
    if (args.model_input != nullptr && args.model_input_dtype != args.dtype) return kNoForm;
    if (args.mask != nullptr || (drawn && (args.draw.channels != 1 || args.draw.parts != 1))) return kNoForm;
    if (args.inner > INT32_MAX || args.model_stride > UINT32_MAX || args.batch > INT32_MAX) return kNoForm;
    int histories = 0;
    for (const void* history : args.history) histories += history != nullptr ? 1 : 0;
    int outputs = args.num_outputs;
    if (by_index) {
        if (args.num_rows < 1 || (args.scatter ? false : histories > 0 || outputs > 1)) return kNoForm;
        outputs = histories > 0 ? int{kMaxOutputs} : 1;
    } else if (args.scatter || args.row < 0 || args.row >= args.num_rows) {
        return kNoForm;
    }
    return key_of(by_index ? RowSource::kByIndex : RowSource::kByValue,
                  drawn   ? NoiseSource::kDrawn
                  : noisy ? NoiseSource::kGiven
                          : NoiseSource::kNone,
                  args.uncond != nullptr, histories, outputs);
}

}  // namespace fastdiff
