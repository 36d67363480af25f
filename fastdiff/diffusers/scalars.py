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
_BY_SHAPE = frozenset(("shape", "dtype", "ndim", "layout", "is_cuda", "is_sparse", "requires_grad", "is_meta"))


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
        return _ufunc(ufunc, method, inputs, kwargs)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return scalar_function(func, types, args, kwargs or {})


def operator_index(value: Any) -> int:
    """The integer that indexing takes, refused for anything else as Python refuses it."""
    return value.__index__()  # type: ignore[no-any-return]


def _operand(tape: Tape, other: Any) -> int | None:
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
        index = _operand(self.tape, other)
        return NotImplemented if index is None else Number(self.tape, self.tape.apply(function, self.index, index))

    def reflected(self: Number, other: Any) -> Any:
        index = _operand(self.tape, other)
        return NotImplemented if index is None else Number(self.tape, self.tape.apply(function, index, self.index))

    setattr(Number, f"__{name}__", forward)
    setattr(Number, f"__r{name}__", reflected)


def _comparison(name: str, function: Callable[..., Any]) -> None:
    def compare(self: Number, other: Any) -> Any:
        index = _operand(self.tape, other)
        if index is None:
            return NotImplemented
        return bool(self.tape.observe(self.tape.apply(function, self.index, index)))

    setattr(Number, f"__{name}__", compare)


for _name, _function in (
    ("add", t.add), ("sub", t.subtract), ("mul", t.multiply), ("truediv", t.divide), ("floordiv", t.floor_divide),
    ("mod", t.remainder), ("pow", t.power),
):  # fmt: skip
    _arithmetic(_name, _function)
_COMPARISONS = {
    "lt": t.less, "le": t.less_equal, "gt": t.greater, "ge": t.greater_equal, "eq": t.equal, "ne": t.unequal,
}  # fmt: skip
for _name, _function in _COMPARISONS.items():
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
        return scalar_function(func, types, args, kwargs or {})

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **kwargs: Any) -> Any:
        return _ufunc(ufunc, method, inputs, kwargs)

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
        return _spread(plain, scalar.shape).clone()


def _spread(flat: Tensor, shape: Sequence[int]) -> Tensor:
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


# --- functions -------------------------------------------------------------------------------------------------------

_BINARY: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(("add", "radd"), t.add),
    **dict.fromkeys(("sub", "subtract"), t.subtract),
    **dict.fromkeys(("mul", "rmul", "multiply"), t.multiply),
    **dict.fromkeys(("div", "truediv", "true_divide", "divide"), t.divide),
    **dict.fromkeys(("floordiv", "floor_divide"), t.floor_divide),
    **dict.fromkeys(("mod", "remainder"), t.remainder),
    "pow": t.power,
    "minimum": t.minimum,
    "maximum": t.maximum,
    **_COMPARISONS,
    "greater": t.greater, "less": t.less,
}  # fmt: skip
_REFLECTED: dict[str, Callable[..., Any]] = {
    "rsub": t.subtract,
    **dict.fromkeys(("rtruediv", "rdiv"), t.divide),
    "rfloordiv": t.floor_divide,
    "rpow": t.power,
    "rmod": t.remainder,
}
_UNARY: dict[str, Callable[[Any], Any]] = {
    **dict.fromkeys(("neg", "negative"), t.negative),
    **dict.fromkeys(("abs", "absolute"), t.absolute),
    "sqrt": t.sqrt, "exp": t.exp, "log": t.log, "expm1": t.expm1, "log1p": t.log1p, "sin": t.sin, "cos": t.cos,
    "tan": t.tan, "atan": t.atan, "arctan": t.atan, "acos": t.acos, "asin": t.asin, "tanh": t.tanh,
    "sigmoid": t.sigmoid, "floor": t.rounded_down, "ceil": t.rounded_up, "round": t.rounded,
}  # fmt: skip
#: Unary functions with jumps.
_JUMPS = frozenset(("floor", "ceil", "round"))
#: Unary functions that keep integers integers.
_KEEPS_DTYPE = frozenset(("neg", "negative", "abs", "absolute", "floor", "ceil", "round"))
#: What only moves elements about: done on the places of the elements.
_MOVES = frozenset(
    (
        "getitem", "flatten", "view", "reshape", "unsqueeze", "squeeze", "expand", "expand_as", "repeat", "transpose",
        "permute", "flip", "stack", "cat", "concat", "unbind", "broadcast_to", "t", "view_as", "reshape_as", "T",
        "atleast_1d", "select", "narrow", "movedim", "split", "chunk",
    )
)  # fmt: skip
_SAME = frozenset(("contiguous", "clone", "detach", "cpu", "cuda", "requires_grad_"))
_CASTS = {
    "float": torch.float32, "double": torch.float64, "half": torch.float16, "bfloat16": torch.bfloat16,
    "long": torch.int64, "int": torch.int32, "bool": torch.bool, "short": torch.int16,
}  # fmt: skip
_SHAPES = frozenset(("size", "dim", "numel", "nelement", "ndimension", "is_floating_point", "element_size", "stride",
                     "is_contiguous", "is_complex", "get_device"))  # fmt: skip


def scalar_function(func: Any, types: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """A torch function of scalars: recorded where there is a rule, else done on their values."""
    if any(issubclass(kind, Tensor) and kind not in (Tensor, Scalar) for kind in types):
        return NotImplemented  # a tensor like the samples has rules of its own
    tape = _tape_of(args) or _tape_of(kwargs.values())
    assert tape is not None
    name = getattr(func, "__name__", str(func))
    if name == "__get__":
        attribute = getattr(getattr(func, "__self__", None), "__name__", "")
        if attribute == "device":
            return torch.device("cpu")
        if attribute in _BY_SHAPE:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args)
        name = attribute
    special = name.startswith("__")
    in_place = (name.endswith("_") and not special) or (name.strip("_") in _IN_PLACE and special)
    name = name.strip("_")
    if in_place:
        return _rewritten(tape, _IN_PLACE.get(name, name), args, kwargs)
    result = _taken_out(tape, name, args[0]) if special else NotImplemented
    if result is NotImplemented:
        result = _recorded(tape, name, func, args, kwargs)
    if result is not NotImplemented:
        return result
    with torch._C.DisableTorchFunctionSubclass():
        return func(*_on_values(list(args)), **{key: _on_values(value) for key, value in kwargs.items()})


class UnrecordedError(Exception):
    """Something is done to recorded numbers that is neither recorded nor done on their values."""


#: Operators that write to their first operand.
_IN_PLACE = {"iadd": "add", "isub": "sub", "imul": "mul", "itruediv": "div", "idiv": "div", "ipow": "pow"}


def _rewritten(tape: Tape, name: str, args: Any, kwargs: dict[str, Any]) -> Scalar:
    """The first operand with other numbers; whoever holds it sees them."""
    first = args[0]
    if isinstance(first, Scalar) and not first.held and first.array is None and name in _BINARY and not kwargs:
        result = _elementwise(tape, _BINARY[name], args, None)
        if result is not NotImplemented and result.shape == first.shape:
            first.elements = result.elements
            return first
    raise UnrecordedError(f"{name}_ writes to a tensor that is read")


def _recorded(tape: Tape, name: str, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    if name in _SHAPES:
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)
    if name in _JUMPS and len(args) == 1 and not kwargs:
        args = (_narrowed(tape, args[0]),)
    if name in _UNARY and len(args) == 1 and not kwargs:
        return _elementwise(tape, _UNARY[name], args, None if name in _KEEPS_DTYPE else torch.float32)
    if name in _BINARY and len(args) == 2 and not kwargs:
        dtype = torch.bool if name in _COMPARISONS or name in ("greater", "less") else None
        return _elementwise(tape, _BINARY[name], args, dtype or _quotient_dtype(name))
    if name in _REFLECTED and len(args) == 2 and not kwargs:
        return _elementwise(tape, _REFLECTED[name], args[::-1], _quotient_dtype(name))
    if name in ("clamp", "clip", "clamp_min", "clamp_max"):
        return _clamped(tape, name, args, kwargs)
    if name == "item" and element(args[0]) is not None:
        return Number(tape, args[0].elements[0])
    if name in ("to", "type", "type_as"):
        return _cast(tape, args[0], _wanted_dtype(args, kwargs))
    if name in _CASTS and len(args) == 1:
        return _cast(tape, args[0], _CASTS[name])
    if name in _SAME:
        first = args[0]
        return Scalar.make(tape, first.elements, first.shape, first.dtype, first.array)
    if name in _MOVES:
        return _moved(tape, name, func, args, kwargs)
    if name == "linalg_solve":
        return _solved(tape, *args)
    if name == "repr":
        return repr(observed_tensor(args[0]))
    return NotImplemented


def _narrowed(tape: Tape, scalar: Scalar) -> Scalar:
    """Numbers that diffusers has in float32, rounded to it."""
    if scalar.dtype is not torch.float32 or scalar.array is not None:
        return scalar
    return Scalar.make(tape, tuple(tape.apply(t.as_float32, i) for i in scalar.elements), scalar.shape, scalar.dtype)


def _quotient_dtype(name: str) -> torch.dtype | None:
    """The dtype that a true division gives integers at least."""
    return torch.float32 if name in ("div", "truediv", "true_divide", "divide", "rtruediv", "rdiv") else None


def _elementwise(tape: Tape, function: Callable[..., Any], args: Sequence[Any], at_least: torch.dtype | None) -> Any:
    operands = [scalar_of(tape, value) for value in args]
    if any(operand is None or operand.array is not None for operand in operands):
        return NotImplemented
    with torch._C.DisableTorchFunctionSubclass():
        stand_ins = [bare(value) if not isinstance(value, np.number) else value.item() for value in args]
        dtype = torch.result_type(*stand_ins) if len(args) == 2 else args[0].dtype
        if at_least is torch.bool:
            dtype = torch.bool
        elif at_least is not None and not dtype.is_floating_point:
            dtype = torch.get_default_dtype()
        shapes = [operand.shape for operand in operands]  # type: ignore[union-attr]
        shape = torch.broadcast_shapes(*shapes) if any(shapes) else torch.Size()  # type: ignore[no-untyped-call]
    if not dtype.is_floating_point and dtype is not torch.bool and function is t.divide:
        return NotImplemented
    if all(len(operand.elements) == 1 for operand in operands):  # type: ignore[union-attr]
        first = tape.apply(function, *(operand.elements[0] for operand in operands))  # type: ignore[union-attr]
        return Scalar.make(tape, (first,), shape, dtype)
    columns = [_broadcast(operand, shape) for operand in operands]  # type: ignore[arg-type]
    elements = tuple(tape.apply(function, *each) for each in zip(*columns, strict=True))
    return Scalar.make(tape, elements, shape, dtype)


def _broadcast(operand: Scalar, shape: Sequence[int]) -> list[int]:
    return [int(i) for i in _places(operand).expand(shape).reshape(-1).tolist()]


def _places(scalar: Scalar) -> Tensor:
    """The index of each element, in a plain tensor of the same shape."""
    with torch._C.DisableTorchFunctionSubclass():
        found = torch.tensor(scalar.elements, dtype=torch.int64, device="cpu")
        return _spread(found, scalar.shape)


def _clamped(tape: Tape, name: str, args: Any, kwargs: dict[str, Any]) -> Any:
    names = {"clamp_min": ("input", "min"), "clamp_max": ("input", "max")}.get(name, ("input", "min", "max"))
    given = dict(zip(names, args, strict=False)) | kwargs
    result = given["input"]
    for bound, function in (("min", t.maximum), ("max", t.minimum)):
        if given.get(bound) is not None and result is not NotImplemented:
            result = _elementwise(tape, function, (result, given[bound]), None)
    return result


def _taken_out(tape: Tape, name: str, scalar: Any) -> Any:
    """What Python itself asks a tensor of one number for; a number that C code takes is observed."""
    if name == "len":
        return scalar.shape[0]
    index = element(scalar) if name in ("bool", "int", "float", "index") and scalar.numel() == 1 else None
    if index is None:
        return NotImplemented
    if name == "bool":
        return bool(tape.observe(tape.apply(bool, index)))
    number = tape.observe(index)
    return int(number) if name == "int" else float(number) if name == "float" else operator_index(number)


def _wanted_dtype(args: Any, kwargs: dict[str, Any]) -> torch.dtype:
    for value in (*args[1:], *kwargs.values()):
        if isinstance(value, torch.dtype):
            return value
        if isinstance(value, Tensor):
            return value.dtype
    return args[0].dtype  # type: ignore[no-any-return]


def _cast(tape: Tape, scalar: Scalar, dtype: torch.dtype) -> Any:
    """Another dtype.  Numbers stay as wide as they are: a step's scalars are computed in float64 and rounded once."""
    if dtype.is_floating_point == scalar.dtype.is_floating_point or dtype.is_floating_point:
        return Scalar.make(tape, scalar.elements, scalar.shape, dtype, scalar.array)
    if scalar.array is not None or dtype is torch.bool:
        return NotImplemented
    elements = tuple(tape.apply(t.truncated, index) for index in _narrowed(tape, scalar).elements)
    return Scalar.make(tape, elements, scalar.shape, dtype)


def _moved(tape: Tape, name: str, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    if name == "getitem":
        source, index = args
        if isinstance(source, Scalar) and source.array is not None:
            return _entry(tape, source, index)
        if not isinstance(source, Scalar):
            return _entry_of_plain(tape, source, index)
        if _tape_of((index,)) is not None:
            index = _on_values(index)
        args = (source, index)
    scalars: list[Scalar] = []

    def places(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return type(value)(places(item) for item in value)
        if isinstance(value, Tensor):
            scalar = scalar_of(tape, value)
            if scalar is None or scalar.array is not None:
                raise _NoRuleError
            scalars.append(scalar)
            return _places(scalar)
        return _on_values(value)

    try:
        moved_args = [places(value) for value in args[:1]] + [_on_values(value) for value in args[1:]]
    except _NoRuleError:
        return NotImplemented
    with torch._C.DisableTorchFunctionSubclass():
        moved = func(*moved_args, **{key: _on_values(value) for key, value in kwargs.items()})
        dtype = functools.reduce(torch.promote_types, [scalar.dtype for scalar in scalars])

    def back(found: Any) -> Any:
        if isinstance(found, (list, tuple)):
            return type(found)(back(item) for item in found)
        elements = tuple(int(i) for i in found.reshape(-1).tolist())
        if len(elements) > 1 and len(set(elements)) == 1:
            elements = elements[:1]
        return Scalar.make(tape, elements, found.shape, dtype)

    return back(moved)


class _NoRuleError(Exception):
    pass


def _entry(tape: Tape, source: Scalar, index: Any) -> Any:
    """An entry of a schedule; a range of it where it is a short one."""
    assert source.array is not None
    if isinstance(index, Scalar) and not index.dtype.is_floating_point and index.dtype is not torch.bool:
        at = element(index)
        if at is not None:
            return Scalar.make(tape, (tape.apply(t.entry, source.array, at),), index.shape, source.dtype)
    if type(index) is Number:
        return Scalar.make(tape, (tape.apply(t.entry, source.array, index.index),), (), source.dtype)
    if isinstance(index, int) and not isinstance(index, bool):
        return Scalar.make(tape, (tape.apply(t.entry, source.array, tape.constant(index)),), (), source.dtype)
    count = source.shape[0]
    if isinstance(index, slice) and _tape_of((index.start, index.stop, index.step)) is None:
        at_most = range(count)[index]
        if len(at_most) <= 64:
            elements = tuple(tape.apply(t.entry, source.array, tape.constant(i)) for i in at_most)
            return Scalar.make(tape, elements, (len(at_most),), source.dtype)
    return NotImplemented


def _entry_of_plain(tape: Tape, source: Any, index: Any) -> Any:
    """An entry of a plain tensor of few numbers, such as one that the step has made."""
    if type(source) is not Tensor or source.dim() != 1 or source.numel() > 64:
        return NotImplemented
    numbers = tape.constant(tuple(source.tolist()))
    return _entry(tape, Scalar.make(tape, (), source.shape, source.dtype, numbers), index)


def _solved(tape: Tape, matrix: Any, right: Any) -> Any:
    """The solution of a small system, as one operation with as many results."""
    a, b = scalar_of(tape, matrix), scalar_of(tape, right)
    if a is None or b is None or a.array is not None or b.array is not None or b.dim() != 1:
        return NotImplemented
    count = b.shape[0]
    system = (*_broadcast(a, a.shape), *_broadcast(b, b.shape))
    solution = tape.apply(functools.partial(_solve, count), *system) if len(system) > 2 else None
    if solution is None:
        return _elementwise(tape, t.divide, (right, matrix.reshape(right.shape)), None)
    elements = tuple(tape.apply(t.entry, solution, tape.constant(i)) for i in range(count))
    return Scalar.make(tape, elements, (count,), torch.promote_types(a.dtype, b.dtype))


def _solve(count: int, *numbers: float) -> list[float]:
    with torch._C.DisableTorchFunctionSubclass():
        system = torch.tensor(numbers, dtype=torch.float64, device="cpu")
        square = system[: count * count].reshape(count, count)
        solution: list[float] = torch.linalg.solve(square, system[count * count :]).tolist()
        return solution


def _tape_of(values: Any) -> Tape | None:
    """The tape of the first recorded number among values, lists of them included."""
    for value in values:
        if type(value) is Number or isinstance(value, Scalar):
            return value.tape
        if isinstance(value, (list, tuple)):
            found = _tape_of(value)
            if found is not None:
                return found
        elif isinstance(value, slice):
            found = _tape_of((value.start, value.stop, value.step))
            if found is not None:
                return found
    return None


def _on_values(value: Any) -> Any:
    """An argument with plain numbers and tensors in place of recorded ones, which are observed."""
    if type(value) is Number:
        return value.observe()
    if isinstance(value, Scalar):
        return observed_tensor(value)
    if isinstance(value, slice):
        return slice(*(_on_values(part) for part in (value.start, value.stop, value.step)))
    if isinstance(value, (list, tuple)) and not isinstance(value, torch.Size):
        return type(value)(_on_values(item) for item in value)
    return value


_UFUNCS = {
    "log": "log", "exp": "exp", "sqrt": "sqrt", "expm1": "expm1", "log1p": "log1p", "absolute": "abs",
    "negative": "neg", "add": "add", "subtract": "sub", "multiply": "mul", "divide": "div", "true_divide": "div",
    "power": "pow", "minimum": "minimum", "maximum": "maximum", "arctan": "atan", "sin": "sin", "cos": "cos",
    "tan": "tan", "tanh": "tanh",
}  # fmt: skip


def _ufunc(ufunc: Any, method: str, inputs: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """A numpy function of recorded numbers."""
    tape = _tape_of(inputs)
    assert tape is not None
    name = _UFUNCS.get(ufunc.__name__)
    if method == "__call__" and not kwargs and name is not None:
        if any(isinstance(value, Tensor) and not isinstance(value, Scalar) for value in inputs):
            return NotImplemented
        function = _UNARY.get(name) or _BINARY[name]
        if not any(isinstance(value, Tensor) for value in inputs):
            indices = [_operand(tape, value) for value in inputs]
            if None not in indices:
                return Number(tape, tape.apply(function, *indices))  # type: ignore[arg-type]
        else:
            result = _elementwise(tape, function, inputs, None if name in _KEEPS_DTYPE else torch.float32)
            if result is not NotImplemented:
                return result
    plain = [_on_values(value) for value in inputs]
    return getattr(ufunc, method)(*(v.numpy() if isinstance(v, Tensor) else v for v in plain), **kwargs)
