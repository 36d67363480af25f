# SPDX-License-Identifier: MIT
"""Symbols for the branches of guidance, so that a method can be written as its paper writes it.

A branch is a tensor that guidance combines: an output of the model, a running average, the sample.  Each guided output
is a weighted sum of the branches, and each scalar product or norm of such sums follows from the Gram matrix of the
branches, which is one reduction.  A formula such as ``u + g * (c - u)`` runs on these symbols and gives the weights.
"""

from __future__ import annotations

from collections.abc import Sequence

from .scalars import Scalar, divide, sqrt


class Products:
    """Scalar products of the branches, of one sample or of a batch.

    Args:
        matrix: the Gram matrix, K rows of K scalars.
        sums: the sums of the elements of each branch.
        elements: the number of elements of a sample.
    """

    __slots__ = ("elements", "matrix", "sums")

    def __init__(self, matrix: Sequence[Sequence[Scalar]], sums: Sequence[Scalar], elements: int) -> None:
        self.matrix, self.sums, self.elements = matrix, sums, elements


class Vector:
    """A weighted sum of branches: one weight a branch."""

    __slots__ = ("products", "weights")

    def __init__(self, weights: Sequence[Scalar], products: Products | None) -> None:
        self.weights, self.products = weights, products

    def __add__(self, other: Vector) -> Vector:
        return Vector([a + b for a, b in zip(self.weights, other.weights, strict=True)], self.products)

    def __sub__(self, other: Vector) -> Vector:
        return Vector([a - b for a, b in zip(self.weights, other.weights, strict=True)], self.products)

    def __mul__(self, factor: Scalar) -> Vector:
        # A branch without weight keeps the number 0, also where the factor is a tensor: it is in no product.
        return Vector([0.0 if _is_zero(a) else a * factor for a in self.weights], self.products)

    __rmul__ = __mul__

    def dot(self, other: Vector) -> Scalar:
        """Return the scalar product, from the Gram matrix."""
        assert self.products is not None
        matrix = self.products.matrix
        total: Scalar = 0.0
        for i, a in enumerate(self.weights):
            if _is_zero(a):
                continue
            for j, b in enumerate(other.weights):
                if not _is_zero(b):
                    total = total + a * b * matrix[i][j]
        return total

    def norm(self) -> Scalar:
        """Return the Euclidean norm."""
        return sqrt(self.dot(self))

    def deviation(self) -> Scalar:
        """Return the root of the sum of squared deviations from the mean, √(n − 1) times the standard deviation."""
        assert self.products is not None
        total: Scalar = 0.0
        for a, of_branch in zip(self.weights, self.products.sums, strict=False):
            if not _is_zero(a):
                total = total + a * of_branch
        return sqrt(self.dot(self) - divide(total * total, float(self.products.elements)))


def unit_vectors(number: int, products: Products | None) -> list[Vector]:
    """Return the symbols of `number` branches."""
    return [Vector([1.0 if i == j else 0.0 for i in range(number)], products) for j in range(number)]


def _is_zero(weight: Scalar) -> bool:
    return isinstance(weight, float) and weight == 0.0
