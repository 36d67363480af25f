// SPDX-License-Identifier: MIT
// The loops for any processor. On x86-64 without FMA every multiply_add calls the C library: slow, with the same bits.
#include "../philox.h"
#include "half.h"

#ifdef FASTDIFF_X86_BUILDS
#include <emmintrin.h>
#define FASTDIFF_VECTOR_BYTES 16  // SSE2, on every x86-64
#endif
#define FASTDIFF_ISA generic
#define FASTDIFF_LANES 1
#include "loops.inc"
