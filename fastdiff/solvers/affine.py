# SPDX-License-Identifier: MIT
"""Symbols for the tensors of a step, so that a solver can be written as its paper writes it.

Every solver's update is an affine map of a few tensors.  A solver therefore runs its formula once, on the
host and in float64, with these symbols in place of the tensors::

    prev = t.alpha * x0 + t.sigma * noise        # DDIM, eq. 12 with eta = 0

and what comes out *is* the row of coefficients that the fused step reads.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..row_layout import COLUMNS


class Affine:
    """A weighted sum of the step's tensors: eight float64 coefficients, one a column of `COLUMNS`."""

    __slots__ = ("coefficients",)

    def __init__(self, coefficients: Sequence[float]) -> None:
        self.coefficients = tuple(coefficients)

    def __add__(self, other: Affine) -> Affine:
        return Affine([a + b for a, b in zip(self.coefficients, other.coefficients, strict=True)])

    def __sub__(self, other: Affine) -> Affine:
        return Affine([a - b for a, b in zip(self.coefficients, other.coefficients, strict=True)])

    def __mul__(self, factor: float) -> Affine:
        return Affine([a * factor for a in self.coefficients])

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> Affine:
        return Affine([a / divisor for a in self.coefficients])

    def __neg__(self) -> Affine:
        return Affine([-a for a in self.coefficients])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Affine) and self.coefficients == other.coefficients

    def __hash__(self) -> int:
        return hash(self.coefficients)

    def __repr__(self) -> str:
        terms = [f"{a:+.6g}·{name}" for a, name in zip(self.coefficients, COLUMNS, strict=True) if a]
        return " ".join(terms) or "0"


def _unit(column: int) -> Affine:
    return Affine([1.0 if i == column else 0.0 for i in range(len(COLUMNS))])


SAMPLE, MODEL_OUTPUT, PREDICTION, *_HISTORY, NOISE = (_unit(i) for i in range(len(COLUMNS)))
#: The history slots, with the outputs that earlier rows kept.
HISTORY: tuple[Affine, ...] = tuple(_HISTORY)
ZERO = Affine([0.0] * len(COLUMNS))
