// SPDX-License-Identifier: MIT
// The loops for AVX-512 (F, BW, VL, DQ); see avx2.cpp for the order of pragma and headers.
#include "cpu.h"

#ifdef FASTDIFF_X86_BUILDS
// gcc warns about its own header, where unmasked intrinsics read an undefined value on purpose (GCC bug 105593).
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop

#include "../philox.h"
#include "half.h"

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c,prefer-vector-width=512")
#define FASTDIFF_ISA avx512
#define FASTDIFF_LANES 16
#define FASTDIFF_F16C 1
#define FASTDIFF_VECTOR_BYTES 64
#include "loops.inc"
#pragma GCC pop_options
#endif
