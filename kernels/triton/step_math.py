# SPDX-License-Identifier: MIT
"""Parts of the step kernel: the layout of a row, and the arithmetic of csrc/step_math.h in its order."""

from __future__ import annotations

import triton
import triton.language as tl

# The layout of a row; fastdiff/row_layout.py holds the same numbers.
PREDICTION_SAMPLE = tl.constexpr(0)
PREDICTION_OUTPUT = tl.constexpr(1)
CLIP = tl.constexpr(2)
VARIANCE_OFFSET = tl.constexpr(3)
VARIANCE_SLOPE = tl.constexpr(4)
MODEL_INPUT_SCALE = tl.constexpr(5)
STORE_0 = tl.constexpr(6)
STORE_1 = tl.constexpr(7)
PREV_SAMPLE = tl.constexpr(8)
KEEP_0 = tl.constexpr(16)
KEEP_1 = tl.constexpr(24)
HISTORY_0 = tl.constexpr(3)  # columns of a map
NOISE = tl.constexpr(7)
ROW_WIDTH = tl.constexpr(32)

LEARNED_RANGE = tl.constexpr(1)


@triton.jit
def divide(a, b):
    """Return a/b, rounded once; Triton's plain float32 division is approximate."""
    if a.dtype == tl.float32:  # noqa: SIM108 (Triton compiles only the branch taken)
        result = tl.div_rn(a, tl.zeros_like(a) + b)
    else:
        result = a / b
    return result


@triton.jit
def clamp_to(value, bound):
    """Clamp to ±bound by comparisons, which keep NaN; the upper bound last, as torch.clamp has it."""
    value = tl.where(value < -bound, -bound, value)
    return tl.where(value > bound, bound, value)


@triton.jit
def exp(x):
    """Return e^x to a few units in the last place; Triton's float32 exp multiplies by log2(e) and loses |x| of them."""
    if x.dtype == tl.float32:
        n = tl.floor(x * 1.4426950408889634 + 0.5)
        # ln 2 in two parts, the first with few enough bits that n times it is exact.
        r = tl.fma(n, tl.full(n.shape, -0.693145751953125, n.dtype), x)
        r = tl.fma(n, tl.full(n.shape, -1.42860682030941723e-6, n.dtype), r)
        result = tl.exp2(n) * tl.exp(r)
    else:
        result = tl.exp(x)
    return result


@triton.jit
def learned_std(v, row_ptr, VARIANCE: tl.constexpr):
    """Return the factor of the noise that the model's second output gives."""
    if VARIANCE == LEARNED_RANGE:
        slope = tl.load(row_ptr + VARIANCE_SLOPE)
        std = exp(tl.fma(tl.zeros_like(v) + slope, v, tl.load(row_ptr + VARIANCE_OFFSET)))
    elif v.dtype == tl.float32:
        std = tl.sqrt_rn(v)
    else:
        std = tl.sqrt(v)
    return std


@triton.jit
def add_term(total, weight_ptr, term):
    """Return total + weight·term, without the term where its weight is 0."""
    weight = tl.load(weight_ptr)
    return tl.where(weight != 0, tl.fma(tl.zeros_like(term) + weight, term, total), total)


@triton.jit
def weighted_sum(map_ptr, x, m, d, h0, h1, h2, h3, z, HISTORY: tl.constexpr, HAS_NOISE: tl.constexpr):
    """Return one affine map; `map_ptr` points at its eight weights."""
    total = tl.zeros_like(x)
    total = add_term(total, map_ptr, x)
    total = add_term(total, map_ptr + 1, m)
    total = add_term(total, map_ptr + 2, d)
    if HISTORY & 1:
        total = add_term(total, map_ptr + 3, h0)
    if HISTORY & 2:
        total = add_term(total, map_ptr + 4, h1)
    if HISTORY & 4:
        total = add_term(total, map_ptr + 5, h2)
    if HISTORY & 8:
        total = add_term(total, map_ptr + 6, h3)
    if HAS_NOISE:
        total = add_term(total, map_ptr + 7, z)
    return total


@triton.jit
def blend(prev, target, mask):
    """Return prev + mask·(target − prev): exactly `prev` where the mask is 0, exactly `target` where it is 1."""
    soft = tl.fma(mask, target, (1.0 - mask) * prev)
    return tl.where(mask == 0, prev, tl.where(mask == 1, target, soft))


@triton.jit
def reads(row_ptr, column, zero, MAPS: tl.constexpr):
    """Return whether one of the row's first maps has a coefficient in this column, in the shape of `zero`."""
    reads = zero + tl.load(row_ptr + PREV_SAMPLE + column) != 0
    if MAPS >= 2:
        reads = reads | (zero + tl.load(row_ptr + KEEP_0 + column) != 0)
    if MAPS >= 3:
        reads = reads | (zero + tl.load(row_ptr + KEEP_1 + column) != 0)
    return reads


@triton.jit
def history_slot(
    pointer, here, mask, like, row_ptr, j: tl.constexpr, PRESENT: tl.constexpr, WRITE_HISTORY: tl.constexpr,
    MAPS: tl.constexpr,
):  # fmt: skip
    """Load history slot j; `like`, which no sum will read, where it is absent."""
    value = like
    if PRESENT:
        if WRITE_HISTORY:  # the slots serve all solvers, and most rows read few of them
            mask = mask & reads(row_ptr, HISTORY_0 + j, tl.zeros_like(like), MAPS)
        value = tl.load(pointer + here, mask=mask, other=0.0).to(like.dtype)
    return value


@triton.jit
def as_stored(value, pointer):
    """Round a value to a tensor's dtype; double goes to a half type by way of float, as in torch."""
    if pointer.dtype.element_ty.primitive_bitwidth == 16:
        value = value.to(tl.float32)
    return value.to(pointer.dtype.element_ty)


@triton.jit
def store_kept(
    value, slot, here, mask, history_0_ptr, history_1_ptr, history_2_ptr, history_3_ptr, HISTORY: tl.constexpr
):  # fmt: skip
    """Store to the history slot that the row names, of four of one dtype; to none if it is negative or absent."""
    pointer = tl.where(slot == 0, history_0_ptr, history_1_ptr)
    pointer = tl.where(slot == 2, history_2_ptr, pointer)
    pointer = tl.where(slot == 3, history_3_ptr, pointer)
    slot = tl.zeros_like(value) + slot
    there = slot != slot  # false, for a slot number is no NaN
    if HISTORY & 1:
        there = there | (slot == 0)
    if HISTORY & 2:
        there = there | (slot == 1)
    if HISTORY & 4:
        there = there | (slot == 2)
    if HISTORY & 8:
        there = there | (slot == 3)
    tl.store(pointer + here, as_stored(value, history_0_ptr), mask=mask & there)


@triton.jit
def store_kept_mixed(
    value, slot, here, mask, history_0_ptr, history_1_ptr, history_2_ptr, history_3_ptr, HISTORY: tl.constexpr
):  # fmt: skip
    """Store as `store_kept` to slots with dtypes of their own: a store for each, of which one or none is done."""
    slot = tl.zeros_like(value) + slot
    if HISTORY & 1:
        tl.store(history_0_ptr + here, as_stored(value, history_0_ptr), mask=mask & (slot == 0))
    if HISTORY & 2:
        tl.store(history_1_ptr + here, as_stored(value, history_1_ptr), mask=mask & (slot == 1))
    if HISTORY & 4:
        tl.store(history_2_ptr + here, as_stored(value, history_2_ptr), mask=mask & (slot == 2))
    if HISTORY & 8:
        tl.store(history_3_ptr + here, as_stored(value, history_3_ptr), mask=mask & (slot == 3))


@triton.jit
def write_model_input(pointer, here, copy_stride, scale, sample, mask, compute: tl.constexpr, COPIES: tl.constexpr):
    """Store the next model input: scale times the sample as it has been rounded."""
    scaled = as_stored(scale * sample.to(compute), pointer)
    tl.store(pointer + here, scaled, mask=mask)
    if COPIES == 2:
        tl.store(pointer + copy_stride + here, scaled, mask=mask)


@triton.jit
def guidance_scale(pointer, b, bits, SCALES: tl.constexpr, compute: tl.constexpr):
    """Return a sample's guidance scale: from memory, or the number with the bits of an integer."""
    if SCALES == 2:
        scale = tl.load(pointer + b)
    elif SCALES == 1:
        scale = tl.load(pointer)
    elif compute == tl.float64:
        scale = bits.to(tl.int64).to(tl.float64, bitcast=True)
    else:
        scale = bits.to(tl.int32).to(tl.float32, bitcast=True)
    return scale
