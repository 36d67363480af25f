# SPDX-License-Identifier: MIT
"""The fused step in plain torch: the specification that every other backend is held to.

It runs on any device, is differentiable, and allocates as torch does.  The order of operations is the contract::

    m = u + g·(c − u)
    d = p·x + q·m;  clamped to ±clip;  with a threshold s: clamped to ±s and divided by s
    out = ((0 + a_x·x) + a_m·m) + a_d·d + a_0·h_0 + … + a_3·h_3 + a_z·(std·z)

computed in float32 (float64 for float64 samples) and rounded once.  A term whose coefficient is 0 is not added, so a
tensor that a row does not use may be absent, or hold anything.  Compiled backends fuse each product with its sum (fma);
here the product is rounded first, which is why agreement is stated in units of rounding, not of bits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .affine import COLUMNS
from .table import (
    CLIP,
    KEEP_0,
    KEEP_1,
    NUM_REGISTERS,
    PREDICTION_OUTPUT,
    PREDICTION_SAMPLE,
    PREV_SAMPLE,
    VARIANCE_OFFSET,
    VARIANCE_SLOPE,
    Variance,
    compute_dtype,
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
) -> list[Tensor]:
    """One step; arguments as `fastdiff.ops.step` describes them, but `row` is one row, ``[32]``, compute dtype.

    Returns:
        prev_sample and as many kept tensors as `keeps` says, in the dtype and shape of `sample`.
    """
    dtype = compute_dtype(sample.dtype)
    x, m = sample.to(dtype), model_output.to(dtype)
    if uncond is not None and guidance is not None:
        u = uncond.to(dtype)
        m = u + _a_sample(guidance, x) * (m - u)
    maps = [row[first : first + len(COLUMNS)] for first in (PREV_SAMPLE, KEEP_0, KEEP_1)[: keeps + 1]]
    known = [_known(weights) for weights in maps]
    d = None
    if any(weights is None or weights[COLUMNS.index("prediction")] for weights in known):
        d = _prediction(x, m, row, threshold)
    z = None if noise is None else noise.to(dtype)
    if z is not None and variance is not None:
        z = z * learned_std(variance.to(dtype), row, variance_kind)
    registers = [None if h is None else h.to(dtype) for h in history]
    registers += [None] * (NUM_REGISTERS - len(registers))
    terms = [x, m, d, *registers, z]
    return [_weighted_sum(weights, values, terms).to(sample.dtype) for weights, values in zip(maps, known, strict=True)]


def _prediction(x: Tensor, m: Tensor, row: Tensor, threshold: Tensor | None) -> Tensor:
    d = row[PREDICTION_SAMPLE] * x + row[PREDICTION_OUTPUT] * m
    d = torch.clamp(d, -row[CLIP], row[CLIP])
    if threshold is not None:
        s = _a_sample(threshold, x)
        d = torch.clamp(d, -s, s) / s
    return d


def _known(weights: Tensor) -> list[float] | None:
    """The weights as numbers where reading them is no host sync, to tell which terms there are."""
    return weights.tolist() if weights.device.type == "cpu" else None


def _weighted_sum(weights: Tensor, known: list[float] | None, terms: list[Tensor | None]) -> Tensor:
    total = torch.zeros_like(terms[0])  # type: ignore[arg-type]
    for column, term in enumerate(terms):
        if term is None or (known is not None and known[column] == 0.0):
            continue
        added = total + weights[column] * term
        # A selection where the value is not known here: 0·NaN must not be added.
        total = added if known is not None else torch.where(weights[column] != 0, added, total)
    return total


def learned_std(v: Tensor, row: Tensor, variance_kind: int) -> Tensor:
    """The standard deviation that the model's second output v stands for, element by element."""
    if variance_kind == Variance.LEARNED_RANGE:
        return torch.exp(row[VARIANCE_OFFSET] + row[VARIANCE_SLOPE] * v)
    return torch.sqrt(v)


def _a_sample(scalars: Tensor, like: Tensor) -> Tensor:
    """Scalars ``[1]``, ``[]`` or ``[B]`` shaped to multiply ``[B, ...]``."""
    if scalars.numel() == 1:
        return scalars.reshape(())
    return scalars.reshape(-1, *[1] * (like.dim() - 1))
