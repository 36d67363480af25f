// SPDX-License-Identifier: MIT
#include <string.h>

#include "cpu.h"

namespace fastdiff {

CpuBuild select_cpu_build(const char* wanted) {
    const bool any = wanted == nullptr || *wanted == '\0';
#ifdef FASTDIFF_X86_BUILDS
    __builtin_cpu_init();
    const bool has_avx2 =
        __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                            __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    if (has_avx512 && (any || strcmp(wanted, "avx512") == 0)) return {"avx512", avx512::step_range, avx512::copy_range};
    if (has_avx2 && (any || strcmp(wanted, "avx2") == 0)) return {"avx2", avx2::step_range, avx2::copy_range};
#endif
    if (any || strcmp(wanted, "generic") == 0) return {"generic", generic::step_range, generic::copy_range};
    return {nullptr, nullptr, nullptr};
}

}  // namespace fastdiff
