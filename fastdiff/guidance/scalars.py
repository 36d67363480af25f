# SPDX-License-Identifier: MIT
"""Arithmetic on the scalars of guidance: a float for one sample, or a float64 tensor ``[B]`` for all of a batch.

On the CPU a formula runs on Python floats, since a tensor operation on one number costs more than the formula.  On
other devices it runs on ``[B]`` tensors, without a host sync.  Each formula is written once, with these functions.
Division and roots follow IEEE 754: 0/0 is NaN and nothing raises.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

#: One sample's number, or the numbers of a batch, ``[B]``.
Scalar = float | Tensor


def divide(a: Scalar, b: Scalar) -> Scalar:
    """Return a/b; x/0 is ±infinity and 0/0 is NaN."""
    if isinstance(a, Tensor) or isinstance(b, Tensor) or b != 0.0:
        return a / b
    return math.nan if a == 0.0 or math.isnan(a) else math.copysign(math.inf, a) * math.copysign(1.0, b)


def sqrt(x: Scalar) -> Scalar:
    """Return √x; rounding below 0 counts as 0."""
    if isinstance(x, Tensor):
        return x.clamp(min=0.0).sqrt()
    return math.nan if math.isnan(x) else math.sqrt(max(x, 0.0))


def exp(x: Scalar) -> Scalar:
    """Return e^x; beyond the largest number it is infinity."""
    if isinstance(x, Tensor):
        return x.exp()
    return math.exp(x) if x < 709.0 else x if math.isnan(x) else math.inf


def minimum(a: Scalar, b: float) -> Scalar:
    """Return the smaller of a and b; NaN if a is NaN."""
    if isinstance(a, Tensor):
        return a.clamp(max=b)
    return b if a > b else a


def maximum(a: Scalar, b: float) -> Scalar:
    """Return the larger of a and b; NaN if a is NaN."""
    if isinstance(a, Tensor):
        return a.clamp(min=b)
    return b if a < b else a


def hypot(a: Scalar, b: Scalar) -> Scalar:
    """Return √(a² + b²)."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.hypot(a, b)
    return math.hypot(a, b)


def select_zero(test: Scalar, where_zero: float, otherwise: Scalar) -> Scalar:
    """Return `where_zero` where `test` is 0, else `otherwise`."""
    if isinstance(test, Tensor):
        return torch.where(test == 0.0, where_zero, otherwise)
    return where_zero if test == 0.0 else otherwise
