// SPDX-License-Identifier: MIT
// The loops for AVX-512 (F, BW, VL, DQ); see avx2.cpp for the order of pragma and headers.
#include "cpu.h"

#ifdef FASTDIFF_X86_BUILDS
#include <immintrin.h>

#include "half.h"

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c,prefer-vector-width=512")
#define FASTDIFF_ISA avx512
#define FASTDIFF_F16C 1
#include "step_loop.inc"
// After the step's loops, whose conversions they use.
#include "reduce_loop.inc"
#include "select_loop.inc"
#pragma GCC pop_options
#endif
