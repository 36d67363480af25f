// SPDX-License-Identifier: MIT
// The loops on the CPU: one build of each for an instruction set, and the choice among them.
#pragma once

#include "../step_math.h"

namespace fastdiff {

// Runs elements [begin, end) of the batch × inner elements of one step.
using StepRange = void (*)(const StepArgs& args, int64_t begin, int64_t end);
// Fills elements [begin, end) of the batch × inner normal numbers.
using RandnRange = void (*)(const RandnArgs& args, int64_t begin, int64_t end);

namespace generic {
void step_range(const StepArgs& args, int64_t begin, int64_t end);
void randn_range(const RandnArgs& args, int64_t begin, int64_t end);
}  // namespace generic
#if defined(__x86_64__) && defined(__GNUC__)
#define FASTDIFF_X86_BUILDS 1
namespace avx2 {
void step_range(const StepArgs& args, int64_t begin, int64_t end);
void randn_range(const RandnArgs& args, int64_t begin, int64_t end);
}  // namespace avx2
namespace avx512 {
void step_range(const StepArgs& args, int64_t begin, int64_t end);
void randn_range(const RandnArgs& args, int64_t begin, int64_t end);
}  // namespace avx512
#endif

struct CpuBuild {
    const char* name;
    StepRange step_range;
    RandnRange randn_range;
};

// The build to run: `wanted` ("generic", "avx2", "avx512"), or the widest that this processor has if null or empty.
// name is null where the wanted one is unknown or the processor lacks it.
CpuBuild select_cpu_build(const char* wanted);

}  // namespace fastdiff
