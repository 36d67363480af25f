# SPDX-License-Identifier: MIT
"""Rescaled guidance (arXiv 2305.08891, section 3.4): the output gets the conditional one's standard deviation."""

from __future__ import annotations

from .scalars import Scalar, divide
from .vectors import Vector


def rescaled(guided: Vector, cond: Vector, share: float) -> Vector:
    """Return m·(φ·std(c)/std(m) + 1 − φ) (eq. 15 and 16).

    Args:
        guided: m.
        cond: c.
        share: φ, 0 to 1.
    """
    factor: Scalar = share * divide(cond.deviation(), guided.deviation()) + (1.0 - share)
    return guided * factor
