# SPDX-License-Identifier: MIT
"""Tensors that stand for a step's inputs: arithmetic on them gives formulas instead of numbers.

A scheduler's own `step`, called with symbols in place of the sample, the model's output and the history, returns
symbols whose formulas are the step.  A formula is a sum of terms, coefficient times leaf.  A leaf is an input, by name,
or one of four things that a fused step can do beside adding up: a clamp, dynamic thresholding, noise with a learned
standard deviation, and a mask.  Anything else raises `NotAffine`, and says what it was.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .scalars import Coefficient, Factor, Number, Scalar, bare, element, finite, scalar_of
from .tape import Tape

#: The leaf of a constant term.
ONE = "1"


class NotAffine(Exception):  # noqa: N818, no error of the caller's: it says how a step is computed
    """A step does something to its tensors that a fused step cannot; the message says what."""


@dataclass(frozen=True)
class Clamped:
    """A formula held to ±bound; a bound of None: to its own dynamic threshold, and divided by that."""

    inner: Terms
    bound: Factor | None


@dataclass(frozen=True)
class LearnedStd:
    """exp or the square root of a formula, which is a standard deviation where it multiplies noise."""

    inner: Terms
    function: str


@dataclass(frozen=True)
class ScaledNoise:
    """Noise times a learned standard deviation."""

    std: LearnedStd
    noise: str


@dataclass(frozen=True)
class Masked:
    """A formula times a tensor that says element by element how much of it counts."""

    mask: str
    inner: Terms


Leaf = str | Clamped | LearnedStd | ScaledNoise | Masked


@dataclass(frozen=True)
class Terms:
    """A sum: coefficients by leaf, none of them 0."""

    items: tuple[tuple[Leaf, Factor], ...] = ()

    @staticmethod
    def of(leaf: Leaf) -> Terms:
        return Terms(((leaf, 1.0),))

    def __iter__(self) -> Any:
        return iter(self.items)

    def leaves(self) -> set[Leaf]:
        return {leaf for leaf, _ in self.items}

    def scaled(self, factor: Factor) -> Terms:
        if not finite(factor):
            return UNBOUNDED
        return Terms(tuple((leaf, k) for leaf, k in ((leaf, c * factor) for leaf, c in self.items) if k != 0.0))

    def plus(self, other: Terms, factor: Factor = 1.0) -> Terms:
        total = dict(self.items)
        for leaf, c in other.items:
            total[leaf] = total.get(leaf, 0.0) + factor * c
        return Terms(tuple((leaf, c) for leaf, c in total.items() if c != 0.0))

    @property
    def only_leaf(self) -> Leaf | None:
        """The leaf that this is, and nothing else."""
        return self.items[0][0] if len(self.items) == 1 and self.items[0][1] == 1.0 else None


#: Of something divided by zero: elements are infinite or NaN by their own signs, which no row says.  Nothing comes of
#: it where the step does not use it.
UNBOUNDED = Terms(((ONE, math.nan),))


class Symbol(Tensor):
    """A tensor without memory that knows its formula; shape and dtype are those that numbers would have."""

    terms: Terms
    #: Of a stack of formulas along one dimension: which they are.
    parts: tuple[Terms, ...] | None

    @staticmethod
    def make(like: Tensor, terms: Terms, parts: tuple[Terms, ...] | None = None) -> Symbol:
        """A symbol with the shape and dtype of `like`."""
        return Symbol.of(like.shape, like.dtype, terms, parts)

    @staticmethod
    def of(shape: Sequence[int], dtype: torch.dtype, terms: Terms, parts: tuple[Terms, ...] | None = None) -> Symbol:
        """A symbol of this shape and dtype."""
        with torch._C.DisableTorchFunctionSubclass():
            empty = torch.empty(shape, dtype=dtype, device="meta")
            symbol: Symbol = torch.Tensor._make_subclass(Symbol, empty)
        symbol.terms, symbol.parts = terms, parts
        return symbol

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"Symbol({self.terms.items})"

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise NotAffine("copies or pickles its tensors")

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", str(func))
        if name == "__get__":
            attribute = getattr(getattr(func, "__self__", None), "__name__", "")
            if attribute == "device":
                return torch.device("cpu")  # where the scalars of the step are
            if attribute in ("T", "mT", "H", "mH", "real", "imag", "grad", "data"):
                raise NotAffine(f"takes .{attribute} of a tensor")
            return _shape_of(func, args, kwargs)
        if name.endswith("_") and not name.startswith("__"):
            name = f"i{name}"  # add_ is iadd
        rule = RULES.get(name.strip("_"))
        if rule is None:
            raise NotAffine(f"calls {name}")
        return rule(func, args, kwargs)


def number(value: Any) -> Factor:
    """A coefficient: a number, or a tensor all of whose elements are one number."""
    if isinstance(value, Symbol):
        raise NotAffine("multiplies or divides tensors by each other")
    if type(value) is Number:
        return Coefficient(value.tape, value.index)
    if isinstance(value, Scalar):
        index = element(value)
        if index is None:
            raise NotAffine("scales each sample or element by a number of its own")
        return Coefficient(value.tape, index)
    if isinstance(value, Tensor):
        flat = value.detach().reshape(-1)
        if flat.numel() == 0 or (flat.numel() > 1 and not bool((flat == flat[0]).all())):
            raise NotAffine("scales each sample or element by a number of its own")
        return float(flat[0])
    return float(value)


def _bare(value: Any) -> Any:
    """An argument as its shape and dtype count."""
    if isinstance(value, (list, tuple)):
        return type(value)(_bare(item) for item in value)
    if isinstance(value, Scalar):
        with torch._C.DisableTorchFunctionSubclass():
            return value.to("meta") if value.dim() > 0 else value
    if isinstance(value, Tensor) and value.dim() > 0 and not isinstance(value, Symbol):
        # Scalars have been widened to float64, and must not widen the result.
        own = torch.float32 if value.dtype == torch.float64 else value.dtype
        return value.to("meta", getattr(value, _MEANT, own))
    return bare(value)


def _shape_of(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """What a function would give by its arguments' shapes and dtypes alone."""
    with torch._C.DisableTorchFunctionSubclass():
        return func(*_bare(list(args)), **{k: _bare(v) for k, v in kwargs.items() if k != "device"})


def _result(func: Any, args: Sequence[Any], kwargs: dict[str, Any], terms: Terms) -> Symbol:
    return Symbol.make(_shape_of(func, args, kwargs), terms)


def _combined(a: Any, b: Any, terms: Terms) -> Symbol:
    """What an operator of two arguments gives: torch's own rules, without the third of a millisecond that an operator
    takes to find them out for a tensor without memory."""
    with torch._C.DisableTorchFunctionSubclass():
        a, b = _bare(a), _bare(b)
        # A scalar and a tensor is the usual case; torch's own function for all takes 30 µs.
        shapes = {value.shape for value in (a, b) if isinstance(value, Tensor) and value.dim() > 0} or {torch.Size()}
        shape = shapes.pop() if len(shapes) == 1 else torch.broadcast_shapes(*shapes)  # type: ignore[no-untyped-call]
        return Symbol.of(shape, torch.result_type(a, b), terms)


def _terms(value: Any) -> Terms:
    if isinstance(value, Symbol):
        if value.parts is not None:
            raise NotAffine("calculates with stacked tensors other than by einsum")
        return value.terms
    constant = number(value)
    return Terms(((ONE, constant),)) if constant != 0.0 else Terms()


#: The attribute of a tensor of scalars that says which dtype it would have, had it not stayed in float64.  Of tensors
#: without dimensions no dtype counts.
_MEANT = "_meant_dtype"

Rule = Callable[[Any, Sequence[Any], dict[str, Any]], Any]


def _sum_rule(sign_a: float, sign_b: float) -> Rule:
    def rule(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Symbol:
        alpha = number(kwargs.get("alpha", 1))
        a, b = args
        return _combined(a, b, _terms(a).scaled(sign_a).plus(_terms(b), sign_b * alpha))

    return rule


def _product(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Symbol:
    a, b = args
    if isinstance(a, Symbol) and isinstance(b, Symbol):
        return _combined(a, b, _product_of(_terms(a), _terms(b)))
    symbol, factor = (a, b) if isinstance(a, Symbol) else (b, a)
    return _combined(a, b, _terms(symbol).scaled(number(factor)))


def _product_of(a: Terms, b: Terms) -> Terms:
    """Of the products of two tensors, those that a step may have: noise by its deviation, and a masked formula."""
    for x, y in ((a, b), (b, a)):
        if len(x.items) == 1 and isinstance(x.items[0][0], LearnedStd) and len(y.items) == 1:
            (std, c), (noise, k) = x.items[0], y.items[0]
            assert isinstance(std, LearnedStd)
            if isinstance(noise, str) and noise.startswith("noise"):
                return Terms(((ScaledNoise(std, noise), c * k),))
        rest = Terms(tuple((leaf, c) for leaf, c in x.items if leaf != ONE))
        if len(rest.items) == 1 and rest.items[0][0] == "mask":
            # (c + k·mask)·y
            constant, k = dict(x.items).get(ONE, 0.0), rest.items[0][1]
            return y.scaled(constant).plus(Terms(((Masked("mask", y), k),)))
    raise NotAffine("multiplies two tensors by each other")


def _quotient(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Symbol:
    a, b = args
    if isinstance(b, Symbol):
        raise NotAffine("divides by a tensor")
    divisor = number(b)
    if type(divisor) is not Coefficient and divisor == 0.0:
        return _combined(a, b, UNBOUNDED)  # as tensors divide: no exception
    return _combined(a, b, _terms(a).scaled(1.0 / divisor))


def _same(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Symbol:
    """Another dtype, or another name for the same numbers."""
    symbol = args[0]
    like = _shape_of(func, args, kwargs)
    if like.shape != symbol.shape:
        raise NotAffine("reshapes its tensors")
    return Symbol.make(like, symbol.terms, symbol.parts)


def _to(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Symbol:
    """`to` and its like: only the dtype means anything here."""
    wanted = [value for value in (*args[1:], *kwargs.values()) if isinstance(value, torch.dtype)]
    others = [value.dtype for value in args[1:] if isinstance(value, Tensor)]
    dtype = (wanted + others + [args[0].dtype])[0]
    if dtype == args[0].dtype:
        return args[0]  # type: ignore[no-any-return]
    with torch._C.DisableTorchFunctionSubclass():
        like = torch.empty(args[0].shape, dtype=dtype, device="meta")
    return Symbol.make(like, args[0].terms, args[0].parts)


def _clamp(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Symbol:
    given = dict(zip(("self", "min", "max"), args, strict=False)) | kwargs
    low, high = given.get("min"), given.get("max")
    if low is None or high is None or number(low) != -number(high):
        raise NotAffine("clamps a tensor to bounds that are not ± one number")
    return _combined(args[0], high, Terms.of(Clamped(_terms(args[0]), number(high))))


def _std_rule(function: str) -> Rule:
    def rule(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Symbol:
        if function == "sqrt" and len(args) > 1 and number(args[1]) != 0.5:
            if number(args[1]) == 1.0:
                return _same(func, args, kwargs)
            raise NotAffine(f"raises a tensor to the power {number(args[1])}")
        return Symbol.make(args[0], Terms.of(LearnedStd(_terms(args[0]), function)))

    return rule


def _in_place(rule: Rule) -> Rule:
    """The same object with another formula; whoever holds it sees the new one."""

    def changed(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        if not isinstance(args[0], Symbol):
            raise NotAffine("writes to a tensor of scalars")
        name = func.__name__.strip("_")
        plain = getattr(Tensor, name if hasattr(Tensor, name) else name.removeprefix("i"))
        args[0].terms = rule(plain, args, kwargs).terms
        return args[0]

    return changed


def _stack(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Symbol:
    first, parts = args[0][0], tuple(_terms(value) for value in args[0])
    alike = [isinstance(v, Symbol) and v.shape == first.shape and v.dtype == first.dtype for v in args[0]]
    if not all(alike):
        return Symbol.make(_shape_of(func, args, kwargs), Terms(), parts)
    dim = {"dim": 0, **dict(zip(("tensors", "dim"), args, strict=False)), **kwargs}["dim"]
    shape = list(first.shape)
    shape.insert(dim % (len(shape) + 1), len(parts))
    return Symbol.of(shape, first.dtype, Terms(), parts)


def _einsum(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Symbol:
    """Σ_k w_k·D_k, the one contraction that schedulers have."""
    equation, weights, stacked = args[0], *args[1:]
    if not (isinstance(stacked, Symbol) and stacked.parts is not None and equation.startswith("k,bkc")):
        raise NotAffine(f"calls einsum({equation!r})")
    total = Terms()
    for weight, part in zip(weights, stacked.parts, strict=True):
        total = total.plus(part, number(weight))
    with torch._C.DisableTorchFunctionSubclass():
        like = torch.empty((stacked.shape[0], *stacked.shape[2:]), dtype=stacked.dtype, device="meta")
    return Symbol.make(like, total)


def _split(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[Symbol, ...]:
    """The two halves of a model's output of twice the channels."""
    halves = _shape_of(func, args, kwargs)
    symbol = args[0]
    if len(halves) != 2 or symbol.terms.only_leaf != "model_output" or halves[0].shape[1] * 2 != symbol.shape[1]:
        raise NotAffine("splits a tensor other than a model's output in two halves of its channels")
    return Symbol.make(halves[0], Terms.of("model_output")), Symbol.make(halves[1], Terms.of("variance"))


def _half(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Symbol:
    """The first half of a model's output of twice the channels, by a slice."""
    symbol, index = args
    first = index[1] if isinstance(index, tuple) and len(index) == 2 and index[0] == slice(None) else None
    if not isinstance(first, slice) or symbol.terms.only_leaf != "model_output":
        raise NotAffine("takes part of a tensor")
    like = _shape_of(func, args, kwargs)
    if first.start not in (None, 0) or like.shape[1] * 2 != symbol.shape[1]:
        raise NotAffine("takes other channels of the model's output than the first half")
    return Symbol.make(like, symbol.terms)


def _empty(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Symbol:
    return _result(func, args, kwargs, Terms())


def _lerp(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Symbol:
    start, end, weight = args
    w = number(weight)
    return _result(func, args, kwargs, _terms(start).scaled(1.0 - w).plus(_terms(end), w))


def _known(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    return _shape_of(func, args, kwargs)


_ADD, _SUB, _REVERSED = _sum_rule(1, 1), _sum_rule(1, -1), _sum_rule(-1, 1)
RULES: dict[str, Rule] = {
    **dict.fromkeys(("add", "radd"), _ADD),
    **dict.fromkeys(("sub", "subtract"), _SUB),
    "rsub": _REVERSED,
    **dict.fromkeys(("mul", "rmul", "multiply"), _product),
    **dict.fromkeys(("div", "truediv", "true_divide", "divide"), _quotient),
    **dict.fromkeys(("neg", "negative"), lambda f, a, k: Symbol.make(a[0], _terms(a[0]).scaled(-1.0))),
    "iadd": _in_place(_ADD),
    "isub": _in_place(_SUB),
    "imul": _in_place(_product),
    **dict.fromkeys(("itruediv", "idiv"), _in_place(_quotient)),
    **dict.fromkeys(("clamp", "clip"), _clamp),
    **dict.fromkeys(("pow", "sqrt"), _std_rule("sqrt")),
    "exp": _std_rule("exp"),
    **dict.fromkeys(("to", "type_as", "type", "float", "double", "half", "bfloat16"), _to),
    **dict.fromkeys(("detach", "contiguous", "cpu", "cuda"), lambda f, a, k: a[0]),
    "clone": lambda f, a, k: Symbol.make(a[0], a[0].terms, a[0].parts),
    "stack": _stack,
    "einsum": _einsum,
    **dict.fromkeys(("split", "chunk"), _split),
    "getitem": _half,
    "zeros_like": _empty,
    "lerp": _lerp,
    **dict.fromkeys(("size", "dim", "numel", "is_floating_point", "ndimension", "element_size"), _known),
}  # fmt: skip
for _name, _dtype in (("float", torch.float32), ("double", torch.float64), ("half", torch.float16)):
    RULES[_name] = lambda f, a, k, dtype=_dtype: _to(f, (a[0], dtype), {})  # type: ignore[misc]


def unknown(symbol: Any, leaf: Any) -> Any:
    """Take no note of a symbol."""
    return symbol


class Tracing(TorchFunctionMode):
    """What holds while a scheduler's step runs on symbols: noise is drawn as a symbol, scalars are not rounded.

    Args:
        tape: where scalars are recorded; None where they are plain tensors.

    Attributes:
        draws: the dtype of each draw of noise, in order.
    """

    def __init__(self, tape: Tape | None = None) -> None:
        super().__init__()
        self.tape = tape
        self.draws: list[torch.dtype] = []
        #: Is told of each symbol that stands for a tensor of the call, and of its name.
        self.known: Callable[[Any, Any], Any] = unknown

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in ("tensor", "as_tensor") and self.tape is not None and type(args[0]) is Number:
            made: Any = scalar_of(self.tape, args[0])
            return made.to(kwargs["dtype"]) if "dtype" in kwargs else made
        if name in ("randn", "randn_like"):
            like = func(*args, **{**kwargs, "device": "meta", "generator": None} if name == "randn" else kwargs)
            return self.noise(like)
        if name in ("rand", "normal", "randint", "bernoulli", "multinomial"):
            raise NotAffine(f"draws from torch.{name}")
        scalars = args and isinstance(args[0], Tensor) and not isinstance(args[0], (Symbol, Scalar))
        if name == "to" and scalars and args[0].is_floating_point():
            # Scalars of the step stay in float64, and on the host.
            wanted = [value for value in (*args[1:], *kwargs.values()) if isinstance(value, torch.dtype)]
            if not wanted or wanted[0].is_floating_point:
                if not wanted or args[0].dim() == 0:
                    return args[0]
                meant = args[0].detach()
                setattr(meant, _MEANT, wanted[0])
                return meant
        return func(*args, **kwargs)

    def noise(self, like: Tensor) -> Symbol:
        leaf = f"noise:{len(self.draws)}"
        self.draws.append(like.dtype)
        symbol: Symbol = self.known(Symbol.make(like, Terms.of(leaf)), leaf)
        return symbol
