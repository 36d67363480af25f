// SPDX-License-Identifier: MIT
// The loops on the CPU: one build of each for an instruction set, and the choice among them.
#pragma once

#include "../step_math.h"

namespace fastdiff {

// Runs elements [begin, end) of the batch × inner elements of one step.
using StepRange = void (*)(const StepArgs& args, int64_t begin, int64_t end);
// Copies bytes; `streaming` writes past the caches.
using CopyRange = void (*)(const void* source, void* target, int64_t bytes, bool streaming);

namespace generic {
void step_range(const StepArgs& args, int64_t begin, int64_t end);
void copy_range(const void* source, void* target, int64_t bytes, bool streaming);
}  // namespace generic
#if defined(__x86_64__) && defined(__GNUC__)
#define FASTDIFF_X86_BUILDS 1
namespace avx2 {
void step_range(const StepArgs& args, int64_t begin, int64_t end);
void copy_range(const void* source, void* target, int64_t bytes, bool streaming);
}  // namespace avx2
namespace avx512 {
void step_range(const StepArgs& args, int64_t begin, int64_t end);
void copy_range(const void* source, void* target, int64_t bytes, bool streaming);
}  // namespace avx512
#endif

struct CpuBuild {
    const char* name;
    StepRange step_range;
    CopyRange copy_range;
};

// The build to run: `wanted` ("generic", "avx2", "avx512"), or the widest that this processor has if null or empty.
// name is null where the wanted one is unknown or the processor lacks it.
CpuBuild select_cpu_build(const char* wanted);

}  // namespace fastdiff
