# SPDX-License-Identifier: MIT
"""Sums a sample in Triton, in the order of csrc/reduce_math.h.

`tl.sum` adds in an order of the compiler's choosing.  Here each lane's sum is a loop and the lanes are folded by
reshaping and splitting, so that the order is the program's: the same bits as the CPU and CUDA.
"""

from __future__ import annotations

import struct

import torch

import triton
import triton.language as tl

from .config import FEW_WARPS, config_for
from .launch import Launcher, blocks_of

_LANES = tl.constexpr(64)
_ROUNDS = tl.constexpr(16)
_BLOCK = tl.constexpr(1024)
_MEAN = tl.constexpr(0)
_STD = tl.constexpr(1)
_NORM = tl.constexpr(2)
_DOT = tl.constexpr(3)


@triton.jit
def _divide(a, b):
    """a/b, rounded once; Triton's plain float32 division is approximate."""
    if a.dtype == tl.float32:  # noqa: SIM108 (Triton compiles only the branch taken)
        result = tl.div_rn(a, b)
    else:
        result = a / b
    return result


@triton.jit
def _halve(lanes, N: tl.constexpr, HALF: tl.constexpr):
    """[N, 2·HALF] to [N, HALF]: lane i takes lane i + HALF."""
    low, high = tl.split(tl.permute(tl.reshape(lanes, (N, 2, HALF)), (0, 2, 1)))
    return low + high


@triton.jit
def fold(lanes, N: tl.constexpr):
    """Fold the 64 lanes of each of N blocks in halves."""
    lanes = _halve(lanes, N, 32)
    lanes = _halve(lanes, N, 16)
    lanes = _halve(lanes, N, 8)
    lanes = _halve(lanes, N, 4)
    lanes = _halve(lanes, N, 2)
    return tl.reshape(_halve(lanes, N, 1), (N,))


@triton.jit
def _sum_kernel(
    x_ptr,  # [batch, inner]
    y_ptr,  # of a dot product, else x
    partials_ptr,  # [batch, blocks, 1 or 3], compute dtype
    inner,
    blocks,
    programs_per_sample,
    KIND: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    compute = partials_ptr.dtype.element_ty
    program = tl.program_id(0).to(tl.int64)
    b = program // programs_per_sample
    j = (program % programs_per_sample) * BLOCKS + tl.arange(0, BLOCKS)
    first = j[:, None] * _BLOCK + tl.arange(0, _LANES)[None, :]
    base = b * inner
    lanes = tl.zeros((BLOCKS, _LANES), compute)
    for r in tl.static_range(_ROUNDS):
        offsets = first + r * _LANES
        mask = offsets < inner
        x = tl.load(x_ptr + base + offsets, mask=mask, other=0.0).to(compute)
        if KIND == _DOT:
            lanes = tl.fma(x, tl.load(y_ptr + base + offsets, mask=mask, other=0.0).to(compute), lanes)
        elif KIND == _NORM:
            lanes = tl.fma(x, x, lanes)
        else:
            lanes += x
    total = fold(lanes, BLOCKS)
    there = j < blocks
    if KIND != _STD:
        tl.store(partials_ptr + b * blocks + j, total, mask=there)
    else:
        count = tl.minimum(tl.maximum(inner - j * _BLOCK, 1), _BLOCK)
        center = _divide(total, count.to(compute))
        rests = tl.zeros((BLOCKS, _LANES), compute)
        squares = tl.zeros((BLOCKS, _LANES), compute)
        # The second look finds the block in the cache.
        for r in tl.static_range(_ROUNDS):
            offsets = first + r * _LANES
            mask = offsets < inner
            x = tl.load(x_ptr + base + offsets, mask=mask, other=0.0).to(compute)
            away = tl.where(mask, x - center[:, None], 0.0)
            rests += away
            squares = tl.fma(away, away, squares)
        parts = partials_ptr + (b * blocks + j) * 3
        tl.store(parts, center, mask=there)
        tl.store(parts + 1, fold(rests, BLOCKS), mask=there)
        tl.store(parts + 2, fold(squares, BLOCKS), mask=there)


@triton.jit
def _block_numbers(partials_ptr, b, start, inner, blocks):
    """Return for 64 blocks whether they exist, their elements, c and Σ(x−c) in float64."""
    j = start + tl.arange(0, _LANES)
    there = j < blocks
    parts = partials_ptr + (b * blocks + j) * 3
    n = tl.minimum(tl.maximum(inner - j.to(tl.int64) * _BLOCK, 1), _BLOCK).to(tl.float64)
    center = tl.load(parts, mask=there, other=0.0).to(tl.float64)
    rest = tl.load(parts + 1, mask=there, other=0.0).to(tl.float64)
    return there, n, center, rest, parts + 2


@triton.jit(do_not_specialize=["correction_bits"])
def _finish_kernel(
    partials_ptr,
    out_ptr,  # [batch], compute dtype
    correction_bits,  # of a float64
    inner,
    blocks,
    KIND: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    # Not `inner.to`: an integer argument that is 1 is a compile-time constant, which has no such method.
    count = tl.zeros((1,), tl.float64) + inner
    lanes = tl.zeros((_LANES,), tl.float64)
    # Not `range`, whose bounds the interpreter cannot take from a tensor with numpy 2.4.
    start = b * 0
    while start < blocks:
        if KIND == _STD:
            there, n, center, rest, _ = _block_numbers(partials_ptr, b, start, inner, blocks)
            lanes += tl.where(there, tl.fma(n, center, rest), 0.0)
        else:
            j = start + tl.arange(0, _LANES)
            lanes += tl.load(partials_ptr + b * blocks + j, mask=j < blocks, other=0.0).to(tl.float64)
        start += _LANES
    value = fold(tl.reshape(lanes, (1, _LANES)), 1)
    if KIND == _MEAN:
        value = value / count
    elif KIND == _NORM:
        value = tl.sqrt(value)
    elif KIND == _STD:
        mean = value / count
        lanes = tl.zeros((_LANES,), tl.float64)
        start = b * 0
        while start < blocks:
            there, n, center, rest, squares_ptr = _block_numbers(partials_ptr, b, start, inner, blocks)
            squares = tl.load(squares_ptr, mask=there, other=0.0).to(tl.float64)
            share = 1.0 / n
            own = tl.fma(-(rest * share), rest, squares)
            away = tl.fma(tl.fma(n, center, rest), share, tl.zeros_like(n) - mean)
            lanes += tl.where(there, tl.fma(n * away, away, own), 0.0)
            start += _LANES
        spread = fold(tl.reshape(lanes, (1, _LANES)), 1)
        spread = tl.where(spread < 0.0, 0.0, spread)
        freedom = count - correction_bits.to(tl.int64).to(tl.float64, bitcast=True)
        value = tl.sqrt(spread / tl.where(freedom < 0.0, 0.0, freedom))
    tl.store(out_ptr + b + tl.arange(0, 1), value.to(out_ptr.dtype.element_ty))


_sum = Launcher(_sum_kernel)
_finish = Launcher(_finish_kernel)


def reduce(kind: int, x: torch.Tensor, y: torch.Tensor | None, correction: float) -> torch.Tensor:
    """Mean (0), standard deviation (1), norm (2) or scalar product (3) of samples that are blocks of memory."""
    batch = x.shape[0]
    inner = x.numel() // batch
    blocks = blocks_of(inner, _BLOCK.value)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    partials = torch.empty(batch * blocks * (3 if kind == _STD.value else 1), dtype=dtype, device=x.device)
    out = torch.empty(batch, dtype=dtype, device=x.device)
    config = config_for("sum", x)
    programs = blocks_of(blocks, config.block)
    _sum(
        batch * programs,
        (x, x if y is None else y, partials),
        (inner, blocks, programs),
        (kind, config.block),
        config.num_warps,
    )
    _finish(batch, (partials, out), (float_bits(correction), inner, blocks), (kind,), FEW_WARPS)
    return out


def float_bits(value: float) -> int:
    """A float64 as an integer: Triton would take a float argument as float32."""
    return int(struct.unpack("<q", struct.pack("<d", value))[0])
