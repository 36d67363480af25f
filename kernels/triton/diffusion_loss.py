# SPDX-License-Identifier: MIT
"""The training loss and its gradient in Triton: the operations of csrc/diffusion_loss_math.h in their order.

A program takes blocks of 1024 elements in 16 rounds of 64 lanes, as the sums of reduce.py do.  Drawn noise in row-major
memory is made a chunk of four elements at a time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import triton
import triton.language as tl

from .config import FEW_WARPS, config_for
from .launch import Launcher, blocks_of
from .philox import as_int32, box_muller, how_many, normals_at, step_of, words_at
from .reduce import float_bits, fold
from .step_math import KEEP_0, NOISE, ROW_WIDTH, as_stored, divide

if TYPE_CHECKING:
    from fastdiff.ops.call import StepCall

_LANES = tl.constexpr(64)
_ROUNDS = tl.constexpr(16)
_BLOCK = tl.constexpr(1024)
_L2 = tl.constexpr(0)
_L1 = tl.constexpr(1)


@triton.jit
def _root(x):
    """Return √x, rounded once; Triton's plain float32 root is approximate."""
    if x.dtype == tl.float32:  # noqa: SIM108 (Triton compiles only the branch taken)
        result = tl.sqrt_rn(x)
    else:
        result = tl.sqrt(x)
    return result


@triton.jit
def _number(bits, compute: tl.constexpr):
    """Return a float64 number with the bits of an integer, rounded to the compute dtype."""
    return bits.to(tl.int64).to(tl.float64, bitcast=True).to(compute)


@triton.jit
def _drawn(first, offsets, seed, step, purpose, channels, inner, DRAWS: tl.constexpr, BLOCKS: tl.constexpr):
    """Return the noise of 64 elements from `first` ``[BLOCKS]`` on, ``[BLOCKS, 64]``."""
    if DRAWS == 1:
        chunk = (first // 4).to(tl.int64)[:, None] + tl.arange(0, _LANES // 4).to(tl.int64)[None, :]
        w0, w1, w2, w3 = words_at(chunk, seed, step, purpose)
        z0, z1 = box_muller(w0, w1)
        z2, z3 = box_muller(w2, w3)
        z = tl.interleave(tl.interleave(z0, z2), tl.interleave(z1, z3))
    else:
        place = offsets.to(tl.int64)
        place = place % channels * (inner // channels) + place // channels
        z = normals_at(place, seed, step, purpose)
    return z


@triton.jit(do_not_specialize=["row_index", "num_rows", "noise_step", "purpose", "channels", "c_bits", "square_bits"])
def _diffusion_loss_kernel(
    sample_ptr,  # x0, [batch, inner], as all tensors like the samples; each of any dtype
    output_ptr,
    table_ptr,  # [num_rows, 32], compute dtype
    row_indices_ptr,  # [1] or [batch], int64, as are seeds and noise_steps
    noise_ptr,
    seeds_ptr,  # [batch]
    noise_steps_ptr,
    partials_ptr,  # [batch, blocks], compute dtype
    factor_ptr,  # [batch], compute dtype
    of_output_ptr,  # the gradients
    of_sample_ptr,
    of_noise_ptr,
    row_index,
    num_rows,
    noise_step,
    purpose,
    channels,
    c_bits,  # of float64 numbers, c and c²
    square_bits,
    inner,
    model_stride,
    blocks,
    programs_per_sample,
    LOSS: tl.constexpr,
    ROWS: tl.constexpr,
    DRAWS: tl.constexpr,  # 0: no; 1: noise in row-major memory; 2: in channels-last memory
    NOISE_STEPS: tl.constexpr,
    GRADIENTS: tl.constexpr,  # 0: the loss; else one bit each for those of output, x0 and noise
    BLOCKS: tl.constexpr,
):
    compute: tl.constexpr = table_ptr.dtype.element_ty
    program = tl.program_id(0).to(tl.int64)
    b = program // programs_per_sample
    j = (program % programs_per_sample) * BLOCKS + tl.arange(0, BLOCKS)
    first = j[:, None] * _BLOCK + tl.arange(0, _LANES)[None, :]
    lanes = tl.zeros((BLOCKS, _LANES), compute)
    square = _number(square_bits, compute)

    index = row_index.to(tl.int64)
    if ROWS:
        index = tl.load(row_indices_ptr + b) if ROWS == 2 else tl.load(row_indices_ptr)
    taken = (index >= 0) & (index < num_rows)
    row_ptr = table_ptr + tl.where(taken, index, 0) * ROW_WIDTH + KEEP_0
    # NaN for a skipped sample.
    of_sample = tl.where(taken, tl.load(row_ptr), float("nan"))
    of_noise = tl.where(taken, tl.load(row_ptr + NOISE), float("nan"))

    for r in range(_ROUNDS):
        offsets = first + r * _LANES
        mask = offsets < inner
        here = b * inner + offsets
        at_model = b * model_stride + offsets
        residual = tl.load(output_ptr + at_model, mask=mask, other=0.0).to(compute)
        zeros = tl.zeros_like(residual)
        reads = zeros + of_sample != 0
        x = tl.load(sample_ptr + here, mask=mask & reads, other=0.0).to(compute)
        target = tl.where(reads, tl.fma(zeros + of_sample, x, zeros), zeros)
        if DRAWS:
            if of_noise != 0:
                step = step_of(noise_steps_ptr, b, noise_step, NOISE_STEPS)
                z = _drawn(
                    j * _BLOCK + r * _LANES, offsets, tl.load(seeds_ptr + b), step, purpose.to(tl.uint32), channels,
                    inner, DRAWS, BLOCKS,
                ).to(compute)  # fmt: skip
                target = tl.fma(zeros + of_noise, z, target)
        else:
            noisy = zeros + of_noise != 0
            z = tl.load(noise_ptr + here, mask=mask & noisy, other=0.0).to(compute)
            target = tl.where(noisy, tl.fma(zeros + of_noise, z, target), target)
        residual = residual - target
        if GRADIENTS:
            slope = residual
            if LOSS == _L1:
                slope = tl.where(residual > 0, 1.0, tl.where(residual < 0, -1.0, residual)).to(compute)
            elif LOSS != _L2:
                slope = divide(residual, _root(tl.fma(residual, residual, zeros + square)))
            slope = tl.load(factor_ptr + b) * slope
            if GRADIENTS & 1:
                tl.store(of_output_ptr + at_model, as_stored(slope, of_output_ptr), mask=mask)
            if GRADIENTS & 2:
                scaled = tl.where(taken, -of_sample, 0.0) * slope
                tl.store(of_sample_ptr + here, as_stored(scaled, of_sample_ptr), mask=mask)
            if GRADIENTS & 4:
                scaled = tl.where(taken, -of_noise, 0.0) * slope
                tl.store(of_noise_ptr + here, as_stored(scaled, of_noise_ptr), mask=mask)
        else:
            residual = tl.where(mask, residual, 0.0)
            if LOSS == _L2:
                lanes = tl.fma(residual, residual, lanes)
            elif LOSS == _L1:
                lanes += tl.where(residual < 0, -residual, residual)
            else:
                root = _root(tl.fma(residual, residual, zeros + square))
                lanes += divide(residual * residual, root + _number(c_bits, compute))
    if GRADIENTS == 0:
        tl.store(partials_ptr + b * blocks + j, fold(lanes, BLOCKS), mask=j < blocks)


@triton.jit
def _finish_diffusion_loss_kernel(partials_ptr, out_ptr, inner, blocks):
    b = tl.program_id(0).to(tl.int64)
    lanes = tl.zeros((_LANES,), tl.float64)
    # Not `range`, whose bounds the interpreter cannot take from a tensor with numpy 2.4.
    start = b * 0
    while start < blocks:
        j = start + tl.arange(0, _LANES)
        lanes += tl.load(partials_ptr + b * blocks + j, mask=j < blocks, other=0.0).to(tl.float64)
        start += _LANES
    # Not `inner.to`: an integer argument that is 1 is a compile-time constant, which has no such method.
    value = fold(tl.reshape(lanes, (1, _LANES)), 1) / (tl.zeros((1,), tl.float64) + inner)
    tl.store(out_ptr + b + tl.arange(0, 1), value.to(out_ptr.dtype.element_ty))


_loss = Launcher(_diffusion_loss_kernel)
_finish = Launcher(_finish_diffusion_loss_kernel)


def launch(call: StepCall, loss: int, c: float, factor: Tensor | None, out: list[Any]) -> list[Tensor]:
    """Run a canonical call (see `fastdiff.ops.loss_kernels`) whose samples are blocks.

    Return the losses ``[B]`` or, with `factor`, the gradients of output, x0 and noise for which `out` has a tensor to
    write or the dtype of a new one.
    """
    x, row, noise_step = call.sample, call.row_index, call.noise_step
    batch = x.shape[0]
    inner = x.numel() // batch
    blocks = blocks_of(inner, _BLOCK.value)
    channels = 0 if call.seeds is None else call.channels()
    draws = min(channels, 2)
    config = config_for("sum", x)
    programs = blocks_of(blocks, config.block)
    rows, noise_steps = how_many(row), how_many(noise_step)
    gradients = [torch.empty_like(x, dtype=to) if isinstance(to, torch.dtype) else to for to in out]
    wanted = sum(1 << i for i, to in enumerate(gradients) if to is not None)
    made = gradients
    if factor is None:
        partials = torch.empty(batch * blocks, dtype=call.table.dtype, device=x.device)
        made = [torch.empty(batch, dtype=call.table.dtype, device=x.device)]
        gradients = [None] * 3
    # The sample stands for what is absent: the kernel does not read it there.
    tensors = [
        x if tensor is None else tensor
        for tensor in (
            x,
            call.model_output,
            call.table,
            row if rows else None,
            call.noise,
            call.seeds,
            noise_step if noise_steps else None,
            partials if factor is None else None,
            factor,
            *gradients,
        )
    ]
    _loss(
        batch * programs,
        tensors,
        (
            0 if rows else row,
            call.table.shape[0],
            0 if noise_steps else as_int32(noise_step),
            as_int32(call.purpose),
            channels,
            float_bits(c),
            float_bits(c * c),
            inner,
            call.model_output.stride(0) if batch > 1 else inner,
            blocks,
            programs,
        ),
        (loss, rows, draws, noise_steps, wanted, config.block),
        config.num_warps,
    )
    if factor is None:
        _finish(batch, (partials, made[0]), (inner, blocks), (), FEW_WARPS)
    return [tensor for tensor in made if tensor is not None]
