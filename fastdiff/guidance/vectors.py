# SPDX-License-Identifier: MIT
"""Symbols for the branches of guidance, so that a method can be written as its paper writes it.

A branch is a tensor that guidance combines: an output of the model, a running average, the sample.  Each guided output
is a weighted sum of the branches, and each scalar product or norm of such sums follows from the Gram matrix of the
branches, which is one reduction.  A formula such as ``u + g * (c - u)`` runs on these symbols and gives the weights.
"""

from __future__ import annotations

from collections.abc import Sequence

from .scalars import Scalar, sqrt
from .tracing import Trace


class Vector:
    """A weighted sum of branches: one weight a branch.

    Args:
        weights: numbers, or symbols of `trace`.
        trace: where scalar products are looked up.
    """

    __slots__ = ("trace", "weights")

    def __init__(self, weights: Sequence[Scalar], trace: Trace) -> None:
        self.weights, self.trace = weights, trace

    def __add__(self, other: Vector) -> Vector:
        return Vector([a + b for a, b in zip(self.weights, other.weights, strict=True)], self.trace)

    def __sub__(self, other: Vector) -> Vector:
        return self + -1.0 * other

    def __mul__(self, factor: Scalar) -> Vector:
        # A branch without weight keeps the number 0, also where the factor is a symbol: it is in no product.
        return Vector([0.0 if _is_zero(a) else a * factor for a in self.weights], self.trace)

    __rmul__ = __mul__

    def dot(self, other: Vector) -> Scalar:
        """Return the scalar product, from the Gram matrix."""
        total: Scalar = 0.0
        for i, a in enumerate(self.weights):
            for j, b in enumerate(other.weights):
                if not _is_zero(a) and not _is_zero(b):
                    total = total + a * b * self.trace.symbol(f"products[{min(i, j)}][{max(i, j)}]")
        return total

    def norm(self) -> Scalar:
        """Return the Euclidean norm."""
        return sqrt(self.dot(self))


def unit_vectors(number: int, trace: Trace) -> list[Vector]:
    """Return the symbols of `number` branches."""
    return [Vector([1.0 if i == j else 0.0 for i in range(number)], trace) for j in range(number)]


def _is_zero(weight: Scalar) -> bool:
    return isinstance(weight, float) and weight == 0.0
