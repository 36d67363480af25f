# SPDX-License-Identifier: MIT
"""The scalar arithmetic of a traced step, recorded so that it can be run again with other numbers.

A step's coefficients are functions of a few numbers: entries of the schedule, the step index, eta.  A `Tape` records
each operation on them while the step is traced, and each *observation*: a place where the code that is traced depends
on a value in a way that no formula says (a branch, a loop count, an attribute that is None or not).

A step that is traced twice with the same observations does the same operations.  So the tapes of one kind of call form
a tree, `TraceTree`: a node holds the operations up to the next observation, and has a child for each outcome that has
been seen.  Walking the tree with the numbers of a new call both checks that a recorded trace holds for it and computes
its scalars, in a microsecond for ten operations.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Hashable
from typing import Any, Generic, TypeVar

import numpy as np

#: An operation: a reader of the environment ``(reader,)``, a function of one or two earlier values ``(f, i)``,
#: ``(f, i, j)``, of several ``(f, (i, j, ...), _MANY, _MANY)``, or a constant ``(None, value, type, None)``.
Operation = tuple[Any, ...]
#: What is observed: a value of the tape by its index, or something that a reader finds in the environment.
Source = int | Callable[[Any], Hashable]
_T = TypeVar("_T")
#: How often a node is visited before its operations become a Python function: making one takes as long as running
#: them hundreds of times, and then they take a third.
_VISITS_TO_COMPILE = 64
_INFIX = {operator.add: "+", operator.sub: "-", operator.mul: "*", operator.lt: "<", operator.le: "<="}
_MANY = "many"
#: The most operations of a trace: walking more would take longer than the scheduler's own code.
MOST_OPERATIONS = 500


class LongTraceError(Exception):
    """A trace has more operations than are worth recording."""


def run(operation: Operation, values: list[Any], environment: Any) -> Any:
    """The result of one operation."""
    count = len(operation)
    if count == 3:
        return operation[0](values[operation[1]], values[operation[2]])
    if count == 2:
        return operation[0](values[operation[1]])
    if count == 1:
        return operation[0](environment)
    if operation[0] is None:
        return operation[1]
    return operation[0](*[values[i] for i in operation[1]])


def observed(source: Source, values: list[Any], environment: Any) -> Hashable:
    """What a source gives, as a key: NaN is a key that is equal to itself, 1 and 1.0 are two keys."""
    value = values[source] if type(source) is int else source(environment)  # type: ignore[operator]
    if type(value) is float:
        return (value, float) if value == value else "nan"
    return (value, int) if type(value) is int else value


class Tape:
    """Scalar operations and observations of one trace, in order.

    Attributes:
        environment: what readers read.
        values: the results of the operations so far, Python numbers (of a list of numbers, the list).
        events: each observation with the operations before it: (operations, source, outcome).
        operations: those since the last observation.
        readers: of all inputs.
    """

    def __init__(self, environment: Any) -> None:
        self.environment = environment
        self.values: list[Any] = []
        self.events: list[tuple[tuple[Operation, ...], Source, Hashable]] = []
        self.operations: list[Operation] = []
        self.readers: dict[Callable[[Any], Any], None] = {}
        self._known: dict[Operation, int] = {}
        self._observed: dict[Source, Hashable] = {}

    def read(self, reader: Callable[[Any], Any]) -> int:
        """Record an input; `reader` is hashable, and equal to another that reads the same."""
        self.readers[reader] = None
        return self._record((reader,))

    def constant(self, value: Any) -> int:
        """Record a number that is part of the code that is traced."""
        return self._record((None, value, type(value), None))

    def apply(self, function: Callable[..., Any], *operands: int) -> int:
        """Record a function of earlier values; the index of its result."""
        if len(operands) > 2:
            return self._record((function, operands, _MANY, _MANY))
        return self._record((function, *operands))

    def _record(self, operation: Operation) -> int:
        index = self._known.get(operation)
        if index is None:
            if len(self.values) >= MOST_OPERATIONS:
                raise LongTraceError(f"more than {MOST_OPERATIONS} operations on scalars")
            self.values.append(run(operation, self.values, self.environment))
            index = self._known[operation] = len(self.values) - 1
            self.operations.append(operation)
        return index

    def observe(self, source: Source) -> Any:
        """Record that the trace depends on a value beyond its formulas; the value."""
        if source not in self._observed:
            outcome = observed(source, self.values, self.environment)
            self._observed[source] = outcome
            self.events.append((tuple(self.operations), source, outcome))
            self.operations = []
        return self.values[source] if type(source) is int else self._observed[source]


class _Node(Generic[_T]):
    """Operations up to an observation and the nodes behind its outcomes; or up to the end, and what is found there."""

    __slots__ = ("children", "leaf", "operations", "segment", "source", "visits")

    def __init__(self, operations: tuple[Operation, ...], source: Source | None) -> None:
        self.operations, self.source = operations, source
        self.children: dict[Hashable, _Node[_T]] = {}
        self.leaf: _T | None = None
        self.visits = 0
        #: The operations as one Python function, once that pays.
        self.segment: Callable[[list[Any], Any], None] | None = None

    def run(self, values: list[Any], environment: Any) -> None:
        """Do the operations and append their results."""
        if self.segment is not None:
            self.segment(values, environment)
            return
        first = len(values)
        for operation in self.operations:
            values.append(run(operation, values, environment))
        self.visits += 1
        if self.visits == _VISITS_TO_COMPILE:
            self.segment = _compiled(self.operations, first)


def _compiled(operations: tuple[Operation, ...], first: int) -> Callable[[list[Any], Any], None]:
    """A Python function of operations of which the first has the index `first` on the tape."""
    names: dict[str, Any] = {}
    lines = ["def segment(values, environment):"]

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
            code = f"{name_of(function)}(environment)"
        elif function is None:
            code = name_of(operation[1])
        else:
            operands = operation[1] if len(operation) == 4 else operation[1:]
            code = f"{name_of(function)}({', '.join(map(value, operands))})"
        lines.append(f" v{index} = {code}")
    lines.append(f" values += ({''.join(f'v{first + i}, ' for i in range(len(operations)))})")
    exec("\n".join(lines), names)
    return names["segment"]  # type: ignore[no-any-return]


class TraceTree(Generic[_T]):
    """The traces of one kind of call, by their observations; each has a leaf.

    Attributes:
        count: how many leaves there are.
    """

    def __init__(self) -> None:
        self._root: _Node[_T] | None = None
        self.count = 0

    def find(self, environment: Any) -> tuple[_T, list[Any]] | None:
        """The leaf of the trace that holds in an environment, and the values of its tape; None where none does.

        Raises:
            Exception: what an operation or a reader raises, such as IndexError beyond the schedule.
        """
        node: _Node[_T] | None = self._root
        values: list[Any] = []
        while node is not None:
            if node.operations:
                node.run(values, environment)
            if node.source is None:
                return node.leaf, values  # type: ignore[return-value]
            node = node.children.get(observed(node.source, values, environment))
        return None

    def add(self, tape: Tape, leaf: _T) -> None:
        """Keep a finished trace."""
        steps = [*tape.events, (tuple(tape.operations), None, None)]
        parent: _Node[_T] | None = None
        node = self._root
        for k, (operations, source, _) in enumerate(steps):
            if node is None:
                node = _Node(operations, source)
                if parent is None:
                    self._root = node
                else:
                    parent.children[steps[k - 1][2]] = node
            if source is None:
                self.count += node.leaf is None
                node.leaf = leaf
                return
            parent, node = node, node.children.get(steps[k][2])


# Arithmetic that ends as IEEE 754 says, as torch's does, where Python raises.


def divide(a: Any, b: Any) -> Any:
    """The quotient; infinite or NaN for a divisor of 0."""
    try:
        return a / b
    except ZeroDivisionError:
        if a == 0 or a != a:
            return math.nan
        return math.copysign(math.inf, a) * math.copysign(1.0, b)


def floor_divide(a: Any, b: Any) -> Any:
    """The quotient rounded down; infinite or NaN for a divisor of 0."""
    try:
        return a // b
    except ZeroDivisionError:
        return divide(a, b)


def power(a: Any, b: Any) -> Any:
    """The power; infinite beyond what floats hold, NaN where it is no real number."""
    try:
        result = a**b
        return math.nan if isinstance(result, complex) else result
    except (ZeroDivisionError, OverflowError):
        if a < 0 and not float(b).is_integer() and math.isfinite(b):
            return math.nan
        odd = float(b).is_integer() and b % 2 == 1
        return math.copysign(math.inf, a) if odd else math.inf


def _unary(function: Callable[[float], float], pole: float = math.nan) -> Callable[[float], float]:
    """A function of `math` where that raises: -inf at its pole, NaN outside its domain, inf beyond what floats hold."""

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
    """The logistic function."""
    return divide(1.0, 1.0 + exp(-x))  # type: ignore[no-any-return]


def minimum(a: Any, b: Any) -> Any:
    """The lesser; NaN where one is."""
    return a if a < b or a != a else b


def maximum(a: Any, b: Any) -> Any:
    """The greater; NaN where one is."""
    return a if a > b or a != a else b


def as_float32(x: float) -> float:
    """The nearest float32: what a function with jumps has to be given, so that it jumps where it does for diffusers."""
    return float(np.float32(x))


def rounded_down(x: float) -> float:
    """The greatest whole number that is not above."""
    return float(math.floor(x)) if math.isfinite(x) else x


def rounded_up(x: float) -> float:
    """The least whole number that is not below."""
    return float(math.ceil(x)) if math.isfinite(x) else x


def rounded(x: float) -> float:
    """The nearest whole number, the even one of two."""
    return float(round(x)) if math.isfinite(x) else x


def truncated(x: Any) -> int:
    """A number as `Tensor.to` makes an integer of it."""
    return int(x) if math.isfinite(x) else 0


def entry(values: Any, index: Any) -> Any:
    """The entry of a list; raises IndexError beyond it, as a tensor does."""
    return values[index]


def called(function: Callable[[Any], Any], argument: Any) -> Any:
    """A function's value."""
    return function(argument)


negative, add, subtract, multiply, remainder = (
    operator.neg, operator.add, operator.sub, operator.mul, operator.mod,
)  # fmt: skip
absolute = abs
less, less_equal, greater, greater_equal, equal, unequal = (
    operator.lt, operator.le, operator.gt, operator.ge, operator.eq, operator.ne,
)  # fmt: skip
