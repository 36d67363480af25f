# SPDX-License-Identifier: MIT
"""Proxies for the scalars of a traced step: their arithmetic is recorded on a `Tape`.

In: a Python number (the step index, eta) as a `NumberProxy`; a tensor of numbers (an entry of the schedule) as a
`ScalarTensor`.  Out: proxies of the results, and `Coefficient`s of linear expressions.

Both have a value, so that a branch can be taken; taking one puts a guard on the tape.  An operation without a rule is
done on the values, each of which is then guarded: the trace holds for those values alone.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from . import tape as t
from .tape import Tape

#: Attributes of a tensor that its shape and dtype determine.
BY_SHAPE = frozenset(("shape", "dtype", "ndim", "layout", "is_cuda", "is_sparse", "requires_grad", "is_meta"))


class _Recorded:
    """Hands functions of torch and numpy to the rules that `scalar_functions` registers."""

    __slots__ = ()
    torch_rule: ClassVar[Callable[..., Any]]
    numpy_rule: ClassVar[Callable[..., Any]]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return cls.torch_rule(func, types, args, kwargs or {})

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **kwargs: Any) -> Any:
        return self.numpy_rule(ufunc, method, inputs, kwargs)


def register_rules(torch_rule: Callable[..., Any], numpy_rule: Callable[..., Any]) -> None:
    """Set what becomes of a function of torch, and of a ufunc of numpy, that is called with recorded numbers."""
    _Recorded.torch_rule, _Recorded.numpy_rule = staticmethod(torch_rule), staticmethod(numpy_rule)


class NumberProxy(_Recorded):
    """A Python number of a traced step; in `isinstance` it is an int or a float."""

    __slots__ = ("_index", "_reader", "tape")

    def __init__(self, tape: Tape, index: int | None, reader: Callable[[Any], Any] | None = None) -> None:
        self.tape, self._index, self._reader = tape, index, reader

    @property
    def index(self) -> int:
        """The index on the tape; a reader's input is recorded at the first use."""
        if self._index is None:
            assert self._reader is not None
            self._index = self.tape.read(self._reader)
        return self._index

    @property
    def value(self) -> Any:
        """The number, without a guard."""
        return self.tape.values[self.index]

    @property  # type: ignore[misc]
    def __class__(self) -> Any:  # isinstance asks for it where the type itself does not match
        value = self.value if self._index is not None or self._reader is None else self._reader(self.tape.inputs)
        return type(value)

    def guard(self) -> Any:
        """Return the number; the trace holds for it alone."""
        return self.tape.guard(self.index)

    def __bool__(self) -> bool:
        return bool(self.tape.guard(self.tape.apply(bool, self.index)))

    def __neg__(self) -> NumberProxy:
        return NumberProxy(self.tape, self.tape.apply(t.negative, self.index))

    def __pos__(self) -> NumberProxy:
        return self

    def __abs__(self) -> NumberProxy:
        return NumberProxy(self.tape, self.tape.apply(t.absolute, self.index))

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        return np.asarray(self.guard(), *args, **kwargs)


def operator_index(value: Any) -> int:
    """Convert to an index; raises what Python raises for anything but an integer."""
    return value.__index__()  # type: ignore[no-any-return]


def operand_index(tape: Tape, other: Any) -> int | None:
    """Return the tape index of another operand; None if it is no number."""
    if type(other) is NumberProxy:
        return other.index
    if isinstance(other, (bool, int, float)):
        return tape.constant(other)
    if isinstance(other, np.number):
        return tape.constant(other.item())
    return None


def _conversion(name: str, function: Callable[..., Any]) -> None:
    setattr(NumberProxy, f"__{name}__", lambda self, *args: function(self.guard(), *args))


def _arithmetic(name: str, function: Callable[..., Any]) -> None:
    def forward(self: NumberProxy, other: Any) -> Any:
        index = operand_index(self.tape, other)
        return NotImplemented if index is None else NumberProxy(self.tape, self.tape.apply(function, self.index, index))

    def reflected(self: NumberProxy, other: Any) -> Any:
        index = operand_index(self.tape, other)
        return NotImplemented if index is None else NumberProxy(self.tape, self.tape.apply(function, index, self.index))

    setattr(NumberProxy, f"__{name}__", forward)
    setattr(NumberProxy, f"__r{name}__", reflected)


def _comparison(name: str, function: Callable[..., Any]) -> None:
    def compare(self: NumberProxy, other: Any) -> Any:
        index = operand_index(self.tape, other)
        if index is None:
            return NotImplemented
        return bool(self.tape.guard(self.tape.apply(function, self.index, index)))

    setattr(NumberProxy, f"__{name}__", compare)


_function: Callable[..., Any]
for _name, _function in (
    ("int", int), ("float", float), ("index", operator_index), ("round", round), ("floor", math.floor),
    ("ceil", math.ceil), ("trunc", math.trunc), ("hash", hash), ("repr", repr), ("format", format),
):  # fmt: skip
    _conversion(_name, _function)
for _name, _function in (
    ("add", t.add), ("sub", t.subtract), ("mul", t.multiply), ("truediv", t.divide), ("floordiv", t.floor_divide),
    ("mod", t.remainder), ("pow", t.power),
):  # fmt: skip
    _arithmetic(_name, _function)
COMPARISONS = {
    "lt": t.less, "le": t.less_equal, "gt": t.greater, "ge": t.greater_equal, "eq": t.equal, "ne": t.unequal,
}  # fmt: skip
for _name, _function in COMPARISONS.items():
    _comparison(_name, _function)


class Coefficient:
    """A recorded coefficient of a `LinearExpr`, by its index on the tape; equal to no number."""

    __slots__ = ("index", "tape")

    def __init__(self, tape: Tape, index: int) -> None:
        self.tape, self.index = tape, index

    def __eq__(self, other: object) -> bool:
        return type(other) is Coefficient and other.index == self.index

    def __hash__(self) -> int:
        return hash(self.index)

    def __mul__(self, other: float | Coefficient) -> float | Coefficient:
        if type(other) is not Coefficient and other in (0.0, 1.0):
            return self if other else 0.0
        return self._with(t.multiply, other)

    __rmul__ = __mul__

    def __add__(self, other: float | Coefficient) -> Coefficient:
        if type(other) is not Coefficient and other == 0.0:
            return self
        return self._with(t.add, other)

    __radd__ = __add__

    def __neg__(self) -> Coefficient:
        return Coefficient(self.tape, self.tape.apply(t.negative, self.index))

    def __sub__(self, other: float | Coefficient) -> Coefficient:
        return self + (-other)

    def __rsub__(self, other: float | Coefficient) -> Coefficient:
        return -self + other

    def __rtruediv__(self, other: float) -> Coefficient:
        return Coefficient(self.tape, self.tape.apply(t.divide, self.tape.constant(other), self.index))

    def _with(self, function: Callable[..., Any], other: float | Coefficient) -> Coefficient:
        index = other.index if type(other) is Coefficient else self.tape.constant(other)
        return Coefficient(self.tape, self.tape.apply(function, self.index, index))


#: A coefficient that is constant, or one that is recorded.
Factor = float | Coefficient


def finite(value: Factor) -> bool:
    """Return whether a coefficient is finite; a recorded one is checked once it has a number."""
    return type(value) is Coefficient or math.isfinite(value)  # type: ignore[arg-type]


class ScalarTensor(_Recorded, Tensor):
    """A tensor of recorded numbers, with its shape and dtype and no data.

    Attributes:
        tape: where its arithmetic is recorded.
        elements: the tape index of each element in row-major order; a single index if all are one number.
        array: in place of `elements`, the tape index of a list of all elements: a schedule, of which entries are taken.
        read_only: it stands for a tensor that exists before the step and must not be written.
    """

    read_only: bool = False
    tape: Tape
    elements: tuple[int, ...]
    array: int | None

    @staticmethod
    def make(
        tape: Tape, elements: tuple[int, ...], shape: Sequence[int], dtype: torch.dtype, array: int | None = None
    ) -> ScalarTensor:
        """Make one; `elements` and `array` as in the class."""
        with torch._C.DisableTorchFunctionSubclass():
            base = _empty(dtype) if not shape else _empty(dtype).expand(shape)
            scalar: ScalarTensor = torch.Tensor._make_subclass(ScalarTensor, base)
        scalar.tape, scalar.elements, scalar.array = tape, elements, array
        return scalar

    def __reduce_ex__(self, protocol: Any) -> Any:
        return guarded_tensor(self).__reduce_ex__(protocol)  # type: ignore[no-untyped-call]


@functools.cache
def _empty(dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False):
        return torch.empty((), dtype=dtype, device="cpu")


def uniform_index(scalar: ScalarTensor) -> int | None:
    """Return the tape index of the one number in all elements; None if they differ or are a schedule's."""
    return scalar.elements[0] if scalar.array is None and len(set(scalar.elements)) == 1 else None


def guarded_tensor(scalar: ScalarTensor) -> Tensor:
    """Return the numbers as a plain tensor, floats in float64; the trace holds for them alone."""
    tape = scalar.tape
    if scalar.array is not None:
        tape.guard(tape.apply(tuple, scalar.array))
        values = list(tape.values[scalar.array])
    else:
        values = [tape.guard(index) for index in scalar.elements]
    with torch._C.DisableTorchFunctionSubclass(), torch.inference_mode(False):
        dtype = torch.float64 if scalar.dtype.is_floating_point else scalar.dtype
        plain = torch.tensor(values, dtype=dtype, device="cpu")
        return spread(plain, scalar.shape).clone()


def spread(flat: Tensor, shape: Sequence[int]) -> Tensor:
    """Reshape elements in row-major order, or expand one for all."""
    return flat.reshape(()).expand(shape) if flat.numel() == 1 else flat.reshape(shape)


def scalar_of(tape: Tape, value: Any) -> ScalarTensor | None:
    """Return a number or a plain tensor of few elements as a `ScalarTensor`; None for anything else."""
    if isinstance(value, ScalarTensor):
        return value
    if type(value) is NumberProxy:
        return ScalarTensor.make(tape, (value.index,), (), _dtype_of(value.value))
    if isinstance(value, Tensor) and type(value) is Tensor and value.numel() <= 64:
        with torch._C.DisableTorchFunctionSubclass():
            elements = tuple(tape.constant(item) for item in value.detach().reshape(-1).tolist())
        return ScalarTensor.make(tape, elements, value.shape, value.dtype)
    if isinstance(value, np.number):
        value = value.item()
    if isinstance(value, (bool, int, float)):
        return ScalarTensor.make(tape, (tape.constant(value),), (), _dtype_of(value))
    return None


def _dtype_of(value: Any) -> torch.dtype:
    if isinstance(value, bool):
        return torch.bool
    return torch.int64 if isinstance(value, int) else torch.get_default_dtype()


def example_value(value: Any) -> Any:
    """Return a number of the same type for a `NumberProxy`, by which torch promotes dtypes; any other value itself."""
    return type(value.value)(1) if type(value) is NumberProxy else value
