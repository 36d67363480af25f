# SPDX-License-Identifier: MIT
"""Numbers and tensors of numbers in a traced step: their arithmetic goes to a `Tape`.

`Number` stands for a Python number (the step index, eta), `Scalar` for a tensor of numbers (an entry of the schedule).
Both have a value, so that a branch can be taken, and taking one is an observation on the tape.  What is not recorded
as a formula is done on the values themselves, each of which is then observed: the trace holds for those values alone.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import tape as t
from .tape import Tape

#: Attributes of a tensor that are answered by its shape and dtype.
BY_SHAPE = frozenset(("shape", "dtype", "ndim", "layout", "is_cuda", "is_sparse", "requires_grad", "is_meta"))


class Number:
    """A Python number of a traced step.  It passes for an int or a float in `isinstance`."""

    __slots__ = ("_index", "_reader", "tape")

    def __init__(self, tape: Tape, index: int | None, reader: Callable[[Any], Any] | None = None) -> None:
        self.tape, self._index, self._reader = tape, index, reader

    @property
    def index(self) -> int:
        """Its place on the tape.  What a reader reads is recorded when it is first asked for."""
        if self._index is None:
            assert self._reader is not None
            self._index = self.tape.read(self._reader)
        return self._index

    @property
    def value(self) -> Any:
        """The number, not observed."""
        return self.tape.values[self.index]

    @property  # type: ignore[misc]
    def __class__(self) -> Any:  # what isinstance asks where the type itself does not fit
        value = self.value if self._index is not None or self._reader is None else self._reader(self.tape.environment)
        return type(value)

    def observe(self) -> Any:
        """The number; the trace holds for it alone."""
        return self.tape.observe(self.index)

    def __bool__(self) -> bool:
        return bool(self.tape.observe(self.tape.apply(bool, self.index)))

    def __int__(self) -> int:
        return int(self.observe())

    def __float__(self) -> float:
        return float(self.observe())

    def __index__(self) -> int:
        return operator_index(self.observe())

    def __round__(self, digits: int | None = None) -> Any:
        return round(self.observe(), digits)

    def __floor__(self) -> int:
        return math.floor(self.observe())  # type: ignore[no-any-return]

    def __ceil__(self) -> int:
        return math.ceil(self.observe())  # type: ignore[no-any-return]

    def __trunc__(self) -> int:
        return math.trunc(self.observe())  # type: ignore[no-any-return]

    def __hash__(self) -> int:
        return hash(self.observe())

    def __repr__(self) -> str:
        return repr(self.observe())

    def __format__(self, spec: str) -> str:
        return format(self.observe(), spec)

    def __neg__(self) -> Number:
        return Number(self.tape, self.tape.apply(t.negative, self.index))

    def __pos__(self) -> Number:
        return self

    def __abs__(self) -> Number:
        return Number(self.tape, self.tape.apply(t.absolute, self.index))

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        return np.asarray(self.observe(), *args, **kwargs)

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **kwargs: Any) -> Any:
        from .scalar_functions import numpy_function

        return numpy_function(ufunc, method, inputs, kwargs)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        from .scalar_functions import scalar_function  # which makes numbers itself

        return scalar_function(func, types, args, kwargs or {})


def operator_index(value: Any) -> int:
    """The integer that indexing takes, refused for anything else as Python refuses it."""
    return value.__index__()  # type: ignore[no-any-return]


def operand_index(tape: Tape, other: Any) -> int | None:
    """The index of another operand; None for what is no number."""
    if type(other) is Number:
        return other.index
    if isinstance(other, (bool, int, float)):
        return tape.constant(other)
    if isinstance(other, np.number):
        return tape.constant(other.item())
    return None


def _arithmetic(name: str, function: Callable[..., Any]) -> None:
    def forward(self: Number, other: Any) -> Any:
        index = operand_index(self.tape, other)
        return NotImplemented if index is None else Number(self.tape, self.tape.apply(function, self.index, index))

    def reflected(self: Number, other: Any) -> Any:
        index = operand_index(self.tape, other)
        return NotImplemented if index is None else Number(self.tape, self.tape.apply(function, index, self.index))

    setattr(Number, f"__{name}__", forward)
    setattr(Number, f"__r{name}__", reflected)


def _comparison(name: str, function: Callable[..., Any]) -> None:
    def compare(self: Number, other: Any) -> Any:
        index = operand_index(self.tape, other)
        if index is None:
            return NotImplemented
        return bool(self.tape.observe(self.tape.apply(function, self.index, index)))

    setattr(Number, f"__{name}__", compare)


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
    """A number of a formula, recorded: what `LinearExpr`s are scaled and added by.  Equal to itself alone."""

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


#: A coefficient that is known, or one that is recorded.
Factor = float | Coefficient


def finite(value: Factor) -> bool:
    """Whether a coefficient is finite, as far as that is known while tracing."""
    return type(value) is Coefficient or math.isfinite(value)  # type: ignore[arg-type]


class Scalar(Tensor):
    """A tensor of numbers of a traced step, with its shape and dtype and no contents of its own.

    Attributes:
        tape: where its arithmetic goes.
        elements: the index of each element in row-major order; one index alone where all are one number.
        array: in place of `elements`, the index of a list with all elements: a schedule, of which entries are taken.
        held: whether it stands for a tensor that is there before the step, and is not to be written.
    """

    held: bool = False
    tape: Tape
    elements: tuple[int, ...]
    array: int | None

    @staticmethod
    def make(
        tape: Tape, elements: tuple[int, ...], shape: Sequence[int], dtype: torch.dtype, array: int | None = None
    ) -> Scalar:
        """A tensor of recorded numbers; `array` as in the class."""
        with torch._C.DisableTorchFunctionSubclass():
            base = _empty(dtype) if not shape else _empty(dtype).expand(shape)
            scalar: Scalar = torch.Tensor._make_subclass(Scalar, base)
        scalar.tape, scalar.elements, scalar.array = tape, elements, array
        return scalar

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        from .scalar_functions import scalar_function  # which makes numbers itself

        return scalar_function(func, types, args, kwargs or {})

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **kwargs: Any) -> Any:
        from .scalar_functions import numpy_function

        return numpy_function(ufunc, method, inputs, kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return observed_tensor(self).__reduce_ex__(protocol)  # type: ignore[no-untyped-call]


@functools.cache
def _empty(dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False):
        return torch.empty((), dtype=dtype, device="cpu")


def element(scalar: Scalar) -> int | None:
    """The index of the one number that all elements are; None where they differ or are not told apart."""
    return scalar.elements[0] if scalar.array is None and len(set(scalar.elements)) == 1 else None


def observed_tensor(scalar: Scalar) -> Tensor:
    """The numbers as a plain tensor, float64 where they are no integers; the trace holds for them alone."""
    tape = scalar.tape
    if scalar.array is not None:
        tape.observe(tape.apply(tuple, scalar.array))
        values = list(tape.values[scalar.array])
    else:
        values = [tape.observe(index) for index in scalar.elements]
    with torch._C.DisableTorchFunctionSubclass(), torch.inference_mode(False):
        plain = torch.tensor(values, dtype=_widest(scalar.dtype), device="cpu")
        return spread(plain, scalar.shape).clone()


def spread(flat: Tensor, shape: Sequence[int]) -> Tensor:
    """Elements in row-major order, or one for all, in a shape."""
    return flat.reshape(()).expand(shape) if flat.numel() == 1 else flat.reshape(shape)


def _widest(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype.is_floating_point else dtype


def scalar_of(tape: Tape, value: Any) -> Scalar | None:
    """A number or a plain tensor of few elements as a `Scalar`; None for anything else."""
    if isinstance(value, Scalar):
        return value
    if type(value) is Number:
        return Scalar.make(tape, (value.index,), (), _dtype_of(value.value))
    if isinstance(value, Tensor) and type(value) is Tensor and value.numel() <= 64:
        with torch._C.DisableTorchFunctionSubclass():
            elements = tuple(tape.constant(item) for item in value.detach().reshape(-1).tolist())
        return Scalar.make(tape, elements, value.shape, value.dtype)
    if isinstance(value, np.number):
        value = value.item()
    if isinstance(value, (bool, int, float)):
        return Scalar.make(tape, (tape.constant(value),), (), _dtype_of(value))
    return None


def _dtype_of(value: Any) -> torch.dtype:
    if isinstance(value, bool):
        return torch.bool
    return torch.int64 if isinstance(value, int) else torch.get_default_dtype()


def bare(value: Any) -> Any:
    """A stand-in for a `Number` by which torch finds shapes and dtypes; any other value itself."""
    return type(value.value)(1) if type(value) is Number else value
