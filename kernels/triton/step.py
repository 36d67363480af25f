# SPDX-License-Identifier: MIT
"""The fused step as one Triton kernel, for every GPU that Triton compiles for.

The arithmetic is that of csrc/step_math.h, in the same order, each product fused with its sum.  Coefficients are
loaded from the table on the device: as kernel arguments they would cost a launch time each, and be baked into graphs.
"""

from __future__ import annotations

import math
import struct
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

import triton
import triton.language as tl

from .config import config_for
from .launch import Launcher, blocks_of
from .philox import as_int32, how_many, normals, normals_at, step_of

if TYPE_CHECKING:
    from fastdiff.ops.call import StepCall

# The layout of a row; fastdiff/row_layout.py holds the same numbers.
_PREDICTION_SAMPLE = tl.constexpr(0)
_PREDICTION_OUTPUT = tl.constexpr(1)
_CLIP = tl.constexpr(2)
_VARIANCE_OFFSET = tl.constexpr(3)
_VARIANCE_SLOPE = tl.constexpr(4)
_MODEL_INPUT_SCALE = tl.constexpr(5)
_STORE_0 = tl.constexpr(6)
_STORE_1 = tl.constexpr(7)
_PREV_SAMPLE = tl.constexpr(8)
_KEEP_0 = tl.constexpr(16)
_KEEP_1 = tl.constexpr(24)
_HISTORY_0 = tl.constexpr(3)  # columns of a map
_NOISE = tl.constexpr(7)
_ROW_WIDTH = tl.constexpr(32)

_LEARNED_RANGE = tl.constexpr(1)


@triton.jit
def _divide(a, b):
    """Return a/b, rounded once; Triton's plain float32 division is approximate."""
    if a.dtype == tl.float32:  # noqa: SIM108 (Triton compiles only the branch taken)
        result = tl.div_rn(a, tl.zeros_like(a) + b)
    else:
        result = a / b
    return result


@triton.jit
def _clamp_to(value, bound):
    """Clamp to ±bound by comparisons, which keep NaN; the upper bound last, as torch.clamp has it."""
    value = tl.where(value < -bound, -bound, value)
    return tl.where(value > bound, bound, value)


@triton.jit
def _exp(x):
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
def _learned_std(v, row_ptr, VARIANCE: tl.constexpr):
    if VARIANCE == _LEARNED_RANGE:
        slope = tl.load(row_ptr + _VARIANCE_SLOPE)
        std = _exp(tl.fma(tl.zeros_like(v) + slope, v, tl.load(row_ptr + _VARIANCE_OFFSET)))
    elif v.dtype == tl.float32:
        std = tl.sqrt_rn(v)
    else:
        std = tl.sqrt(v)
    return std


@triton.jit
def _add_term(total, weight_ptr, term):
    """Return total + weight·term, without the term where its weight is 0."""
    weight = tl.load(weight_ptr)
    return tl.where(weight != 0, tl.fma(tl.zeros_like(term) + weight, term, total), total)


@triton.jit
def _weighted_sum(map_ptr, x, m, d, h0, h1, h2, h3, z, HISTORY: tl.constexpr, HAS_NOISE: tl.constexpr):
    """Return one affine map; `map_ptr` points at its eight weights."""
    total = tl.zeros_like(x)
    total = _add_term(total, map_ptr, x)
    total = _add_term(total, map_ptr + 1, m)
    total = _add_term(total, map_ptr + 2, d)
    if HISTORY & 1:
        total = _add_term(total, map_ptr + 3, h0)
    if HISTORY & 2:
        total = _add_term(total, map_ptr + 4, h1)
    if HISTORY & 4:
        total = _add_term(total, map_ptr + 5, h2)
    if HISTORY & 8:
        total = _add_term(total, map_ptr + 6, h3)
    if HAS_NOISE:
        total = _add_term(total, map_ptr + 7, z)
    return total


@triton.jit
def _reads(row_ptr, column, zero, MAPS: tl.constexpr):
    """Return whether one of the row's first maps has a coefficient in this column, in the shape of `zero`."""
    reads = zero + tl.load(row_ptr + _PREV_SAMPLE + column) != 0
    if MAPS >= 2:
        reads = reads | (zero + tl.load(row_ptr + _KEEP_0 + column) != 0)
    if MAPS >= 3:
        reads = reads | (zero + tl.load(row_ptr + _KEEP_1 + column) != 0)
    return reads


@triton.jit
def _history_slot(
    pointer, here, mask, like, row_ptr, j: tl.constexpr, PRESENT: tl.constexpr, WRITE_HISTORY: tl.constexpr,
    MAPS: tl.constexpr,
):  # fmt: skip
    """Load history slot j; `like`, which no sum will read, where it is absent."""
    value = like
    if PRESENT:
        if WRITE_HISTORY:  # the slots serve all solvers, and most rows read few of them
            mask = mask & _reads(row_ptr, _HISTORY_0 + j, tl.zeros_like(like), MAPS)
        value = tl.load(pointer + here, mask=mask, other=0.0).to(like.dtype)
    return value


@triton.jit
def _as_stored(value, pointer):
    """Round a value to a tensor's dtype; double goes to a half type by way of float, as in torch."""
    if pointer.dtype.element_ty.primitive_bitwidth == 16:
        value = value.to(tl.float32)
    return value.to(pointer.dtype.element_ty)


@triton.jit
def _store_kept(
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
    tl.store(pointer + here, _as_stored(value, history_0_ptr), mask=mask & there)


@triton.jit
def _store_kept_mixed(
    value, slot, here, mask, history_0_ptr, history_1_ptr, history_2_ptr, history_3_ptr, HISTORY: tl.constexpr
):  # fmt: skip
    """Store as `_store_kept` to slots with dtypes of their own: a store for each, of which one or none is done."""
    slot = tl.zeros_like(value) + slot
    if HISTORY & 1:
        tl.store(history_0_ptr + here, _as_stored(value, history_0_ptr), mask=mask & (slot == 0))
    if HISTORY & 2:
        tl.store(history_1_ptr + here, _as_stored(value, history_1_ptr), mask=mask & (slot == 1))
    if HISTORY & 4:
        tl.store(history_2_ptr + here, _as_stored(value, history_2_ptr), mask=mask & (slot == 2))
    if HISTORY & 8:
        tl.store(history_3_ptr + here, _as_stored(value, history_3_ptr), mask=mask & (slot == 3))


@triton.jit
def _write_model_input(pointer, here, copy_stride, scale, sample, mask, compute: tl.constexpr, COPIES: tl.constexpr):
    """Store the next model input: scale times the sample as it has been rounded."""
    scaled = _as_stored(scale * sample.to(compute), pointer)
    tl.store(pointer + here, scaled, mask=mask)
    if COPIES == 2:
        tl.store(pointer + copy_stride + here, scaled, mask=mask)


@triton.jit
def _guidance_scale(pointer, b, bits, SCALES: tl.constexpr, compute: tl.constexpr):
    if SCALES == 2:
        scale = tl.load(pointer + b)
    elif SCALES == 1:
        scale = tl.load(pointer)
    elif compute == tl.float64:
        scale = bits.to(tl.int64).to(tl.float64, bitcast=True)
    else:
        scale = bits.to(tl.int32).to(tl.float32, bitcast=True)
    return scale


# Scalars that change from step to step: only their type may matter to the compiler.
@triton.jit(do_not_specialize=["row_index", "num_rows", "noise_step", "purpose", "channels", "guidance_bits"])
def _step_kernel(
    # The tensors of `fastdiff.ops.call.STEP_ARGUMENTS` in their order, then the outputs.
    sample_ptr,  # [batch, inner], as all tensors like the samples; each of any dtype
    model_output_ptr,
    table_ptr,  # [num_rows, 32], compute dtype
    row_indices_ptr,  # [1] or [batch], int64, as are seeds and noise_steps
    uncond_ptr,
    guidance_scale_ptr,  # [1] or [batch], compute dtype
    history_0_ptr,
    history_1_ptr,
    history_2_ptr,
    history_3_ptr,
    noise_ptr,
    variance_ptr,
    threshold_ptr,  # [batch], compute dtype
    seeds_ptr,  # [batch]
    noise_steps_ptr,
    prev_sample_ptr,
    keep_0_ptr,
    keep_1_ptr,
    model_input_ptr,  # [MODEL_INPUTS, batch, inner], any dtype
    row_index,
    num_rows,
    noise_step,
    purpose,
    channels,  # of channels-last memory, in which noise finds its places
    guidance_bits,  # the guidance scale in the compute dtype, as an integer of the same bits
    inner,
    model_stride,  # elements from sample to sample in model_output, uncond and variance
    copy_stride,  # elements from one copy of the model input to the other
    blocks_per_sample,
    HAS_UNCOND: tl.constexpr,
    GUIDANCE_SCALES: tl.constexpr,  # 0: `guidance_bits`; 1: one in memory for all; 2: one a sample
    HISTORY: tl.constexpr,  # bit j: slot j is there
    HAS_NOISE: tl.constexpr,
    HAS_THRESHOLD: tl.constexpr,
    VARIANCE: tl.constexpr,
    KEEPS: tl.constexpr,
    ROWS: tl.constexpr,  # 0: `row`; 1: one in memory for all; 2: one a sample
    WRITE_HISTORY: tl.constexpr,  # kept outputs go to the history slots that the row names
    MIXED_HISTORY: tl.constexpr,  # slots with dtypes of their own
    DRAWS: tl.constexpr,  # 0: no; 1: noise in row-major memory; 2: in channels-last memory
    NOISE_STEPS: tl.constexpr,  # as ROWS
    MODEL_INPUTS: tl.constexpr,  # copies of the model input, 0 to 2
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    b = program // blocks_per_sample
    first = (program % blocks_per_sample) * BLOCK
    offsets = first + tl.arange(0, BLOCK)
    mask = offsets < inner
    here = b * inner + offsets
    there = b * model_stride + offsets
    compute = table_ptr.dtype.element_ty

    index = row_index.to(tl.int64)
    if ROWS:
        index = tl.load(row_indices_ptr + b) if ROWS == 2 else tl.load(row_indices_ptr)
        if (index < 0) | (index >= num_rows):  # the sample is skipped
            stays = tl.load(sample_ptr + here, mask=mask, other=0.0)
            if prev_sample_ptr.dtype != sample_ptr.dtype:
                stays = _as_stored(stays, prev_sample_ptr)
            tl.store(prev_sample_ptr + here, stays, mask=mask)
            if MODEL_INPUTS:
                _write_model_input(model_input_ptr, here, copy_stride, 1.0, stays, mask, compute, MODEL_INPUTS)
            return
    row_ptr = table_ptr + index * _ROW_WIDTH
    MAPS: tl.constexpr = 3 if WRITE_HISTORY else 1 + KEEPS

    x = tl.load(sample_ptr + here, mask=mask, other=0.0).to(compute)
    m = tl.load(model_output_ptr + there, mask=mask, other=0.0).to(compute)
    if HAS_UNCOND:
        u = tl.load(uncond_ptr + there, mask=mask, other=0.0).to(compute)
        g = _guidance_scale(guidance_scale_ptr, b, guidance_bits, GUIDANCE_SCALES, compute)
        m = tl.fma(tl.zeros_like(m) + g, m - u, u)

    p = tl.load(row_ptr + _PREDICTION_SAMPLE)
    d = tl.where(p != 0, p * x, 0.0)
    d = _add_term(d, row_ptr + _PREDICTION_OUTPUT, m)
    d = _clamp_to(d, tl.load(row_ptr + _CLIP))
    if HAS_THRESHOLD:
        threshold = tl.load(threshold_ptr + b)
        d = _divide(_clamp_to(d, threshold), threshold)

    h0 = _history_slot(history_0_ptr, here, mask, x, row_ptr, 0, HISTORY & 1, WRITE_HISTORY, MAPS)
    h1 = _history_slot(history_1_ptr, here, mask, x, row_ptr, 1, HISTORY & 2, WRITE_HISTORY, MAPS)
    h2 = _history_slot(history_2_ptr, here, mask, x, row_ptr, 2, HISTORY & 4, WRITE_HISTORY, MAPS)
    h3 = _history_slot(history_3_ptr, here, mask, x, row_ptr, 3, HISTORY & 8, WRITE_HISTORY, MAPS)
    z = x
    if HAS_NOISE:
        z = tl.load(noise_ptr + here, mask=mask, other=0.0).to(compute)
    if DRAWS:
        z = tl.zeros_like(x)
        if _reads(row_ptr, _NOISE, 0.0, MAPS):
            seed = tl.load(seeds_ptr + b)
            step = step_of(noise_steps_ptr, b, noise_step, NOISE_STEPS)
            if DRAWS == 2:
                # int32 where `inner` is: its division is several times as fast. Not `inner.dtype`: an integer argument
                # that is 1 is a compile-time constant, which has none.
                at = offsets.to((tl.program_id(0) + inner).dtype)
                place = at % channels * (inner // channels) + at // channels
                z = normals_at(place.to(tl.int64), seed, step, purpose.to(tl.uint32)).to(compute)
            else:
                z = normals(first, seed, step, purpose.to(tl.uint32), BLOCK).to(compute)
    if VARIANCE:
        v = tl.load(variance_ptr + there, mask=mask, other=1.0).to(compute)
        z = z * _learned_std(v, row_ptr, VARIANCE)

    # Outputs may be inputs: everything is loaded above before the first store.
    HAS_Z: tl.constexpr = HAS_NOISE or DRAWS > 0
    prev = _weighted_sum(row_ptr + _PREV_SAMPLE, x, m, d, h0, h1, h2, h3, z, HISTORY, HAS_Z)
    prev = _as_stored(prev, prev_sample_ptr)
    if MAPS >= 2:
        keep_0 = _weighted_sum(row_ptr + _KEEP_0, x, m, d, h0, h1, h2, h3, z, HISTORY, HAS_Z)
        if WRITE_HISTORY:
            slot = tl.load(row_ptr + _STORE_0)
            if MIXED_HISTORY:
                _store_kept_mixed(
                    keep_0, slot, here, mask, history_0_ptr, history_1_ptr, history_2_ptr, history_3_ptr, HISTORY
                )
            else:
                _store_kept(
                    keep_0, slot, here, mask, history_0_ptr, history_1_ptr, history_2_ptr, history_3_ptr, HISTORY
                )
        else:
            tl.store(keep_0_ptr + here, _as_stored(keep_0, keep_0_ptr), mask=mask)
    if MAPS >= 3:
        keep_1 = _weighted_sum(row_ptr + _KEEP_1, x, m, d, h0, h1, h2, h3, z, HISTORY, HAS_Z)
        if WRITE_HISTORY:
            slot = tl.load(row_ptr + _STORE_1)
            if MIXED_HISTORY:
                _store_kept_mixed(
                    keep_1, slot, here, mask, history_0_ptr, history_1_ptr, history_2_ptr, history_3_ptr, HISTORY
                )
            else:
                _store_kept(
                    keep_1, slot, here, mask, history_0_ptr, history_1_ptr, history_2_ptr, history_3_ptr, HISTORY
                )
        else:
            tl.store(keep_1_ptr + here, _as_stored(keep_1, keep_1_ptr), mask=mask)
    tl.store(prev_sample_ptr + here, prev, mask=mask)
    if MODEL_INPUTS:
        scale = tl.load(row_ptr + _MODEL_INPUT_SCALE)
        _write_model_input(model_input_ptr, here, copy_stride, scale, prev, mask, compute, MODEL_INPUTS)


_step = Launcher(_step_kernel)


class Arguments(NamedTuple):
    """The arguments of `Launcher.__call__` for one step."""

    programs: int
    tensors: list[Tensor]
    integers: tuple[int, ...]
    constants: tuple[int, ...]
    num_warps: int


def launch(call: StepCall) -> Any:
    """Run a canonical call (see `fastdiff.ops.canonicalize`) on the current stream of its device.

    Returns what Triton compiled, where it is cached.
    """
    return _step(*arguments(call))


def arguments(call: StepCall) -> Arguments:
    """Return the launch of a canonical call."""
    x, row, noise_step, scale = call.sample, call.row_index, call.noise_step, call.guidance_scale
    batch, inner, model_stride = call.blocks()
    draws = channels = 0
    if call.seeds is not None:
        channels = call.channels()
        draws = 1 if channels == 1 else 2
    config = config_for("draw" if draws else "step", x)
    blocks_per_sample = blocks_of(inner, config.block)
    rows, noise_steps, scales = how_many(row), how_many(noise_step), how_many(scale)
    history = (*call.history, None, None, None, None)[:4]
    outputs = (*call.targets, None, None)[:3]
    # The sample stands for what is absent: the kernel does not read it there.
    tensors = [
        x if tensor is None else tensor
        for tensor in (
            x,
            call.model_output,
            call.table,
            row if rows else None,
            call.uncond,
            scale if scales else None,
            *history,
            call.noise,
            call.variance,
            call.threshold,
            call.seeds,
            noise_step if noise_steps else None,
            *outputs,
            call.model_input,
        )
    ]
    slots = tensors[6:10]
    mixed_history = call.write_history and any(h.dtype is not slots[0].dtype for h in slots)
    present = [h is not None for h in history]
    return Arguments(
        batch * blocks_per_sample,
        tensors,
        (
            0 if rows else row,
            call.table.shape[0],
            0 if noise_steps else as_int32(noise_step),
            as_int32(call.purpose),
            channels,
            0 if scales or scale is None else bits_of(scale, call.table.dtype),
            inner,
            model_stride,
            batch * inner,
            blocks_per_sample,
        ),
        (
            call.uncond is not None,  # HAS_UNCOND, and so on in the kernel's order
            scales,
            present[0] + 2 * present[1] + 4 * present[2] + 8 * present[3],
            call.noise is not None,
            call.threshold is not None,
            # Without noise nothing is scaled, and the variance is not read.
            int(call.variance_kind) if draws or call.noise is not None else 0,
            call.keeps,
            rows,
            call.write_history,
            mixed_history,
            draws,
            noise_steps,
            0 if call.model_input is None else call.model_input.numel() // x.numel(),
            config.block,
        ),
        config.num_warps,
    )


def bits_of(number: float, dtype: torch.dtype) -> int:
    """Return the integer with the bits of a number in float32 or float64."""
    if dtype == torch.float64:
        return int(struct.unpack("<q", struct.pack("<d", number))[0])
    try:
        return int(struct.unpack("<i", struct.pack("<f", number))[0])
    except OverflowError:  # beyond float32
        return int(struct.unpack("<i", struct.pack("<f", math.copysign(math.inf, number)))[0])
