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
from .step_math import (
    CLIP,
    KEEP_0,
    KEEP_1,
    MODEL_INPUT_SCALE,
    NOISE,
    PREDICTION_OUTPUT,
    PREDICTION_SAMPLE,
    PREV_SAMPLE,
    ROW_WIDTH,
    STORE_0,
    STORE_1,
    add_term,
    as_stored,
    blend,
    clamp_to,
    divide,
    guidance_scale,
    history_slot,
    learned_std,
    reads,
    store_kept,
    store_kept_mixed,
    weighted_sum,
    write_model_input,
)

if TYPE_CHECKING:
    from fastdiff.ops.call import StepCall


# Scalars that change from step to step: only their type may matter to the compiler.
@triton.jit(do_not_specialize=["row_index", "num_rows", "noise_step", "purpose", "channels", "parts", "guidance_bits"])
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
    mask_ptr,
    threshold_ptr,  # [batch], compute dtype
    seeds_ptr,  # [batch / parts]
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
    parts,  # consecutive samples that share a seed, and are counted through
    guidance_bits,  # the guidance scale in the compute dtype, as an integer of the same bits
    inner,
    model_stride,  # elements from sample to sample in model_output, uncond and variance
    copy_stride,  # elements from one copy of the model input to the other
    blocks_per_sample,
    HAS_UNCOND: tl.constexpr,
    GUIDANCE_SCALES: tl.constexpr,  # 0: `guidance_bits`; 1: one in memory for all; 2: one a sample
    HISTORY: tl.constexpr,  # bit j: slot j is there
    HAS_NOISE: tl.constexpr,
    MASKED: tl.constexpr,  # blend prev_sample with the map of keep_1, which is then no output
    HAS_THRESHOLD: tl.constexpr,
    VARIANCE: tl.constexpr,
    KEEPS: tl.constexpr,
    ROWS: tl.constexpr,  # 0: `row`; 1: one in memory for all; 2: one a sample
    WRITE_HISTORY: tl.constexpr,  # kept outputs go to the history slots that the row names
    MIXED_HISTORY: tl.constexpr,  # slots with dtypes of their own
    DRAWS: tl.constexpr,  # 0: no; 1: noise in whole chunks of row-major memory; 2: of any part, of channels-last memory
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
                stays = as_stored(stays, prev_sample_ptr)
            tl.store(prev_sample_ptr + here, stays, mask=mask)
            if MODEL_INPUTS:
                write_model_input(model_input_ptr, here, copy_stride, 1.0, stays, mask, compute, MODEL_INPUTS)
            return
    row_ptr = table_ptr + index * ROW_WIDTH
    # The maps that are computed, and those that are outputs.
    MAPS: tl.constexpr = 3 if WRITE_HISTORY or MASKED else 1 + KEEPS
    OUTPUTS: tl.constexpr = (2 if MASKED else 3) if WRITE_HISTORY else 1 + KEEPS

    x = tl.load(sample_ptr + here, mask=mask, other=0.0).to(compute)
    m = tl.load(model_output_ptr + there, mask=mask, other=0.0).to(compute)
    if HAS_UNCOND:
        u = tl.load(uncond_ptr + there, mask=mask, other=0.0).to(compute)
        g = guidance_scale(guidance_scale_ptr, b, guidance_bits, GUIDANCE_SCALES, compute)
        m = tl.fma(tl.zeros_like(m) + g, m - u, u)

    p = tl.load(row_ptr + PREDICTION_SAMPLE)
    d = tl.where(p != 0, p * x, 0.0)
    d = add_term(d, row_ptr + PREDICTION_OUTPUT, m)
    d = clamp_to(d, tl.load(row_ptr + CLIP))
    if HAS_THRESHOLD:
        threshold = tl.load(threshold_ptr + b)
        d = divide(clamp_to(d, threshold), threshold)

    h0 = history_slot(history_0_ptr, here, mask, x, row_ptr, 0, HISTORY & 1, WRITE_HISTORY, MAPS)
    h1 = history_slot(history_1_ptr, here, mask, x, row_ptr, 1, HISTORY & 2, WRITE_HISTORY, MAPS)
    h2 = history_slot(history_2_ptr, here, mask, x, row_ptr, 2, HISTORY & 4, WRITE_HISTORY, MAPS)
    h3 = history_slot(history_3_ptr, here, mask, x, row_ptr, 3, HISTORY & 8, WRITE_HISTORY, MAPS)
    z = x
    if HAS_NOISE:
        z = tl.load(noise_ptr + here, mask=mask, other=0.0).to(compute)
    if DRAWS:
        z = tl.zeros_like(x)
        if reads(row_ptr, NOISE, 0.0, MAPS):
            seed = tl.load(seeds_ptr + b // parts)
            before = (b % parts) * inner
            step = step_of(noise_steps_ptr, b, noise_step, NOISE_STEPS)
            if DRAWS == 2:
                # int32 where `inner` is: its division is several times as fast. Not `inner.dtype`: an integer argument
                # that is 1 is a compile-time constant, which has none.
                at = offsets.to((tl.program_id(0) + inner).dtype)
                place = at % channels * (inner // channels) + at // channels
                z = normals_at(before + place.to(tl.int64), seed, step, purpose.to(tl.uint32)).to(compute)
            else:
                z = normals(before + first, seed, step, purpose.to(tl.uint32), BLOCK).to(compute)
    if VARIANCE:
        v = tl.load(variance_ptr + there, mask=mask, other=1.0).to(compute)
        z = z * learned_std(v, row_ptr, VARIANCE)

    # Outputs may be inputs: everything is loaded above before the first store.
    HAS_Z: tl.constexpr = HAS_NOISE or DRAWS > 0
    prev = weighted_sum(row_ptr + PREV_SAMPLE, x, m, d, h0, h1, h2, h3, z, HISTORY, HAS_Z)
    if MASKED:
        target = weighted_sum(row_ptr + KEEP_1, x, m, d, h0, h1, h2, h3, z, HISTORY, HAS_Z)
        prev = blend(prev, target, tl.load(mask_ptr + here, mask=mask, other=0.0).to(compute))
    prev = as_stored(prev, prev_sample_ptr)
    if OUTPUTS >= 2:
        keep_0 = weighted_sum(row_ptr + KEEP_0, x, m, d, h0, h1, h2, h3, z, HISTORY, HAS_Z)
        if WRITE_HISTORY:
            slot = tl.load(row_ptr + STORE_0)
            if MIXED_HISTORY:
                store_kept_mixed(
                    keep_0, slot, here, mask, history_0_ptr, history_1_ptr, history_2_ptr, history_3_ptr, HISTORY
                )
            else:
                store_kept(
                    keep_0, slot, here, mask, history_0_ptr, history_1_ptr, history_2_ptr, history_3_ptr, HISTORY
                )
        else:
            tl.store(keep_0_ptr + here, as_stored(keep_0, keep_0_ptr), mask=mask)
    if OUTPUTS >= 3:
        keep_1 = weighted_sum(row_ptr + KEEP_1, x, m, d, h0, h1, h2, h3, z, HISTORY, HAS_Z)
        if WRITE_HISTORY:
            slot = tl.load(row_ptr + STORE_1)
            if MIXED_HISTORY:
                store_kept_mixed(
                    keep_1, slot, here, mask, history_0_ptr, history_1_ptr, history_2_ptr, history_3_ptr, HISTORY
                )
            else:
                store_kept(
                    keep_1, slot, here, mask, history_0_ptr, history_1_ptr, history_2_ptr, history_3_ptr, HISTORY
                )
        else:
            tl.store(keep_1_ptr + here, as_stored(keep_1, keep_1_ptr), mask=mask)
    tl.store(prev_sample_ptr + here, prev, mask=mask)
    if MODEL_INPUTS:
        scale = tl.load(row_ptr + MODEL_INPUT_SCALE)
        write_model_input(model_input_ptr, here, copy_stride, scale, prev, mask, compute, MODEL_INPUTS)


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
    draws = channels = parts = 0
    if call.seeds is not None:
        channels, parts = call.channels(), call.parts
        draws = 1 if channels == 1 and (parts == 1 or inner % 4 == 0) else 2
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
            call.mask,
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
            parts,
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
            call.mask is not None,
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
