# SPDX-License-Identifier: MIT
"""The Gram matrix of a sample in Triton, in the order of csrc/reduce_math.h.

A program takes a few blocks of 1024 elements and sums one product after another: the first look at a tensor brings its
blocks into the cache, where the later ones find them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

import triton
import triton.language as tl

from .config import FEW_WARPS, config_for
from .launch import Launcher, blocks_of
from .reduce import fold

_LANES = tl.constexpr(64)
_ROUNDS = tl.constexpr(16)
_BLOCK = tl.constexpr(1024)


@triton.jit
def _pointer(x0, x1, x2, x3, x4, x5, INDEX: tl.constexpr):
    """Return the pointer of tensor INDEX."""
    if INDEX == 0:
        pointer = x0
    elif INDEX == 1:
        pointer = x1
    elif INDEX == 2:
        pointer = x2
    elif INDEX == 3:
        pointer = x3
    elif INDEX == 4:
        pointer = x4
    else:
        pointer = x5
    return pointer


@triton.jit
def _products(x_ptr, y_ptr, first, inner, compute: tl.constexpr, BLOCKS: tl.constexpr, SUM: tl.constexpr):
    """Return the scalar products of blocks of x and y, or the sums of those of x."""
    lanes = tl.zeros((BLOCKS, _LANES), compute)
    for r in tl.static_range(_ROUNDS):
        offsets = first + r * _LANES
        mask = offsets < inner
        x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(compute)
        if SUM:
            lanes += x
        else:
            lanes = tl.fma(x, tl.load(y_ptr + offsets, mask=mask, other=0.0).to(compute), lanes)
    return fold(lanes, BLOCKS)


@triton.jit
def _gram_kernel(
    x0_ptr,  # [batch, inner]; those beyond K are the first again
    x1_ptr,
    x2_ptr,
    x3_ptr,
    x4_ptr,
    x5_ptr,
    partials_ptr,  # [batch, blocks, PARTS], compute dtype
    inner,
    blocks,
    programs_per_sample,
    K: tl.constexpr,
    SUMS: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    compute: tl.constexpr = partials_ptr.dtype.element_ty
    program = tl.program_id(0).to(tl.int64)
    b = program // programs_per_sample
    j = (program % programs_per_sample) * BLOCKS + tl.arange(0, BLOCKS)
    first = j[:, None] * _BLOCK + tl.arange(0, _LANES)[None, :]
    base = b * inner
    parts = partials_ptr + (b * blocks + j) * PARTS
    there = j < blocks
    for i in tl.static_range(K):
        x_ptr = _pointer(x0_ptr, x1_ptr, x2_ptr, x3_ptr, x4_ptr, x5_ptr, i) + base
        for k in tl.static_range(i, K):
            y_ptr = _pointer(x0_ptr, x1_ptr, x2_ptr, x3_ptr, x4_ptr, x5_ptr, k) + base
            total = _products(x_ptr, y_ptr, first, inner, compute, BLOCKS, False)
            tl.store(parts + (i * K - i * (i - 1) // 2 + k - i), total, mask=there)
        if SUMS:
            total = _products(x_ptr, x_ptr, first, inner, compute, BLOCKS, True)
            tl.store(parts + (K * (K + 1) // 2 + i), total, mask=there)


@triton.jit
def _finish_gram_kernel(
    partials_ptr,
    out_ptr,  # [batch, K, K + SUMS], compute dtype
    blocks,
    K: tl.constexpr,
    SUMS: tl.constexpr,
    PARTS: tl.constexpr,
):
    """One program a part of a sample."""
    program = tl.program_id(0).to(tl.int64)
    b = program // PARTS
    part = (program % PARTS).to(tl.int32)
    lanes = tl.zeros((_LANES,), tl.float64)
    start = b * 0
    while start < blocks:
        j = start + tl.arange(0, _LANES)
        at = (b * blocks + j) * PARTS + part
        lanes += tl.load(partials_ptr + at, mask=j < blocks, other=0.0).to(tl.float64)
        start += _LANES
    value = fold(tl.reshape(lanes, (1, _LANES)), 1).to(out_ptr.dtype.element_ty)
    WIDTH: tl.constexpr = K + SUMS
    sample = out_ptr + b * (K * WIDTH) + tl.arange(0, 1)
    for i in tl.static_range(K):
        for k in tl.static_range(i, K):
            here = part == i * K - i * (i - 1) // 2 + k - i
            tl.store(sample + (i * WIDTH + k), value, mask=here)
            tl.store(sample + (k * WIDTH + i), value, mask=here)
        if SUMS:
            tl.store(sample + (i * WIDTH + K), value, mask=part == K * (K + 1) // 2 + i)


_gram = Launcher(_gram_kernel)
_finish = Launcher(_finish_gram_kernel)


def gram(tensors: Sequence[torch.Tensor], sums: bool) -> torch.Tensor:
    """Return all scalar products of samples that are blocks of memory, ``[B, K, K]``, the sums as one more column."""
    x, count = tensors[0], len(tensors)
    batch = x.shape[0]
    inner = x.numel() // batch
    blocks = blocks_of(inner, _BLOCK.value)
    parts = count * (count + 1) // 2 + (count if sums else 0)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    partials = torch.empty(batch * blocks * parts, dtype=dtype, device=x.device)
    out = torch.empty((batch, count, count + sums), dtype=dtype, device=x.device)
    config = config_for("sum", x)
    programs = blocks_of(blocks, config.block)
    given = [*tensors, *[x] * (6 - count)]
    _gram(
        batch * programs,
        (*given, partials),
        (inner, blocks, programs),
        (count, int(sums), parts, config.block),
        config.num_warps,
    )
    _finish(batch * parts, (partials, out), (blocks,), (count, int(sums), parts), FEW_WARPS)
    return out
