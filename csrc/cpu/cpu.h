// SPDX-License-Identifier: MIT
// The loops on the CPU: one build of each for an instruction set, and the choice among them.
#pragma once

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

// The build to run: `wanted` ("generic", "avx2", "avx512"), or the widest that this processor has if null or empty.
// name is null where the wanted one is unknown or the processor lacks it.
CpuBuild select_cpu_build(const char* wanted);

}  // namespace fastdiff
