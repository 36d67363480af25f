# SPDX-License-Identifier: MIT
"""The fused step in plain torch: the specification that every other backend is held to.

It runs on any device, is differentiable, and allocates as torch does.  The order of operations is the contract::

    m = u + g·(c − u)
    d = (0 + p·x) + q·m;  clamped to ±clip;  with a threshold s: clamped to ±s and divided by s
    out = ((0 + a_x·x) + a_m·m) + a_d·d + a_0·h_0 + … + a_3·h_3 + a_z·(std·z)

computed in float32 (float64 where a tensor is float64), and each output rounded once to its dtype; z may be drawn from
seeds (`fastdiff.philox`), and then is not rounded to the samples' dtype.  A term whose coefficient is 0 is not added,
so a tensor that a row does not use may be absent, or hold anything.  Compiled backends fuse each product with its sum
(fma); here the product is rounded first, which is why agreement is stated in units of rounding, not of bits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import philox
from ..row_layout import (
    CLIP,
    COLUMNS,
    KEEP_0,
    KEEP_1,
    MODEL_INPUT_SCALE,
    NUM_REGISTERS,
    PREDICTION_SAMPLE,
    PREV_SAMPLE,
    STORE_0,
    STORE_1,
    VARIANCE_OFFSET,
    VARIANCE_SLOPE,
    Variance,
)


def step(
    sample: Tensor,
    model_output: Tensor,
    row: Tensor,
    *,
    uncond: Tensor | None = None,
    guidance: Tensor | None = None,
    history: Sequence[Tensor | None] = (),
    noise: Tensor | None = None,
    variance: Tensor | None = None,
    threshold: Tensor | None = None,
    variance_kind: int = Variance.FIXED,
    keeps: int = 0,
    dtypes: Sequence[torch.dtype] | None = None,
) -> list[Tensor]:
    """One step; arguments as `fastdiff.ops.step` describes them, but `row` holds scalars.

    Args:
        row: ``[32]`` for all samples, or ``[B, 32]``, one each; its dtype is that of the computation.
        dtypes: of the results; the sample's by default.

    Returns:
        prev_sample and as many kept tensors as `keeps` says, in the shape of `sample`.
    """
    dtype = row.dtype
    x, m = sample.to(dtype), model_output.to(dtype)
    scalar = _Scalars(row, x)
    if uncond is not None and guidance is not None:
        u = uncond.to(dtype)
        m = u + a_sample(guidance, x) * (m - u)
    maps = (PREV_SAMPLE, KEEP_0, KEEP_1)[: keeps + 1]
    d = None
    if any(scalar.known[first + COLUMNS.index("prediction")] != 0.0 for first in maps):
        d = _prediction(x, m, scalar, threshold)
    z = None if noise is None else noise.to(dtype)
    if z is not None and variance is not None:
        z = z * _learned_std(variance.to(dtype), scalar, variance_kind)
    registers = [None if h is None else h.to(dtype) for h in history]
    registers += [None] * (NUM_REGISTERS - len(registers))
    terms = [x, m, d, *registers, z]
    stored = dtypes or [sample.dtype] * len(maps)
    return [_weighted_sum(scalar, first, terms).to(to) for first, to in zip(maps, stored, strict=True)]


def step_rows(
    sample: Tensor,
    model_output: Tensor,
    table: Tensor,
    rows: Tensor,
    *,
    out: Sequence[Tensor | None] | None = None,
    **rest: Any,
) -> list[Tensor]:
    """One step with a row for all samples, ``[1]``, or for each, ``[B]``; a sample whose row is negative stays.

    Returns:
        As `step`; of a sample that stays, the kept tensors hold what `out` does there, or 0.
    """
    scalars, taken = chosen(table, rows)
    results = step(sample, model_output, scalars if len(scalars) > 1 else scalars[0], **rest)
    taken = a_sample(taken, sample)
    before = [sample, *(out[1:] if out is not None else [None] * len(results[1:]))]
    return [
        torch.where(taken, value, torch.zeros_like(value) if old is None else old.to(value.dtype))
        for value, old in zip(results, before, strict=False)
    ]


def chosen(table: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """The rows, ``[B, 32]``, and which of them are in the table at all."""
    rows = rows.reshape(-1)
    return table[rows.clamp(0, len(table) - 1)], (rows >= 0) & (rows < len(table))


def stored(
    table: Tensor, rows: Tensor, registers: Sequence[Tensor | None], kept: Sequence[Tensor]
) -> list[Tensor | None]:
    """The registers after a step: each sample's kept tensors where its row says, what they held elsewhere."""
    scalars, taken = chosen(table, rows)
    after: list[Tensor | None] = []
    for j, register in enumerate(registers):
        if register is not None:
            for store, value in zip((STORE_0, STORE_1), kept, strict=True):
                here = a_sample(taken & (scalars[:, store] == j), value)
                register = torch.where(here, value.to(register.dtype), register)
        after.append(register)
    return after


def model_input(prev_sample: Tensor, table: Tensor, row: int | Tensor, dtype: torch.dtype, copies: int) -> Tensor:
    """The next model input: the rounded sample times the row's scale (1 where a sample stays), in `dtype`."""
    x = prev_sample.to(table.dtype)
    if isinstance(row, Tensor):
        scalars, taken = chosen(table, row)
        scale = torch.where(taken, scalars[:, MODEL_INPUT_SCALE], 1.0)
        scaled = a_sample(scale, x) * x
    else:
        scaled = table[row, MODEL_INPUT_SCALE] * x
    once = scaled.to(dtype)
    return torch.cat([once] * copies) if copies > 1 else once


def drawn_noise(sample: Tensor, seeds: Tensor, step: int | Tensor, purpose: int) -> Tensor:
    """The noise that a step draws, float32 in the shape of `sample`."""
    size = math.prod(sample.shape[1:])
    return philox.normals(seeds.reshape(-1), step, purpose, size).reshape(sample.shape)


class _Scalars:
    """The columns of a row, or of a row a sample, each shaped to multiply ``[B, ...]``.

    `known` holds them as numbers where there is one row and reading it is no host sync, else NaN: unlike any number.
    """

    def __init__(self, row: Tensor, like: Tensor) -> None:
        self._row, self._like = row, like
        at_hand = row.dim() == 1 and row.device.type == "cpu"
        self.known: list[float] = row.tolist() if at_hand else [math.nan] * row.shape[-1]

    def __getitem__(self, column: int) -> Tensor:
        return a_sample(self._row[..., column], self._like)


def _prediction(x: Tensor, m: Tensor, scalar: _Scalars, threshold: Tensor | None) -> Tensor:
    d = _weighted_sum(scalar, PREDICTION_SAMPLE, [x, m])
    d = torch.clamp(d, -scalar[CLIP], scalar[CLIP])
    if threshold is not None:
        s = a_sample(threshold, x)
        d = torch.clamp(d, -s, s) / s
    return d


def _weighted_sum(scalar: _Scalars, first: int, terms: Sequence[Tensor | None]) -> Tensor:
    """One affine map, whose weights begin at column `first`."""
    total = torch.zeros_like(terms[0])  # type: ignore[arg-type]
    for column, term in enumerate(terms, first):
        known = scalar.known[column]
        if term is None or known == 0.0:
            continue
        weight = scalar[column]
        added = total + weight * term
        # A selection where the value is not known here: 0·NaN must not be added.
        total = torch.where(weight != 0, added, total) if math.isnan(known) else added
    return total


def _learned_std(v: Tensor, scalar: _Scalars, variance_kind: int) -> Tensor:
    """The standard deviation that the model's second output v stands for, element by element."""
    if variance_kind == Variance.LEARNED_RANGE:
        return torch.exp(scalar[VARIANCE_OFFSET] + scalar[VARIANCE_SLOPE] * v)
    return torch.sqrt(v)


def a_sample(scalars: Tensor, like: Tensor) -> Tensor:
    """Scalars ``[1]``, ``[]`` or ``[B]`` shaped to multiply ``[B, ...]``."""
    if scalars.numel() == 1:
        return scalars.reshape(())
    return scalars.reshape(-1, *[1] * (like.dim() - 1))
