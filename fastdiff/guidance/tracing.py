# SPDX-License-Identifier: MIT
"""Formulas of guidance, traced once to straight-line code on scalars.

A method's formula runs on `Symbol` scalars and leaves a line of Python for each operation.  The lines are compiled to
one function, which runs on the floats of a sample in a few microseconds, and on tensors ``[B]`` as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from . import scalars


class Trace:
    """The lines of a formula; equal operations share one."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self._known: dict[str, Symbol] = {}

    def symbol(self, expression: str) -> Symbol:
        """Return the result of an expression."""
        if expression not in self._known:
            name = f"t{len(self.lines)}"
            self.lines.append(f"{name} = {expression}")
            self._known[expression] = Symbol(name, self)
        return self._known[expression]

    def call(self, function: str, *arguments: object) -> Symbol:
        """Return the result of a function of `fastdiff.guidance.scalars`."""
        return self.symbol(f"{function}({', '.join(map(repr, arguments))})")


class Symbol:
    """A scalar whose value is not known while a formula is traced."""

    __slots__ = ("name", "trace")

    def __init__(self, name: str, trace: Trace) -> None:
        self.name, self.trace = name, trace

    def __repr__(self) -> str:
        return self.name

    def __add__(self, other: object) -> Symbol:
        return self if _is(other, 0.0) else self.trace.symbol(f"{self!r} + {other!r}")

    __radd__ = __add__

    def __sub__(self, other: object) -> Symbol:
        return self if _is(other, 0.0) else self.trace.symbol(f"{self!r} - {other!r}")

    def __rsub__(self, other: object) -> Symbol:
        return self.trace.symbol(f"{other!r} - {self!r}")

    def __mul__(self, other: object) -> Symbol | float:
        if not isinstance(other, (float, int, Symbol)):
            return NotImplemented  # a vector
        if _is(other, 0.0):
            return 0.0  # a weight of 0 is no term
        return self if _is(other, 1.0) else self.trace.symbol(f"{self!r} * {other!r}")

    __rmul__ = __mul__

    def __neg__(self) -> Symbol:
        return self.trace.symbol(f"-{self!r}")


def _is(value: object, number: float) -> bool:
    return isinstance(value, float) and value == number


#: (products, scale) to the weights of m and of what is kept, or None.
Formula = Callable[..., tuple[tuple[scalars.Scalar, ...], tuple[scalars.Scalar, ...] | None]]


def compiled(trace: Trace, guided: Sequence[object], kept: Sequence[object] | None) -> Formula:
    """Return the function that computes the traced weights."""
    results = ", ".join(map(repr, guided)) + ","
    of_kept = "None" if kept is None else f"({', '.join(map(repr, kept))},)"
    body = "\n    ".join([*trace.lines, f"return ({results}), {of_kept}"])
    names: dict[str, object] = dict(vars(scalars), nan=float("nan"), inf=float("inf"))
    exec(f"def formula(products, scale):\n    {body}\n", names)
    return names["formula"]  # type: ignore[return-value]
