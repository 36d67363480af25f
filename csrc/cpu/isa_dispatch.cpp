// SPDX-License-Identifier: MIT
// Choice of the instruction set, and the size of the last-level cache.
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "cpu.h"

namespace fastdiff {

namespace {

// Linux reports the cache that one core shares; glibc's sysconf reports the sum over the socket on AMD.
int64_t shared_cache() {
    long long kibibytes = 0;
    if (FILE* file = fopen("/sys/devices/system/cpu/cpu0/cache/index3/size", "r")) {
        if (fscanf(file, "%lldK", &kibibytes) != 1) kibibytes = 0;
        fclose(file);
    }
    return kibibytes * 1024;
}

int64_t last_level_cache() {
    int64_t bytes = shared_cache();
    if (bytes > 0) return bytes;
#ifdef _SC_LEVEL3_CACHE_SIZE
    bytes = sysconf(_SC_LEVEL3_CACHE_SIZE);
#endif
    return bytes > 0 ? bytes : int64_t{32} << 20;
}

}  // namespace

int64_t nontemporal_above = last_level_cache() / 2;

CpuBuild select_cpu_build(const char* wanted) {
    const bool any = wanted == nullptr || *wanted == '\0';
    const auto chosen = [=](const CpuBuild& build) { return any || strcmp(wanted, build.name) == 0; };
#ifdef FASTDIFF_X86_BUILDS
    __builtin_cpu_init();
    const bool has_avx2 =
        __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                            __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    if (has_avx512 && chosen(avx512::build)) return avx512::build;
    if (has_avx2 && chosen(avx2::build)) return avx2::build;
#endif
    if (chosen(generic::build)) return generic::build;
    return {};
}

}  // namespace fastdiff
