# SPDX-License-Identifier: MIT
"""The tape: a traced step's scalar arithmetic, recorded so that it can be computed again for other numbers.

In: a step's scalar inputs (entries of the schedule, the step index, eta), read by readers (`inputs`), and the
operations on them.  Out: a `Tape` of operations and guards, which a `TraceTree` keeps and evaluates.

A guard is a value that the traced code depends on in a way that no formula expresses: a branch, a loop count, an
attribute that is None or not.  A step traced twice with the same guarded values does the same operations.  So the tapes
of one kind of call form a tree: a node holds the operations up to the next guard, with a child for each value seen
there.  Walking the tree with the inputs of a new call checks that a trace holds and computes its scalars, in a
microsecond for ten operations.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Hashable
from typing import Any, Generic, TypeVar

import numpy as np

#: An operation: a reader of the inputs ``(reader,)``, a function of one or two earlier values ``(f, i)``,
#: ``(f, i, j)``, of several ``(f, (i, j, ...), _MANY, _MANY)``, or a constant ``(None, value, type, None)``.
Operation = tuple[Any, ...]
#: What a guard compares: a value of the tape by its index, or what a reader finds in the inputs.
Guarded = int | Callable[[Any], Hashable]
_T = TypeVar("_T")
#: Visits of a node after which its operations become a Python function.  Compiling takes as long as some hundred
#: evaluations and makes each three times faster.
_VISITS_TO_COMPILE = 64
_INFIX = {operator.add: "+", operator.sub: "-", operator.mul: "*", operator.lt: "<", operator.le: "<="}
_MANY = "many"
#: The most operations of a trace: evaluating more would take longer than the scheduler's own code.
MOST_OPERATIONS = 500


class LongTraceError(Exception):
    """A trace has more operations than are worth recording."""


def run(operation: Operation, values: list[Any], inputs: Any) -> Any:
    """Return the result of one operation."""
    count = len(operation)
    if count == 3:
        return operation[0](values[operation[1]], values[operation[2]])
    if count == 2:
        return operation[0](values[operation[1]])
    if count == 1:
        return operation[0](inputs)
    if operation[0] is None:
        return operation[1]
    return operation[0](*[values[i] for i in operation[1]])


def guard_key(guarded: Guarded, values: list[Any], inputs: Any) -> Hashable:
    """Return a guarded value as a key: NaN equals itself there, and 1 and 1.0 differ."""
    value = values[guarded] if type(guarded) is int else guarded(inputs)  # type: ignore[operator]
    if type(value) is float:
        return (value, float) if value == value else "nan"
    return (value, int) if type(value) is int else value


class Tape:
    """Scalar operations and guards of one trace, in order.

    Attributes:
        inputs: what readers read.
        values: the results of the operations so far: Python numbers, lists of them, tuples.
        guards: each guard with the operations since the one before: (operations, guarded, key).
        operations: those since the last guard.
        readers: those of all inputs read.
    """

    def __init__(self, inputs: Any) -> None:
        self.inputs = inputs
        self.values: list[Any] = []
        self.guards: list[tuple[tuple[Operation, ...], Guarded, Hashable]] = []
        self.operations: list[Operation] = []
        self.readers: dict[Callable[[Any], Any], None] = {}
        self._indices: dict[Operation, int] = {}
        self._keys: dict[Guarded, Hashable] = {}

    def read(self, reader: Callable[[Any], Any]) -> int:
        """Record an input; `reader` is hashable and equal to another that reads the same."""
        self.readers[reader] = None
        return self._record((reader,))

    def constant(self, value: Any) -> int:
        """Record a number that the traced code contains."""
        return self._record((None, value, type(value), None))

    def apply(self, function: Callable[..., Any], *operands: int) -> int:
        """Record a function of earlier values and return the index of its result."""
        if len(operands) > 2:
            return self._record((function, operands, _MANY, _MANY))
        return self._record((function, *operands))

    def _record(self, operation: Operation) -> int:
        index = self._indices.get(operation)
        if index is None:
            if len(self.values) >= MOST_OPERATIONS:
                raise LongTraceError(f"more than {MOST_OPERATIONS} operations on scalars")
            self.values.append(run(operation, self.values, self.inputs))
            index = self._indices[operation] = len(self.values) - 1
            self.operations.append(operation)
        return index

    def guard(self, guarded: Guarded) -> Any:
        """Record that the trace holds for this value alone, and return the value."""
        if guarded not in self._keys:
            key = self._keys[guarded] = guard_key(guarded, self.values, self.inputs)
            self.guards.append((tuple(self.operations), guarded, key))
            self.operations = []
        return self.values[guarded] if type(guarded) is int else self._keys[guarded]


class _Node(Generic[_T]):
    """Operations up to a guard, with a child for each value seen there; or up to the end, with the trace's leaf."""

    __slots__ = ("children", "compiled", "guarded", "leaf", "operations", "visits")

    def __init__(self, operations: tuple[Operation, ...], guarded: Guarded | None) -> None:
        self.operations, self.guarded = operations, guarded
        self.children: dict[Hashable, _Node[_T]] = {}
        self.leaf: _T | None = None
        self.visits = 0
        #: The operations as one Python function, after `_VISITS_TO_COMPILE` visits.
        self.compiled: Callable[[list[Any], Any], None] | None = None

    def run(self, values: list[Any], inputs: Any) -> None:
        """Do the operations and append their results."""
        if self.compiled is not None:
            self.compiled(values, inputs)
            return
        first = len(values)
        for operation in self.operations:
            values.append(run(operation, values, inputs))
        self.visits += 1
        if self.visits == _VISITS_TO_COMPILE:
            self.compiled = _compiled(self.operations, first)


def _compiled(operations: tuple[Operation, ...], first: int) -> Callable[[list[Any], Any], None]:
    """Return operations as a Python function; `first` is the index of the first one on the tape."""
    names: dict[str, Any] = {}
    lines = ["def compiled(values, inputs):"]

    def value(index: int) -> str:
        return f"v{index}" if index >= first else f"values[{index}]"

    def name_of(thing: Any) -> str:
        name = f"c{len(names)}"
        names[name] = thing
        return name

    for index, operation in enumerate(operations, first):
        function = operation[0]
        if len(operation) == 3 and function in _INFIX:
            code = f"{value(operation[1])} {_INFIX[function]} {value(operation[2])}"
        elif len(operation) == 1:
            code = f"{name_of(function)}(inputs)"
        elif function is None:
            code = name_of(operation[1])
        else:
            operands = operation[1] if len(operation) == 4 else operation[1:]
            code = f"{name_of(function)}({', '.join(map(value, operands))})"
        lines.append(f" v{index} = {code}")
    lines.append(f" values += ({''.join(f'v{first + i}, ' for i in range(len(operations)))})")
    exec("\n".join(lines), names)
    return names["compiled"]  # type: ignore[no-any-return]


class TraceTree(Generic[_T]):
    """The traces of one kind of call, by their guards; each has a leaf.

    Attributes:
        count: the number of leaves.
    """

    def __init__(self) -> None:
        self._root: _Node[_T] | None = None
        self.count = 0

    def find(self, inputs: Any) -> tuple[_T, list[Any]] | None:
        """Return the leaf of the trace that holds for these inputs, and the values of its tape; None if none holds.

        Raises:
            Exception: what an operation or a reader raises, such as IndexError beyond the schedule.
        """
        node: _Node[_T] | None = self._root
        values: list[Any] = []
        while node is not None:
            if node.operations:
                node.run(values, inputs)
            if node.guarded is None:
                return node.leaf, values  # type: ignore[return-value]
            node = node.children.get(guard_key(node.guarded, values, inputs))
        return None

    def add(self, tape: Tape, leaf: _T) -> None:
        """Keep a finished trace."""
        segments = [*tape.guards, (tuple(tape.operations), None, None)]
        parent: _Node[_T] | None = None
        node = self._root
        for k, (operations, guarded, key) in enumerate(segments):
            if node is None:
                node = _Node(operations, guarded)
                if parent is None:
                    self._root = node
                else:
                    parent.children[segments[k - 1][2]] = node
            if guarded is None:
                self.count += node.leaf is None
                node.leaf = leaf
                return
            parent, node = node, node.children.get(key)


# Arithmetic that follows IEEE 754, as torch's does, where Python raises.


def divide(a: Any, b: Any) -> Any:
    """Return the quotient; infinite or NaN for a divisor of 0."""
    try:
        return a / b
    except ZeroDivisionError:
        if a == 0 or a != a:
            return math.nan
        return math.copysign(math.inf, a) * math.copysign(1.0, b)


def floor_divide(a: Any, b: Any) -> Any:
    """Return the quotient rounded down; infinite or NaN for a divisor of 0."""
    try:
        return a // b
    except ZeroDivisionError:
        return divide(a, b)


def power(a: Any, b: Any) -> Any:
    """Return the power; infinite on overflow, NaN where it is not real."""
    try:
        result = a**b
        return math.nan if isinstance(result, complex) else result
    except (ZeroDivisionError, OverflowError):
        if a < 0 and not float(b).is_integer() and math.isfinite(b):
            return math.nan
        odd = float(b).is_integer() and b % 2 == 1
        return math.copysign(math.inf, a) if odd else math.inf


def _unary(function: Callable[[float], float], pole: float = math.nan) -> Callable[[float], float]:
    """Return a function of `math` that does not raise: -inf at its pole, NaN outside its domain, inf on overflow."""

    def safe(x: float) -> float:
        try:
            return function(x)
        except OverflowError:
            return math.inf
        except ValueError:
            return -math.inf if x == pole else math.nan

    return safe


log, log1p = _unary(math.log, 0.0), _unary(math.log1p, -1.0)
exp, expm1, sqrt = (_unary(f) for f in (math.exp, math.expm1, math.sqrt))
sin, cos, tan, acos, asin = (_unary(f) for f in (math.sin, math.cos, math.tan, math.acos, math.asin))
atan, tanh = math.atan, math.tanh


def sigmoid(x: float) -> float:
    """Return the logistic function."""
    return divide(1.0, 1.0 + exp(-x))  # type: ignore[no-any-return]


def minimum(a: Any, b: Any) -> Any:
    """Return the lesser; NaN if either is."""
    return a if a < b or a != a else b


def maximum(a: Any, b: Any) -> Any:
    """Return the greater; NaN if either is."""
    return a if a > b or a != a else b


def as_float32(x: float) -> float:
    """Round to float32: a function with jumps is given these, so that it jumps where it does for diffusers."""
    return float(np.float32(x))


def rounded_down(x: float) -> float:
    """Return the floor, as a float."""
    return float(math.floor(x)) if math.isfinite(x) else x


def rounded_up(x: float) -> float:
    """Return the ceiling, as a float."""
    return float(math.ceil(x)) if math.isfinite(x) else x


def rounded(x: float) -> float:
    """Return the nearest whole number, the even one of two."""
    return float(round(x)) if math.isfinite(x) else x


def truncated(x: Any) -> int:
    """Convert to an integer as `Tensor.to` does."""
    return int(x) if math.isfinite(x) else 0


def entry(values: Any, index: Any) -> Any:
    """Return an entry of a list; raises IndexError beyond it, as a tensor does."""
    return values[index]


def called(function: Callable[[Any], Any], argument: Any) -> Any:
    """Call a function."""
    return function(argument)


negative, add, subtract, multiply, remainder = (
    operator.neg, operator.add, operator.sub, operator.mul, operator.mod,
)  # fmt: skip
absolute = abs
less, less_equal, greater, greater_equal, equal, unequal = (
    operator.lt, operator.le, operator.gt, operator.ge, operator.eq, operator.ne,
)  # fmt: skip
