// SPDX-License-Identifier: MIT
// The loops on the CPU: one build of each for an instruction set, and the choice among them.
#pragma once

#include "../reduce_math.h"
#include "../step_math.h"

namespace fastdiff {

struct CpuBuild {
    const char* name;
    // Runs elements [begin, end) of the batch × inner elements of one step.
    void (*step_range)(const StepArgs& args, int64_t begin, int64_t end);
    // Fills elements [begin, end) of the batch × inner normal numbers.
    void (*randn_range)(const RandnArgs& args, int64_t begin, int64_t end);
    // Copies bytes; `streaming` writes past the caches.
    void (*copy_range)(const void* source, void* target, int64_t bytes, bool streaming);
    // Sums: what blocks [begin, end) of the batch × blocks leave behind, then the values of samples [begin, end).
    void (*sum_blocks)(const SumArgs& args, int64_t begin, int64_t end);
    void (*finish_samples)(const SumArgs& args, int64_t begin, int64_t end);
    // Selection. Adds the first digits of `count` (below 2^32) elements to counts[kDigits]; whether one is NaN.
    bool (*count_keys)(DType dtype, bool absolute, const void* from, int64_t count, int64_t* counts);
    // The digits of the elements of rank *low and *low + next; *low becomes the rank among the elements of the first.
    void (*find_rank)(const int64_t* counts, int64_t* low, int next, int* first, int* last);
    // Copies the keys whose first digits are `first` to `last` out, and returns how many there are.
    int64_t (*gather_keys)(DType dtype, bool absolute, const void* from, int64_t count, int first, int last,
                           void* keys);
    // The value at a rank among these keys, which are moved about.
    void (*finish_keys)(const SelectArgs& args, void* keys, int64_t count, int64_t rank, void* out);
    // torch's normal numbers; null where the build has no loop for them. Words lie where floats will: the next 624 of
    // mt19937's state from the 624 before, and groups of 16 words turned into normal numbers in place; and
    // sum += weight·numbers.
    void (*twist)(const float* state, float* next);
    void (*words_to_normals)(float* memory, int64_t groups);
    void (*add_scaled)(float* sum, const float* numbers, float weight, int64_t count);
};

namespace generic {
extern const CpuBuild build;
}
#if defined(__x86_64__) && defined(__GNUC__)
#define FASTDIFF_X86_BUILDS 1
namespace avx2 {
extern const CpuBuild build;
}
namespace avx512 {
extern const CpuBuild build;
}
#endif

// Bytes that a step moves at most before its new outputs are written past the caches: half of the last level. Measured
// on one of 32 MiB, over loops of 3 to 8 tensors a step: both ways take as long at 12 to 16 MiB; below, what is written
// is found in the cache by the step that follows.
extern int64_t stream_above;

// The build to run: `wanted` ("generic", "avx2", "avx512"), or the widest that this processor has if null or empty.
// name is null where the wanted one is unknown or the processor lacks it.
CpuBuild select_cpu_build(const char* wanted);

}  // namespace fastdiff
