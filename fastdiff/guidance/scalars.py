# SPDX-License-Identifier: MIT
"""Arithmetic on the scalars of guidance: a float for one sample, or a float64 tensor ``[B]`` for all of a batch.

On the CPU a formula runs on Python floats, since a tensor operation on one number costs more than the formula.  On
other devices it runs on ``[B]`` tensors, without a host sync.  Each formula is written once, with these functions,
which also take the symbols of a trace.  Division and roots follow IEEE 754: 0/0 is NaN and nothing raises.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

#: One sample's number; the numbers of a batch, ``[B]``; or a symbol while a formula is traced.
Scalar = Any


def divide(a: Scalar, b: Scalar) -> Scalar:
    """Return a/b; x/0 is ±infinity and 0/0 is NaN."""
    if type(a) is type(b) is float:
        if b != 0.0:
            return a / b
        return math.nan if a == 0.0 or a != a else math.copysign(math.inf, a) * math.copysign(1.0, b)
    if _traced(a, b):
        return _call("divide", a, b)
    return a / b


def sqrt(x: Scalar) -> Scalar:
    """Return √x; rounding below 0 counts as 0."""
    if type(x) is float:
        return math.sqrt(x) if x > 0.0 else 0.0 if x <= 0.0 else x
    return _call("sqrt", x) if _traced(x) else x.clamp(min=0.0).sqrt()


def exp(x: Scalar) -> Scalar:
    """Return e^x; beyond the largest number it is infinity."""
    if type(x) is float:
        return math.exp(x) if x < 709.0 else x if x != x else math.inf
    return _call("exp", x) if _traced(x) else x.exp()


def minimum(a: Scalar, b: float) -> Scalar:
    """Return the smaller of a and b; NaN if a is NaN."""
    if type(a) is float:
        return b if a > b else a
    return _call("minimum", a, b) if _traced(a) else a.clamp(max=b)


def maximum(a: Scalar, b: float) -> Scalar:
    """Return the larger of a and b; NaN if a is NaN."""
    if type(a) is float:
        return b if a < b else a
    return _call("maximum", a, b) if _traced(a) else a.clamp(min=b)


def hypot(a: Scalar, b: Scalar) -> Scalar:
    """Return √(a² + b²)."""
    if type(a) is type(b) is float:
        return math.hypot(a, b)
    return _call("hypot", a, b) if _traced(a, b) else torch.hypot(a, b)


def select_zero(test: Scalar, where_zero: float, otherwise: Scalar) -> Scalar:
    """Return `where_zero` where `test` is 0, else `otherwise`."""
    if type(test) is float:
        return where_zero if test == 0.0 else otherwise
    if _traced(test, otherwise):
        return _call("select_zero", test, where_zero, otherwise)
    return torch.where(test == 0.0, where_zero, otherwise)


def _traced(*values: object) -> bool:
    return any(not isinstance(value, (float, Tensor)) for value in values)


def _call(function: str, *arguments: Any) -> Any:
    symbol = next(value for value in arguments if not isinstance(value, (float, Tensor)))
    return symbol.trace.call(function, *arguments)
