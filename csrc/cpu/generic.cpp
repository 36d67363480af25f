// SPDX-License-Identifier: MIT
// The loops for any processor. On x86-64 without FMA every multiply_add calls the C library: slow, and the same bits.
#include "../philox.h"
#include "half.h"

#define FASTDIFF_ISA generic
#define FASTDIFF_LANES 1
#include "tile_loops.inc"
#include "philox_loop.inc"
#include "step_loop.inc"
