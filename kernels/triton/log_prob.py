# SPDX-License-Identifier: MIT
"""A step with its log-probability in Triton: the step of step.py, and the sum of csrc/log_prob_math.h.

A program takes blocks of 1024 elements in 16 rounds of 64 lanes, as the sums of reduce.py do.  Each element is read,
stepped and written once, and the square of its distance from the mean goes to its lane.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

import triton
import triton.language as tl

from .config import FEW_WARPS, config_for
from .launch import Launcher, blocks_of
from .philox import as_int32, how_many, normals_at, step_of
from .reduce import fold
from .step import bits_of
from .step_math import (
    CLIP,
    KEEP_0,
    KEEP_1,
    NOISE,
    PREDICTION_OUTPUT,
    PREDICTION_SAMPLE,
    PREV_SAMPLE,
    ROW_WIDTH,
    add_term,
    as_stored,
    clamp_to,
    divide,
    guidance_scale,
    history_slot,
    weighted_sum,
)

if TYPE_CHECKING:
    from fastdiff.ops.call import StepCall

_LANES = tl.constexpr(64)
_ROUNDS = tl.constexpr(16)
_BLOCK = tl.constexpr(1024)


@triton.jit
def _number(value: tl.constexpr):
    return tl.full((1,), value, tl.float64)


@triton.jit
def _logarithm(x):
    """Return log(x) of positive float64 numbers ``[1]``, by the operations of csrc/log_prob_math.h."""
    bits = x.to(tl.int64, bitcast=True)
    exponent = (bits - 0x3FE6A09E667F3BCD) >> 52
    m = (bits - (exponent << 52)).to(tl.float64, bitcast=True)
    f = (m - 1.0) / (m + 1.0)
    g = f * f
    series = _number(1.0 / 25.0)
    series = tl.fma(series, g, _number(1.0 / 23.0))
    series = tl.fma(series, g, _number(1.0 / 21.0))
    series = tl.fma(series, g, _number(1.0 / 19.0))
    series = tl.fma(series, g, _number(1.0 / 17.0))
    series = tl.fma(series, g, _number(1.0 / 15.0))
    series = tl.fma(series, g, _number(1.0 / 13.0))
    series = tl.fma(series, g, _number(1.0 / 11.0))
    series = tl.fma(series, g, _number(1.0 / 9.0))
    series = tl.fma(series, g, _number(1.0 / 7.0))
    series = tl.fma(series, g, _number(1.0 / 5.0))
    series = tl.fma(series, g, _number(1.0 / 3.0))
    twice = f + f
    return tl.fma(exponent.to(tl.float64), _number(0.69314718055994531), tl.fma(twice * g, series, twice))


@triton.jit(do_not_specialize=["row_index", "num_rows", "noise_step", "purpose", "channels", "guidance_bits"])
def _log_prob_kernel(
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
    noise_ptr,  # the previous sample in a replay
    threshold_ptr,  # [batch], compute dtype
    seeds_ptr,  # [batch]
    noise_steps_ptr,
    prev_sample_ptr,
    keep_0_ptr,
    keep_1_ptr,
    partials_ptr,  # [batch, blocks], compute dtype
    row_index,
    num_rows,
    noise_step,
    purpose,
    channels,
    guidance_bits,
    inner,
    model_stride,
    blocks,
    programs_per_sample,
    HAS_UNCOND: tl.constexpr,
    GUIDANCE_SCALES: tl.constexpr,
    HISTORY: tl.constexpr,
    HAS_THRESHOLD: tl.constexpr,
    KEEPS: tl.constexpr,
    ROWS: tl.constexpr,
    DRAWS: tl.constexpr,  # 0: no; 1: noise in row-major memory; 2: in channels-last memory
    NOISE_STEPS: tl.constexpr,
    REPLAY: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    compute: tl.constexpr = table_ptr.dtype.element_ty
    program = tl.program_id(0).to(tl.int64)
    b = program // programs_per_sample
    j = (program % programs_per_sample) * BLOCKS + tl.arange(0, BLOCKS)
    first = j[:, None] * _BLOCK + tl.arange(0, _LANES)[None, :]
    there = j < blocks
    lanes = tl.zeros((BLOCKS, _LANES), compute)

    index = row_index.to(tl.int64)
    if ROWS:
        index = tl.load(row_indices_ptr + b) if ROWS == 2 else tl.load(row_indices_ptr)
        if (index < 0) | (index >= num_rows):  # the sample is skipped
            if not REPLAY:
                for r in range(_ROUNDS):
                    offsets = first + r * _LANES
                    mask = offsets < inner
                    stays = tl.load(sample_ptr + b * inner + offsets, mask=mask, other=0.0)
                    if prev_sample_ptr.dtype != sample_ptr.dtype:
                        stays = as_stored(stays, prev_sample_ptr)
                    tl.store(prev_sample_ptr + b * inner + offsets, stays, mask=mask)
            tl.store(partials_ptr + b * blocks + j, tl.zeros((BLOCKS,), compute), mask=there)
            return
    row_ptr = table_ptr + index * ROW_WIDTH
    weight = tl.load(row_ptr + PREV_SAMPLE + NOISE)

    for r in range(_ROUNDS):
        offsets = first + r * _LANES
        mask = offsets < inner
        here = b * inner + offsets
        at_model = b * model_stride + offsets
        x = tl.load(sample_ptr + here, mask=mask, other=0.0).to(compute)
        m = tl.load(model_output_ptr + at_model, mask=mask, other=0.0).to(compute)
        if HAS_UNCOND:
            u = tl.load(uncond_ptr + at_model, mask=mask, other=0.0).to(compute)
            g = guidance_scale(guidance_scale_ptr, b, guidance_bits, GUIDANCE_SCALES, compute)
            m = tl.fma(tl.zeros_like(m) + g, m - u, u)
        p = tl.load(row_ptr + PREDICTION_SAMPLE)
        d = tl.where(p != 0, p * x, 0.0)
        d = add_term(d, row_ptr + PREDICTION_OUTPUT, m)
        d = clamp_to(d, tl.load(row_ptr + CLIP))
        if HAS_THRESHOLD:
            threshold = tl.load(threshold_ptr + b)
            d = divide(clamp_to(d, threshold), threshold)
        h0 = history_slot(history_0_ptr, here, mask, x, row_ptr, 0, HISTORY & 1, False, 1)
        h1 = history_slot(history_1_ptr, here, mask, x, row_ptr, 1, HISTORY & 2, False, 1)
        h2 = history_slot(history_2_ptr, here, mask, x, row_ptr, 2, HISTORY & 4, False, 1)
        h3 = history_slot(history_3_ptr, here, mask, x, row_ptr, 3, HISTORY & 8, False, 1)
        mean = weighted_sum(row_ptr + PREV_SAMPLE, x, m, d, h0, h1, h2, h3, x, HISTORY, False)
        if REPLAY:
            prev = tl.load(noise_ptr + here, mask=mask, other=0.0).to(compute)
        else:
            if DRAWS:
                place = offsets.to(tl.int64)
                if DRAWS == 2:
                    place = place % channels * (inner // channels) + place // channels
                step = step_of(noise_steps_ptr, b, noise_step, NOISE_STEPS)
                z = normals_at(place, tl.load(seeds_ptr + b), step, purpose.to(tl.uint32)).to(compute)
            else:
                z = tl.load(noise_ptr + here, mask=mask, other=0.0).to(compute)
            stored = as_stored(add_term(mean, row_ptr + PREV_SAMPLE + NOISE, z), prev_sample_ptr)
            # Outputs may be inputs: everything is loaded above before the first store.
            if KEEPS >= 1:
                keep_0 = weighted_sum(row_ptr + KEEP_0, x, m, d, h0, h1, h2, h3, z, HISTORY, True)
                tl.store(keep_0_ptr + here, as_stored(keep_0, keep_0_ptr), mask=mask)
            if KEEPS >= 2:
                keep_1 = weighted_sum(row_ptr + KEEP_1, x, m, d, h0, h1, h2, h3, z, HISTORY, True)
                tl.store(keep_1_ptr + here, as_stored(keep_1, keep_1_ptr), mask=mask)
            tl.store(prev_sample_ptr + here, stored, mask=mask)
            prev = stored.to(compute)
        apart = tl.where(mask, prev - mean, 0.0)
        lanes = tl.fma(apart, apart, lanes)
    squares = tl.where(weight != 0, fold(lanes, BLOCKS), 0.0)
    tl.store(partials_ptr + b * blocks + j, squares, mask=there)


@triton.jit(do_not_specialize=["row_index", "num_rows"])
def _finish_log_prob_kernel(
    partials_ptr,
    table_ptr,
    row_indices_ptr,
    out_ptr,  # [batch], compute dtype
    row_index,
    num_rows,
    inner,
    blocks,
    ROWS: tl.constexpr,
    MEAN: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    index = row_index.to(tl.int64)
    if ROWS:
        index = tl.load(row_indices_ptr + b) if ROWS == 2 else tl.load(row_indices_ptr)
    taken = (index >= 0) & (index < num_rows)
    at = tl.where(taken, index, 0) * ROW_WIDTH + PREV_SAMPLE + NOISE + tl.arange(0, 1)
    weight = tl.where(taken, tl.load(table_ptr + at).to(tl.float64), 0.0)
    lanes = tl.zeros((_LANES,), tl.float64)
    start = b * 0
    while start < blocks:
        j = start + tl.arange(0, _LANES)
        lanes += tl.load(partials_ptr + b * blocks + j, mask=j < blocks, other=0.0).to(tl.float64)
        start += _LANES
    squares = fold(tl.reshape(lanes, (1, _LANES)), 1)
    # Not `inner.to`: an integer argument that is 1 is a compile-time constant, which has no such method.
    count = tl.zeros((1,), tl.float64) + inner
    sigma = tl.where(weight < 0, -weight, weight)
    noisy = sigma > 0
    divisor = tl.where(noisy, sigma, 1.0)
    apart = -0.5 * (squares / (divisor * divisor))
    constant = _logarithm(divisor) + _number(0.91893853320467274)
    if MEAN:  # noqa: SIM108 (Triton compiles only the branch taken)
        value = apart / count - constant
    else:
        value = tl.fma(-count, constant, apart)
    # A row without noise gives 0, and NaN stays NaN.
    value = tl.where(noisy, value, sigma)
    tl.store(out_ptr + b + tl.arange(0, 1), value.to(out_ptr.dtype.element_ty))


_log_prob = Launcher(_log_prob_kernel)
_finish = Launcher(_finish_log_prob_kernel)


def launch(call: StepCall, replay: bool, mean: bool) -> Tensor:
    """Run a canonical call (see `fastdiff.ops.log_prob`) whose samples are blocks; return the log-probabilities."""
    x, row, noise_step, scale = call.sample, call.row_index, call.noise_step, call.guidance_scale
    batch = x.shape[0]
    inner = x.numel() // batch
    blocks = blocks_of(inner, _BLOCK.value)
    channels = 0 if call.seeds is None else call.channels()
    draws = min(channels, 2)
    config = config_for("sum", x)
    programs = blocks_of(blocks, config.block)
    rows, noise_steps, scales = how_many(row), how_many(noise_step), how_many(scale)
    history = (*call.history, None, None, None, None)[:4]
    outputs = (None, None, None) if replay else (*call.targets, None, None)[:3]
    partials = torch.empty(batch * blocks, dtype=call.table.dtype, device=x.device)
    out = torch.empty(batch, dtype=call.table.dtype, device=x.device)
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
            call.threshold,
            call.seeds,
            noise_step if noise_steps else None,
            *outputs,
            partials,
        )
    ]
    present = [h is not None for h in history]
    _log_prob(
        batch * programs,
        tensors,
        (
            0 if rows else row,
            call.table.shape[0],
            0 if noise_steps else as_int32(noise_step),
            as_int32(call.purpose),
            channels,
            0 if scales or scale is None else bits_of(scale, call.table.dtype),
            inner,
            call.model_output.stride(0) if batch > 1 else inner,
            blocks,
            programs,
        ),
        (
            call.uncond is not None,  # HAS_UNCOND, and so on in the kernel's order
            scales,
            present[0] + 2 * present[1] + 4 * present[2] + 8 * present[3],
            call.threshold is not None,
            call.keeps,
            rows,
            draws,
            noise_steps,
            replay,
            config.block,
        ),
        config.num_warps,
    )
    _finish(
        batch,
        (partials, call.table, tensors[3], out),
        (0 if rows else row, call.table.shape[0], inner, blocks),
        (rows, mean),
        FEW_WARPS,
    )
    return out
