// SPDX-License-Identifier: MIT
#include <string.h>

#include "cpu.h"

namespace fastdiff {

#define FASTDIFF_CPU_BUILD(isa)                                                               \
    {#isa,           isa::step_range,  isa::sum_blocks, isa::finish_samples, isa::count_keys, \
     isa::find_rank, isa::gather_keys, isa::finish_keys}

CpuBuild select_cpu_build(const char* wanted) {
    const bool any = wanted == nullptr || *wanted == '\0';
#ifdef FASTDIFF_X86_BUILDS
    __builtin_cpu_init();
    const bool has_avx2 =
        __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                            __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    if (has_avx512 && (any || strcmp(wanted, "avx512") == 0)) return FASTDIFF_CPU_BUILD(avx512);
    if (has_avx2 && (any || strcmp(wanted, "avx2") == 0)) return FASTDIFF_CPU_BUILD(avx2);
#endif
    if (any || strcmp(wanted, "generic") == 0) return FASTDIFF_CPU_BUILD(generic);
    return {};
}

}  // namespace fastdiff
