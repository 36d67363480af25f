# SPDX-License-Identifier: MIT
"""Functions of torch and numpy on scalar proxies.

In: a function and its arguments, some of them `NumberProxy` or `ScalarTensor`.  Out: a proxy of the result, recorded on
the tape where there is a rule; else the function is done on the values, which are then guarded.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import tape as t
from .scalars import (
    BY_SHAPE,
    COMPARISONS,
    NumberProxy,
    ScalarTensor,
    example_value,
    guarded_tensor,
    operand_index,
    operator_index,
    register_rules,
    scalar_of,
    spread,
    uniform_index,
)
from .tape import Tape

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
    **COMPARISONS,
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
#: Functions that only rearrange elements: done on a tensor of the elements' tape indices.
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
    """Do a torch function of scalar proxies."""
    if any(issubclass(kind, Tensor) and kind not in (Tensor, ScalarTensor) for kind in types):
        return NotImplemented  # the rules of a tensor like the samples apply
    tape = _tape_of(args) or _tape_of(kwargs.values())
    assert tape is not None
    name = getattr(func, "__name__", str(func))
    if name == "__get__":
        attribute = getattr(getattr(func, "__self__", None), "__name__", "")
        if attribute == "device":
            return torch.device("cpu")
        if attribute in BY_SHAPE:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args)
        name = attribute
    special = name.startswith("__")
    in_place = (name.endswith("_") and not special) or (name.strip("_") in _IN_PLACE and special)
    name = name.strip("_")
    if in_place:
        return _rewritten(tape, _IN_PLACE.get(name, name), args, kwargs)
    result = _python_scalar(tape, name, args[0]) if special else NotImplemented
    if result is NotImplemented:
        result = _recorded(tape, name, func, args, kwargs)
    if result is not NotImplemented:
        return result
    with torch._C.DisableTorchFunctionSubclass():
        return func(*_specialized(list(args)), **{key: _specialized(value) for key, value in kwargs.items()})


class UnrecordedError(Exception):
    """A recorded number is written, which no tape expresses."""


#: Operators that write to their first operand.
_IN_PLACE = {"iadd": "add", "isub": "sub", "imul": "mul", "itruediv": "div", "idiv": "div", "ipow": "pow"}


def _rewritten(tape: Tape, name: str, args: Any, kwargs: dict[str, Any]) -> ScalarTensor:
    """Give the first operand other numbers, which every holder of it sees."""
    first = args[0]
    if (
        isinstance(first, ScalarTensor)
        and not first.read_only
        and first.array is None
        and name in _BINARY
        and not kwargs
    ):
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
        dtype = torch.bool if name in COMPARISONS or name in ("greater", "less") else None
        return _elementwise(tape, _BINARY[name], args, dtype or _quotient_dtype(name))
    if name in _REFLECTED and len(args) == 2 and not kwargs:
        return _elementwise(tape, _REFLECTED[name], args[::-1], _quotient_dtype(name))
    if name in ("clamp", "clip", "clamp_min", "clamp_max"):
        return _clamped(tape, name, args, kwargs)
    if name == "item" and uniform_index(args[0]) is not None:
        return NumberProxy(tape, args[0].elements[0])
    if name in ("to", "type", "type_as"):
        return _cast(tape, args[0], _wanted_dtype(args, kwargs))
    if name in _CASTS and len(args) == 1:
        return _cast(tape, args[0], _CASTS[name])
    if name in _SAME:
        first = args[0]
        return ScalarTensor.make(tape, first.elements, first.shape, first.dtype, first.array)
    if name in _MOVES:
        return _moved(tape, name, func, args, kwargs)
    if name == "linalg_solve":
        return _solved(tape, *args)
    if name == "repr":
        return repr(guarded_tensor(args[0]))
    return NotImplemented


def _narrowed(tape: Tape, scalar: ScalarTensor) -> ScalarTensor:
    """Round the numbers that diffusers has in float32."""
    if scalar.dtype is not torch.float32 or scalar.array is not None:
        return scalar
    return ScalarTensor.make(
        tape, tuple(tape.apply(t.as_float32, i) for i in scalar.elements), scalar.shape, scalar.dtype
    )


def _quotient_dtype(name: str) -> torch.dtype | None:
    """Return the dtype of a true division of integers; None for any other function."""
    return torch.float32 if name in ("div", "truediv", "true_divide", "divide", "rtruediv", "rdiv") else None


def _elementwise(tape: Tape, function: Callable[..., Any], args: Sequence[Any], at_least: torch.dtype | None) -> Any:
    operands = [scalar_of(tape, value) for value in args]
    if any(operand is None or operand.array is not None for operand in operands):
        return NotImplemented
    with torch._C.DisableTorchFunctionSubclass():
        stand_ins = [example_value(value) if not isinstance(value, np.number) else value.item() for value in args]
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
        return ScalarTensor.make(tape, (first,), shape, dtype)
    columns = [_broadcast(operand, shape) for operand in operands]  # type: ignore[arg-type]
    elements = tuple(tape.apply(function, *each) for each in zip(*columns, strict=True))
    return ScalarTensor.make(tape, elements, shape, dtype)


def _broadcast(operand: ScalarTensor, shape: Sequence[int]) -> list[int]:
    return [int(i) for i in _indices(operand).expand(shape).reshape(-1).tolist()]


def _indices(scalar: ScalarTensor) -> Tensor:
    """Return the tape index of each element, in a plain tensor of the same shape."""
    with torch._C.DisableTorchFunctionSubclass():
        found = torch.tensor(scalar.elements, dtype=torch.int64, device="cpu")
        return spread(found, scalar.shape)


def _clamped(tape: Tape, name: str, args: Any, kwargs: dict[str, Any]) -> Any:
    names = {"clamp_min": ("input", "min"), "clamp_max": ("input", "max")}.get(name, ("input", "min", "max"))
    given = dict(zip(names, args, strict=False)) | kwargs
    result = given["input"]
    for bound, function in (("min", t.maximum), ("max", t.minimum)):
        if given.get(bound) is not None and result is not NotImplemented:
            result = _elementwise(tape, function, (result, given[bound]), None)
    return result


def _python_scalar(tape: Tape, name: str, scalar: Any) -> Any:
    """Convert a tensor of one number as Python's built-ins do; a number that C code takes is guarded."""
    if name == "len":
        return scalar.shape[0]
    index = uniform_index(scalar) if name in ("bool", "int", "float", "index") and scalar.numel() == 1 else None
    if index is None:
        return NotImplemented
    if name == "bool":
        return bool(tape.guard(tape.apply(bool, index)))
    number = tape.guard(index)
    return int(number) if name == "int" else float(number) if name == "float" else operator_index(number)


def _wanted_dtype(args: Any, kwargs: dict[str, Any]) -> torch.dtype:
    for value in (*args[1:], *kwargs.values()):
        if isinstance(value, torch.dtype):
            return value
        if isinstance(value, Tensor):
            return value.dtype
    return args[0].dtype  # type: ignore[no-any-return]


def _cast(tape: Tape, scalar: ScalarTensor, dtype: torch.dtype) -> Any:
    """Cast; floats keep their width, since a step's scalars are computed in float64 and rounded once."""
    if dtype.is_floating_point == scalar.dtype.is_floating_point or dtype.is_floating_point:
        return ScalarTensor.make(tape, scalar.elements, scalar.shape, dtype, scalar.array)
    if scalar.array is not None or dtype is torch.bool:
        return NotImplemented
    elements = tuple(tape.apply(t.truncated, index) for index in _narrowed(tape, scalar).elements)
    return ScalarTensor.make(tape, elements, scalar.shape, dtype)


def _moved(tape: Tape, name: str, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    if name == "getitem":
        source, index = args
        if isinstance(source, ScalarTensor) and source.array is not None:
            return _entry(tape, source, index)
        if not isinstance(source, ScalarTensor):
            return _entry_of_plain(tape, source, index)
        if _tape_of((index,)) is not None:
            index = _specialized(index)
        args = (source, index)
    scalars: list[ScalarTensor] = []

    def indices_of(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return type(value)(indices_of(item) for item in value)
        if isinstance(value, Tensor):
            scalar = scalar_of(tape, value)
            if scalar is None or scalar.array is not None:
                raise _NoRuleError
            scalars.append(scalar)
            return _indices(scalar)
        return _specialized(value)

    try:
        moved_args = [indices_of(value) for value in args[:1]] + [_specialized(value) for value in args[1:]]
    except _NoRuleError:
        return NotImplemented
    with torch._C.DisableTorchFunctionSubclass():
        moved = func(*moved_args, **{key: _specialized(value) for key, value in kwargs.items()})
        dtype = functools.reduce(torch.promote_types, [scalar.dtype for scalar in scalars])

    def to_scalars(found: Any) -> Any:
        if isinstance(found, (list, tuple)):
            return type(found)(to_scalars(item) for item in found)
        elements = tuple(int(i) for i in found.reshape(-1).tolist())
        if len(elements) > 1 and len(set(elements)) == 1:
            elements = elements[:1]
        return ScalarTensor.make(tape, elements, found.shape, dtype)

    return to_scalars(moved)


class _NoRuleError(Exception):
    pass


def _entry(tape: Tape, source: ScalarTensor, index: Any) -> Any:
    """Take an entry of a schedule, or a short range of it."""
    assert source.array is not None
    if isinstance(index, ScalarTensor) and not index.dtype.is_floating_point and index.dtype is not torch.bool:
        at = uniform_index(index)
        if at is not None:
            return ScalarTensor.make(tape, (tape.apply(t.entry, source.array, at),), index.shape, source.dtype)
    if type(index) is NumberProxy:
        return ScalarTensor.make(tape, (tape.apply(t.entry, source.array, index.index),), (), source.dtype)
    if isinstance(index, int) and not isinstance(index, bool):
        return ScalarTensor.make(tape, (tape.apply(t.entry, source.array, tape.constant(index)),), (), source.dtype)
    count = source.shape[0]
    if isinstance(index, slice) and _tape_of((index.start, index.stop, index.step)) is None:
        at_most = range(count)[index]
        if len(at_most) <= 64:
            elements = tuple(tape.apply(t.entry, source.array, tape.constant(i)) for i in at_most)
            return ScalarTensor.make(tape, elements, (len(at_most),), source.dtype)
    return NotImplemented


def _entry_of_plain(tape: Tape, source: Any, index: Any) -> Any:
    """Take an entry of a plain tensor of few numbers, such as one that the step has made."""
    if type(source) is not Tensor or source.dim() != 1 or source.numel() > 64:
        return NotImplemented
    numbers = tape.constant(tuple(source.tolist()))
    return _entry(tape, ScalarTensor.make(tape, (), source.shape, source.dtype, numbers), index)


def _solved(tape: Tape, matrix: Any, right: Any) -> Any:
    """Solve a small system, as one operation whose result is a list."""
    a, b = scalar_of(tape, matrix), scalar_of(tape, right)
    if a is None or b is None or a.array is not None or b.array is not None or b.dim() != 1:
        return NotImplemented
    count = b.shape[0]
    system = (*_broadcast(a, a.shape), *_broadcast(b, b.shape))
    solution = tape.apply(functools.partial(_solve, count), *system) if len(system) > 2 else None
    if solution is None:
        return _elementwise(tape, t.divide, (right, matrix.reshape(right.shape)), None)
    elements = tuple(tape.apply(t.entry, solution, tape.constant(i)) for i in range(count))
    return ScalarTensor.make(tape, elements, (count,), torch.promote_types(a.dtype, b.dtype))


def _solve(count: int, *numbers: float) -> list[float]:
    with torch._C.DisableTorchFunctionSubclass():
        system = torch.tensor(numbers, dtype=torch.float64, device="cpu")
        square = system[: count * count].reshape(count, count)
        solution: list[float] = torch.linalg.solve(square, system[count * count :]).tolist()
        return solution


def _tape_of(values: Any) -> Tape | None:
    """Return the tape of the first proxy among values and lists of them."""
    for value in values:
        if type(value) is NumberProxy or isinstance(value, ScalarTensor):
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


def _specialized(value: Any) -> Any:
    """Return an argument with plain values in place of proxies, whose values are guarded."""
    if type(value) is NumberProxy:
        return value.guard()
    if isinstance(value, ScalarTensor):
        return guarded_tensor(value)
    if isinstance(value, slice):
        return slice(*(_specialized(part) for part in (value.start, value.stop, value.step)))
    if isinstance(value, (list, tuple)) and not isinstance(value, torch.Size):
        return type(value)(_specialized(item) for item in value)
    return value


_UFUNCS = {
    "log": "log", "exp": "exp", "sqrt": "sqrt", "expm1": "expm1", "log1p": "log1p", "absolute": "abs",
    "negative": "neg", "add": "add", "subtract": "sub", "multiply": "mul", "divide": "div", "true_divide": "div",
    "power": "pow", "minimum": "minimum", "maximum": "maximum", "arctan": "atan", "sin": "sin", "cos": "cos",
    "tan": "tan", "tanh": "tanh",
}  # fmt: skip


def numpy_function(ufunc: Any, method: str, inputs: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Do a numpy function of scalar proxies."""
    tape = _tape_of(inputs)
    assert tape is not None
    name = _UFUNCS.get(ufunc.__name__)
    if method == "__call__" and not kwargs and name is not None:
        if any(isinstance(value, Tensor) and not isinstance(value, ScalarTensor) for value in inputs):
            return NotImplemented
        function = _UNARY.get(name) or _BINARY[name]
        if not any(isinstance(value, Tensor) for value in inputs):
            indices = [operand_index(tape, value) for value in inputs]
            if None not in indices:
                return NumberProxy(tape, tape.apply(function, *indices))  # type: ignore[arg-type]
        else:
            result = _elementwise(tape, function, inputs, None if name in _KEEPS_DTYPE else torch.float32)
            if result is not NotImplemented:
                return result
    plain = [_specialized(value) for value in inputs]
    return getattr(ufunc, method)(*(v.numpy() if isinstance(v, Tensor) else v for v in plain), **kwargs)


register_rules(scalar_function, numpy_function)
