# SPDX-License-Identifier: MIT
"""Affine proxies: tensors without memory whose arithmetic builds linear expressions.

In: a scheduler's own `step`, called with an `AffineProxy` in place of the sample, the model output and the history.
Out: the proxies that it returns; their `LinearExpr` is the step, a sum of coefficient times leaf.

A leaf is an input, by name, or one of four things that a fused step does besides adding: a clamp or dynamic threshold
(`Clamped`), a learned standard deviation (`LearnedStd`), noise times one (`ScaledNoise`), a mask (`Masked`).  Any other
operation raises `UnsupportedStep` with its name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .scalars import Coefficient, Factor, NumberProxy, ScalarTensor, example_value, finite, uniform_index

#: The leaf of a constant term.
ONE = "1"


class UnsupportedStep(Exception):  # noqa: N818, no error of the caller's
    """The step has no plan; the message is the reason, as a clause about the step."""


@dataclass(frozen=True)
class Clamped:
    """An expression clamped to ±bound; for a bound of None, clamped to its dynamic threshold and divided by it."""

    inner: LinearExpr
    bound: Factor | None


@dataclass(frozen=True)
class LearnedStd:
    """exp or the square root of an expression, which is a standard deviation where it multiplies noise."""

    inner: LinearExpr
    function: str


@dataclass(frozen=True)
class ScaledNoise:
    """Noise times a learned standard deviation."""

    std: LearnedStd
    noise: str


@dataclass(frozen=True)
class Masked:
    """An expression times a mask tensor, element by element."""

    mask: str
    inner: LinearExpr


Leaf = str | Clamped | LearnedStd | ScaledNoise | Masked


@dataclass(frozen=True)
class LinearExpr:
    """A sum of terms (leaf, coefficient); no leaf occurs twice and no coefficient is 0."""

    terms: tuple[tuple[Leaf, Factor], ...] = ()

    @staticmethod
    def of(leaf: Leaf) -> LinearExpr:
        return LinearExpr(((leaf, 1.0),))

    def __iter__(self) -> Iterator[tuple[Leaf, Factor]]:
        return iter(self.terms)

    def scaled(self, factor: Factor) -> LinearExpr:
        if not finite(factor):
            return UNBOUNDED
        return LinearExpr(tuple((leaf, k) for leaf, k in ((leaf, c * factor) for leaf, c in self.terms) if k != 0.0))

    def plus(self, other: LinearExpr, factor: Factor = 1.0) -> LinearExpr:
        total = dict(self.terms)
        for leaf, c in other.terms:
            total[leaf] = total.get(leaf, 0.0) + factor * c
        return LinearExpr(tuple((leaf, c) for leaf, c in total.items() if c != 0.0))

    @property
    def single_leaf(self) -> Leaf | None:
        """The leaf that the expression equals, if it is one leaf with coefficient 1."""
        return self.terms[0][0] if len(self.terms) == 1 and self.terms[0][1] == 1.0 else None


#: Something divided by zero.  Each element is infinite or NaN by its own sign, which no row expresses; the step is
#: supported as long as it does not use the result.
UNBOUNDED = LinearExpr(((ONE, math.nan),))


class AffineProxy(Tensor):
    """A tensor without memory that holds a `LinearExpr`; shape and dtype are those of the real tensor."""

    expr: LinearExpr
    #: The expressions of a stack of tensors along one dimension.
    parts: tuple[LinearExpr, ...] | None

    @staticmethod
    def like(tensor: Tensor, expr: LinearExpr, parts: tuple[LinearExpr, ...] | None = None) -> AffineProxy:
        """A proxy with the shape and dtype of a tensor."""
        return AffineProxy.of(tensor.shape, tensor.dtype, expr, parts)

    @staticmethod
    def of(
        shape: Sequence[int], dtype: torch.dtype, expr: LinearExpr, parts: tuple[LinearExpr, ...] | None = None
    ) -> AffineProxy:
        """A proxy of this shape and dtype."""
        with torch._C.DisableTorchFunctionSubclass():
            empty = torch.empty(shape, dtype=dtype, device="meta")
            proxy: AffineProxy = torch.Tensor._make_subclass(AffineProxy, empty)
        proxy.expr, proxy.parts = expr, parts
        return proxy

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"AffineProxy({self.expr.terms})"

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise UnsupportedStep("copies or pickles its tensors")

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", str(func))
        if name == "__get__":
            attribute = getattr(getattr(func, "__self__", None), "__name__", "")
            if attribute == "device":
                return torch.device("cpu")  # the device of the step's scalars
            if attribute in ("T", "mT", "H", "mH", "real", "imag", "grad", "data"):
                raise UnsupportedStep(f"takes .{attribute} of a tensor")
            return _shape_of(func, args, kwargs)
        if name.endswith("_") and not name.startswith("__"):
            name = f"i{name}"  # add_ is iadd
        rule = RULES.get(name.strip("_"))
        if rule is None:
            raise UnsupportedStep(f"calls {name}")
        return rule(func, args, kwargs)


def coefficient_of(value: Any) -> Factor:
    """Return the coefficient that a number, or a tensor with one value in all its elements, stands for."""
    if isinstance(value, AffineProxy):
        raise UnsupportedStep("multiplies or divides tensors by each other")
    if type(value) is NumberProxy:
        return Coefficient(value.tape, value.index)
    if isinstance(value, ScalarTensor):
        index = uniform_index(value)
        if index is None:
            raise UnsupportedStep("scales each sample or element by a number of its own")
        return Coefficient(value.tape, index)
    if isinstance(value, Tensor):
        flat = value.detach().reshape(-1)
        if flat.numel() == 0 or (flat.numel() > 1 and not bool((flat == flat[0]).all())):
            raise UnsupportedStep("scales each sample or element by a number of its own")
        return float(flat[0])
    return float(value)


#: Attribute of a tensor of scalars kept in float64: the dtype that it was cast to.  It only affects result dtypes, and
#: there only for tensors with dimensions.
INTENDED_DTYPE = "_intended_dtype"


def _meta(value: Any) -> Any:
    """Return an argument that has the same effect on the result's shape and dtype, without data."""
    if isinstance(value, (list, tuple)):
        return type(value)(_meta(item) for item in value)
    if isinstance(value, ScalarTensor):
        with torch._C.DisableTorchFunctionSubclass():
            return value.to("meta") if value.dim() > 0 else value
    if isinstance(value, Tensor) and value.dim() > 0 and not isinstance(value, AffineProxy):
        # Scalars have been widened to float64, which must not widen the result.
        own = torch.float32 if value.dtype == torch.float64 else value.dtype
        return value.to("meta", getattr(value, INTENDED_DTYPE, own))
    return example_value(value)


def _shape_of(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Run a function on the shapes and dtypes of its arguments alone."""
    with torch._C.DisableTorchFunctionSubclass():
        return func(*_meta(list(args)), **{k: _meta(v) for k, v in kwargs.items() if k != "device"})


def _binary(a: Any, b: Any, expr: LinearExpr) -> AffineProxy:
    """Return the result of an operator of two arguments, by torch's broadcasting and type promotion.

    Running the operator on meta tensors would take 300 µs.
    """
    with torch._C.DisableTorchFunctionSubclass():
        a, b = _meta(a), _meta(b)
        # A scalar and a tensor is the usual case; torch.broadcast_shapes takes 30 µs.
        shapes = {value.shape for value in (a, b) if isinstance(value, Tensor) and value.dim() > 0} or {torch.Size()}
        shape = shapes.pop() if len(shapes) == 1 else torch.broadcast_shapes(*shapes)  # type: ignore[no-untyped-call]
        return AffineProxy.of(shape, torch.result_type(a, b), expr)


def _expr(value: Any) -> LinearExpr:
    if isinstance(value, AffineProxy):
        if value.parts is not None:
            raise UnsupportedStep("calculates with stacked tensors other than by einsum")
        return value.expr
    constant = coefficient_of(value)
    return LinearExpr(((ONE, constant),)) if constant != 0.0 else LinearExpr()


Rule = Callable[[Any, Sequence[Any], dict[str, Any]], Any]


def _sum_rule(sign_a: float, sign_b: float) -> Rule:
    def rule(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> AffineProxy:
        alpha = coefficient_of(kwargs.get("alpha", 1))
        a, b = args
        return _binary(a, b, _expr(a).scaled(sign_a).plus(_expr(b), sign_b * alpha))

    return rule


def _product(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> AffineProxy:
    a, b = args
    if isinstance(a, AffineProxy) and isinstance(b, AffineProxy):
        return _binary(a, b, _product_of_tensors(_expr(a), _expr(b)))
    proxy, factor = (a, b) if isinstance(a, AffineProxy) else (b, a)
    return _binary(a, b, _expr(proxy).scaled(coefficient_of(factor)))


def _product_of_tensors(a: LinearExpr, b: LinearExpr) -> LinearExpr:
    """Multiply noise by its learned deviation, or an expression by a mask; refuse any other product."""
    for x, y in ((a, b), (b, a)):
        if len(x.terms) == 1 and isinstance(x.terms[0][0], LearnedStd) and len(y.terms) == 1:
            (std, c), (noise, k) = x.terms[0], y.terms[0]
            assert isinstance(std, LearnedStd)
            if isinstance(noise, str) and noise.startswith("noise"):
                return LinearExpr(((ScaledNoise(std, noise), c * k),))
        rest = tuple((leaf, c) for leaf, c in x if leaf != ONE)
        if len(rest) == 1 and rest[0][0] == "mask":
            # (c + k·mask)·y
            constant, k = dict(x.terms).get(ONE, 0.0), rest[0][1]
            return y.scaled(constant).plus(LinearExpr(((Masked("mask", y), k),)))
    raise UnsupportedStep("multiplies two tensors by each other")


def _quotient(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> AffineProxy:
    a, b = args
    if isinstance(b, AffineProxy):
        raise UnsupportedStep("divides by a tensor")
    divisor = coefficient_of(b)
    if type(divisor) is not Coefficient and divisor == 0.0:
        return _binary(a, b, UNBOUNDED)  # as tensors divide: no exception
    return _binary(a, b, _expr(a).scaled(1.0 / divisor))


def _to(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> AffineProxy:
    """Cast; the device is ignored."""
    wanted = [value for value in (*args[1:], *kwargs.values()) if isinstance(value, torch.dtype)]
    others = [value.dtype for value in args[1:] if isinstance(value, Tensor)]
    proxy, dtype = args[0], (wanted + others + [args[0].dtype])[0]
    return proxy if dtype == proxy.dtype else AffineProxy.of(proxy.shape, dtype, proxy.expr, proxy.parts)


def _clamp(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> AffineProxy:
    given = dict(zip(("self", "min", "max"), args, strict=False)) | kwargs
    low, high = given.get("min"), given.get("max")
    if low is None or high is None or coefficient_of(low) != -coefficient_of(high):
        raise UnsupportedStep("clamps a tensor to bounds that are not ± one number")
    return _binary(args[0], high, LinearExpr.of(Clamped(_expr(args[0]), coefficient_of(high))))


def _std_rule(function: str) -> Rule:
    def rule(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> AffineProxy:
        exponent = coefficient_of(args[1]) if len(args) > 1 else 0.5
        if exponent == 1.0:
            return AffineProxy.like(_shape_of(func, args, kwargs), args[0].expr, args[0].parts)
        if exponent != 0.5:
            raise UnsupportedStep(f"raises a tensor to the power {exponent}")
        return AffineProxy.like(args[0], LinearExpr.of(LearnedStd(_expr(args[0]), function)))

    return rule


def _in_place(rule: Rule) -> Rule:
    """Give the same proxy another expression; every holder of it sees the new one."""

    def changed(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        if not isinstance(args[0], AffineProxy):
            raise UnsupportedStep("writes to a tensor of scalars")
        name = func.__name__.strip("_")
        plain = getattr(Tensor, name if hasattr(Tensor, name) else name.removeprefix("i"))
        args[0].expr = rule(plain, args, kwargs).expr
        return args[0]

    return changed


def _stack(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> AffineProxy:
    first, parts = args[0][0], tuple(_expr(value) for value in args[0])
    alike = [isinstance(v, AffineProxy) and v.shape == first.shape and v.dtype == first.dtype for v in args[0]]
    if not all(alike):
        return AffineProxy.like(_shape_of(func, args, kwargs), LinearExpr(), parts)
    dim = {"dim": 0, **dict(zip(("tensors", "dim"), args, strict=False)), **kwargs}["dim"]
    shape = list(first.shape)
    shape.insert(dim % (len(shape) + 1), len(parts))
    return AffineProxy.of(shape, first.dtype, LinearExpr(), parts)


def _einsum(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> AffineProxy:
    """Σ_k w_k·D_k, the one contraction that schedulers have."""
    equation, weights, stacked = args[0], *args[1:]
    if not (isinstance(stacked, AffineProxy) and stacked.parts is not None and equation.startswith("k,bkc")):
        raise UnsupportedStep(f"calls einsum({equation!r})")
    total = LinearExpr()
    for weight, part in zip(weights, stacked.parts, strict=True):
        total = total.plus(part, coefficient_of(weight))
    return AffineProxy.of((stacked.shape[0], *stacked.shape[2:]), stacked.dtype, total)


def _split(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[AffineProxy, ...]:
    """Split a model output of twice the channels into its two halves."""
    halves = _shape_of(func, args, kwargs)
    proxy = args[0]
    if len(halves) != 2 or proxy.expr.single_leaf != "model_output" or halves[0].shape[1] * 2 != proxy.shape[1]:
        raise UnsupportedStep("splits a tensor other than a model's output in two halves of its channels")
    return tuple(map(AffineProxy.like, halves, map(LinearExpr.of, ("model_output", "variance"))))


def _first_half(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> AffineProxy:
    """Slice the first half off a model output of twice the channels."""
    proxy, index = args
    channels = index[1] if isinstance(index, tuple) and len(index) == 2 and index[0] == slice(None) else None
    if not isinstance(channels, slice) or proxy.expr.single_leaf != "model_output":
        raise UnsupportedStep("takes part of a tensor")
    like = _shape_of(func, args, kwargs)
    if channels.start not in (None, 0) or like.shape[1] * 2 != proxy.shape[1]:
        raise UnsupportedStep("takes other channels of the model's output than the first half")
    return AffineProxy.like(like, proxy.expr)


def _lerp(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> AffineProxy:
    start, end, weight = args
    w = coefficient_of(weight)
    return AffineProxy.like(_shape_of(func, args, kwargs), _expr(start).scaled(1.0 - w).plus(_expr(end), w))


_ADD, _SUB = _sum_rule(1, 1), _sum_rule(1, -1)
RULES: dict[str, Rule] = {
    **dict.fromkeys(("add", "radd"), _ADD),
    **dict.fromkeys(("sub", "subtract"), _SUB),
    "rsub": _sum_rule(-1, 1),
    **dict.fromkeys(("mul", "rmul", "multiply"), _product),
    **dict.fromkeys(("div", "truediv", "true_divide", "divide"), _quotient),
    **dict.fromkeys(("neg", "negative"), lambda f, a, k: AffineProxy.like(a[0], _expr(a[0]).scaled(-1.0))),
    "iadd": _in_place(_ADD),
    "isub": _in_place(_SUB),
    "imul": _in_place(_product),
    **dict.fromkeys(("itruediv", "idiv"), _in_place(_quotient)),
    **dict.fromkeys(("clamp", "clip"), _clamp),
    **dict.fromkeys(("pow", "sqrt"), _std_rule("sqrt")),
    "exp": _std_rule("exp"),
    **dict.fromkeys(("to", "type_as", "type"), _to),
    "float": lambda f, a, k: _to(f, (a[0], torch.float32), {}),
    "double": lambda f, a, k: _to(f, (a[0], torch.float64), {}),
    "half": lambda f, a, k: _to(f, (a[0], torch.float16), {}),
    "bfloat16": lambda f, a, k: _to(f, (a[0], torch.bfloat16), {}),
    **dict.fromkeys(("detach", "contiguous", "cpu", "cuda"), lambda f, a, k: a[0]),
    "clone": lambda f, a, k: AffineProxy.like(a[0], a[0].expr, a[0].parts),
    "stack": _stack,
    "einsum": _einsum,
    **dict.fromkeys(("split", "chunk"), _split),
    "getitem": _first_half,
    "zeros_like": lambda f, a, k: AffineProxy.like(_shape_of(f, a, k), LinearExpr()),
    "lerp": _lerp,
    **dict.fromkeys(("size", "dim", "numel", "is_floating_point", "ndimension", "element_size"), _shape_of),
}  # fmt: skip
