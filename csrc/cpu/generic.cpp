// SPDX-License-Identifier: MIT
// The loops for any processor. On x86-64 without FMA every multiply_add calls the C library: slow, and the same bits.
#include "half.h"

#define FASTDIFF_ISA generic
#include "step_loop.inc"
// After the step's loops, whose conversions they use.
#include "reduce_loop.inc"
#include "select_loop.inc"
