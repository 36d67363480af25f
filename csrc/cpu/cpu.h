// SPDX-License-Identifier: MIT
// The loops on the CPU: one build of each for an instruction set, and the choice among them.
#pragma once

#include "../reduce_math.h"
#include "../step_math.h"

namespace fastdiff {

// Runs elements [begin, end) of the batch × inner elements of one step.
using StepRange = void (*)(const StepArgs& args, int64_t begin, int64_t end);

// Sums: what blocks [begin, end) of the batch × blocks leave behind, then the values of samples [begin, end).
using SumRange = void (*)(const SumArgs& args, int64_t begin, int64_t end);

// Selection. Adds the first digits of `count` (below 2^32) elements to counts[kDigits]; returns whether one is NaN.
using CountKeys = bool (*)(DType dtype, bool absolute, const void* from, int64_t count, int64_t* counts);
// The digits of the elements of rank *low and *low + next; *low becomes the rank among the elements of the first.
using FindRank = void (*)(const int64_t* counts, int64_t* low, int next, int* first, int* last);
// Copies the keys whose first digits are `first` to `last` out, and returns how many there are.
using GatherKeys = int64_t (*)(DType dtype, bool absolute, const void* from, int64_t count, int first, int last,
                               void* keys);
// The value at a rank among these keys, which are moved about.
using FinishKeys = void (*)(const SelectArgs& args, void* keys, int64_t count, int64_t rank, void* out);

#define FASTDIFF_CPU_LOOPS                                                                                             \
    void step_range(const StepArgs& args, int64_t begin, int64_t end);                                                 \
    void sum_blocks(const SumArgs& args, int64_t begin, int64_t end);                                                  \
    void finish_samples(const SumArgs& args, int64_t begin, int64_t end);                                              \
    bool count_keys(DType dtype, bool absolute, const void* from, int64_t count, int64_t* counts);                     \
    void find_rank(const int64_t* counts, int64_t* low, int next, int* first, int* last);                              \
    int64_t gather_keys(DType dtype, bool absolute, const void* from, int64_t count, int first, int last, void* keys); \
    void finish_keys(const SelectArgs& args, void* keys, int64_t count, int64_t rank, void* out);

namespace generic {
FASTDIFF_CPU_LOOPS
}
#if defined(__x86_64__) && defined(__GNUC__)
#define FASTDIFF_X86_BUILDS 1
namespace avx2 {
FASTDIFF_CPU_LOOPS
}
namespace avx512 {
FASTDIFF_CPU_LOOPS
}
#endif

struct CpuBuild {
    const char* name;
    StepRange step_range;
    SumRange sum_blocks;
    SumRange finish_samples;
    CountKeys count_keys;
    FindRank find_rank;
    GatherKeys gather_keys;
    FinishKeys finish_keys;
};

// The build to run: `wanted` ("generic", "avx2", "avx512"), or the widest that this processor has if null or empty.
// name is null where the wanted one is unknown or the processor lacks it.
CpuBuild select_cpu_build(const char* wanted);

}  // namespace fastdiff
