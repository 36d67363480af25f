// SPDX-License-Identifier: MIT
// The loops for AVX2, FMA and F16C. The pragma follows the headers: an inline function of theirs compiled here for AVX2
// could otherwise be the copy that the linker keeps for all callers.
#include "cpu.h"

#ifdef FASTDIFF_X86_BUILDS
#include <immintrin.h>

#include "../philox.h"
#include "half.h"

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#define FASTDIFF_ISA avx2
#define FASTDIFF_LANES 8
#define FASTDIFF_F16C 1
#define FASTDIFF_VECTOR_BYTES 32
#include "loops.inc"
#pragma GCC pop_options
#endif
