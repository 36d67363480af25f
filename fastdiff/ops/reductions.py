# SPDX-License-Identifier: MIT
"""Reductions that feed the step one scalar a sample: quantile, mean, standard deviation, norm, scalar product.

They reduce all dimensions but the first, in float32 (float64 for float64).  Compiled backends add in one fixed order,
that of ``csrc/reduce_math.h``: over the elements of a sample **in memory order**, so a sum depends on the layout (a
channels_last tensor is added as it lies) but not on threads, instruction set or device.  A tensor whose samples are not
blocks of memory, one after another, is made contiguous first.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..errors import checked_float, error_message
from ..row_layout import compute_dtype
from . import backends
from . import reductions_reference as reference
from .checks import DTYPES, check_memory
from .fallback import backend_to_run
from .layout import block_strides, to_strides
from .transforms import eager_operator
from .vmap import fold_samples

_MEAN, _STD, _NORM, _DOT = range(4)
_NAMES = ("mean", "std", "norm", "dot")
_rank = functools.lru_cache(maxsize=256)(reference.rank)


def quantile(x: Tensor, q: float, absolute: bool = False, *, backend: str | None = None) -> Tensor:
    """The q-th quantile of each sample, found by selection on the bits rather than by sorting.

    It is ``torch.quantile(x.flatten(1), q, dim=1)`` (of ``x.abs()`` with `absolute`) with linear interpolation, bit for
    bit, infinities included; halves are taken as their float32 values.  A sample with a NaN gives NaN.  The sign of a
    result that is zero may differ: here −0 comes before +0, where torch takes them as they come.  Samples of more than
    2²⁴ elements, which torch refuses, are taken; their position q·(n − 1) is computed in float64.

    Args:
        x: ``[B, ...]``, float16, bfloat16, float32 or float64, any strides, at least one element a sample.
        q: which quantile, in [0, 1].
        absolute: take the magnitudes, as dynamic thresholding does (arXiv 2205.11487, section 2.3).
        backend: a name of `BACKENDS`, to force it.

    Returns:
        ``[B]``, float32 (float64 for float64).  Its gradient goes to the two elements it lies between, as torch's.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it, what was expected and the remedy.
        RuntimeError: a forced backend is missing.
    """
    if backend is None and type(q) is float and 0.0 <= q <= 1.0:
        extension = _extension_for(x)
        if extension is not None:
            low, weight = _rank(q, x.numel() // x.shape[0], compute_dtype(x.dtype))
            stream = backends.current_stream(x)
            done: Tensor | None = extension.quantile(x, low, weight, bool(absolute), stream)
            if done is not None:
                return done
    _check("quantile", x)
    q = _checked_q(q)
    name = backend_to_run(x, backend, "quantile")
    return _apply["quantile"](x, q, bool(absolute), name)


def mean(x: Tensor, *, backend: str | None = None) -> Tensor:
    """The mean of each sample, ``[B, ...]`` to ``[B]``; NaN of samples without elements, as torch.mean.

    Arguments, dtypes and errors are those of `quantile`.
    """
    return _sum(_MEAN, x, None, 0.0, backend)


def std(x: Tensor, correction: float = 1, *, backend: str | None = None) -> Tensor:
    """The standard deviation of each sample, ``[B, ...]`` to ``[B]``, in one pass over memory.

    Blocks of 1024 elements give their mean and spread, which are put together in float64 (T. F. Chan, G. H. Golub and
    R. J. LeVeque, "Algorithms for computing the sample variance", The American Statistician 37, 1983).

    Args:
        x: as in `quantile`.
        correction: what is taken from the number of elements before dividing by it, 1 for the unbiased variance; a
            number of elements of up to `correction` gives NaN or infinity, as torch.std.
        backend: a name of `BACKENDS`, to force it.
    """
    return _sum(_STD, x, None, correction, backend)


def norm(x: Tensor, *, backend: str | None = None) -> Tensor:
    """The Euclidean norm of each sample, ``[B, ...]`` to ``[B]``; 0 of samples without elements.

    Squares are taken in float32 (float64 for float64): beyond 1.8e19 in float32 they are infinite, as torch's.
    """
    return _sum(_NORM, x, None, 0.0, backend)


def dot(x: Tensor, y: Tensor, *, backend: str | None = None) -> Tensor:
    """The scalar product of each pair of samples, ``[B, ...]`` twice to ``[B]``; 0 of samples without elements.

    `y` is like `x` in shape, dtype and device; where its strides differ it is copied to those of `x`.
    """
    return _sum(_DOT, x, y, 0.0, backend)


def _extension_for(x: object) -> ModuleType | None:
    """The extension, where it may look at x at once; a dispatch mode has to see an operator."""
    extension = backends.direct_extension()
    if extension is None or torch._C._len_torch_dispatch_stack() > 0:
        return None
    return extension if isinstance(x, Tensor) and x.dim() > 0 and x.numel() > 0 else None


def _sum(kind: int, x: Tensor, y: Any, correction: Any, backend: str | None) -> Tensor:
    if (
        backend is None
        and (extension := _extension_for(x)) is not None
        and type(correction) in (int, float)
        and -1e308 < correction < 1e308
        and (y is None or isinstance(y, Tensor))
        and (y is None) == (kind != _DOT)
    ):
        done: Tensor | None = extension.sum(kind, x, y, correction, backends.current_stream(x))
        if done is not None:
            return done
    operation = _NAMES[kind]
    _check(operation, x)
    name = backend_to_run(x, backend, operation)
    arguments: list[Any] = [x]
    if kind == _DOT:
        _check_like(y, x)
        arguments.append(y)
    if kind == _STD:
        arguments.append(checked_float(operation, "correction", correction, -float("inf")))
    return _apply[operation](*arguments, name)


# --- Checks ----------------------------------------------------------------------------------------------------------


def _check(operation: str, x: object) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(error_message(operation, "x", f"is a {type(x).__name__}", "a torch.Tensor", "pass a tensor"))
    if x.dtype not in DTYPES:
        expected = "float16, bfloat16, float32 or float64"
        raise TypeError(error_message(operation, "x", f"has dtype {x.dtype}", expected, "convert it first"))
    if x.dim() == 0:
        remedy = "add a dimension of samples with x[None]"
        raise ValueError(error_message(operation, "x", "has no dimension", "[B, ...], a batch of samples", remedy))
    check_memory("x", x, operation)
    if operation == "quantile" and x.shape[0] > 0 and x[0].numel() == 0:
        got = f"has shape {list(x.shape)}"
        raise ValueError(error_message(operation, "x", got, "an element or more a sample", "leave out what is empty"))


def _check_like(y: object, x: Tensor) -> None:
    if not isinstance(y, Tensor):
        raise TypeError(error_message("dot", "y", f"is a {type(y).__name__}", "a torch.Tensor", "pass a tensor"))
    for name, got, wanted in (
        ("shape", list(y.shape), list(x.shape)),
        ("dtype", y.dtype, x.dtype),
        ("device", y.device, x.device),
    ):
        if got != wanted:
            kind = TypeError if name == "dtype" else ValueError
            raise kind(error_message("dot", "y", f"has {name} {got}", f"{wanted} like x", "make the two alike"))
    check_memory("y", y, "dot")


def _checked_q(q: float) -> float:
    number = checked_float("quantile", "q", q, 0.0)
    if number > 1.0:
        raise ValueError(error_message("quantile", "q", f"is {number!r}", "0 to 1", "pass a share, not a percentage"))
    return number


# --- How a call is run -----------------------------------------------------------------------------------------------


def _run_quantile(x: Tensor, q: float, absolute: bool, backend: str) -> Tensor:
    _check("quantile", x)
    name = backend_to_run(x, backend or None, "quantile")
    if x.shape[0] == 0:
        return x.new_empty(0, dtype=compute_dtype(x.dtype))
    x = to_strides(x.detach(), block_strides(x))
    low, weight = _rank(_checked_q(q), x[0].numel(), compute_dtype(x.dtype))
    if name == "reference":
        return reference.quantile(x, low, weight, absolute)
    if name == "triton":
        return backends.triton_module("select").quantile(x, low, weight, absolute)  # type: ignore[no-any-return]
    return _answer(backends.extension.quantile(x, low, weight, absolute, backends.current_stream(x)))  # type: ignore[union-attr]


def _run_sum(kind: int, x: Tensor, y: Tensor | None, correction: float, backend: str) -> Tensor:
    _check(_NAMES[kind], x)
    name = backend_to_run(x, backend or None, _NAMES[kind])
    if x.numel() == 0:
        nothing = 0.0 if kind in (_NORM, _DOT) else float("nan")
        return torch.full(x.shape[:1], nothing, dtype=compute_dtype(x.dtype), device=x.device)
    x = to_strides(x.detach(), block_strides(x))
    if y is not None:
        _check_like(y, x)
        y = to_strides(y.detach(), x.stride())
    if name == "reference":
        by_kind: tuple[Callable[[], Tensor], ...] = (
            lambda: reference.mean(x),
            lambda: reference.std(x, correction),
            lambda: reference.norm(x),
            lambda: reference.dot(x, y),  # type: ignore[arg-type]
        )
        return by_kind[kind]()
    if name == "triton":
        return backends.triton_module("reduce").reduce(kind, x, y, correction)  # type: ignore[no-any-return]
    return _answer(backends.extension.sum(kind, x, y, correction, backends.current_stream(x)))  # type: ignore[union-attr]


def _answer(done: Tensor | None) -> Tensor:
    if done is None:
        raise AssertionError("the extension declined a canonical reduction")
    return done


# --- The operators of the dispatcher ---------------------------------------------------------------------------------


def _run_mean(x: Tensor, backend: str) -> Tensor:
    return _run_sum(_MEAN, x, None, 0.0, backend)


def _run_std(x: Tensor, correction: float, backend: str) -> Tensor:
    return _run_sum(_STD, x, None, correction, backend)


def _run_norm(x: Tensor, backend: str) -> Tensor:
    return _run_sum(_NORM, x, None, 0.0, backend)


def _run_dot(x: Tensor, y: Tensor, backend: str) -> Tensor:
    return _run_sum(_DOT, x, y, 0.0, backend)


def _fake(x: Tensor, *_: object) -> Tensor:
    return x.new_empty((x.shape[0],), dtype=compute_dtype(x.dtype))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    tensors = [value for value in inputs if isinstance(value, Tensor)]
    ctx.numbers = [value for value in inputs if not isinstance(value, Tensor)]
    ctx.save_for_backward(*tensors, output)


def _wide(x: Tensor) -> Tensor:
    return x.to(compute_dtype(x.dtype))


def _per_sample(scalars: Tensor, x: Tensor) -> Tensor:
    return scalars.reshape(-1, *[1] * (x.dim() - 1))


def _quantile_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, _ = ctx.saved_tensors
    q, absolute, _backend = ctx.numbers
    flat = _wide(x).reshape(x.shape[0], -1)
    count = math.prod(x.shape[1:])
    # `reference.rank` in tensors, for a number of elements that may be a symbol.
    position = torch.full((), q, dtype=flat.dtype if count <= 2**24 else torch.float64, device=x.device) * (count - 1)
    low, high = position.floor().long(), position.ceil().long()
    weight = (position - low).to(flat.dtype)
    # A sort after all: the order of equal elements decides which one the gradient goes to, and torch's is this one.
    ordered, places = (flat.abs() if absolute else flat).sort(dim=1)
    poisoned, last = ordered[:, -1].isnan(), torch.full_like(places[:, 0], count - 1)
    result = torch.zeros_like(flat)
    for rank, share, of_nan in ((low, 1.0 - weight, 1.0), (high, weight, 0.0)):
        at = places.gather(1, torch.where(poisoned, last, rank)[:, None])
        result = result.scatter_add(1, at, (grad * torch.where(poisoned, of_nan, share))[:, None])
    if absolute:
        result = result * flat.sign()
    return result.reshape(x.shape).to(x.dtype), None, None, None


def _mean_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, _ = ctx.saved_tensors
    return (_per_sample(grad / math.prod(x.shape[1:]), x).expand(x.shape).to(x.dtype), None)


def _std_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, result = ctx.saved_tensors
    wide = _wide(x)
    around = wide.reshape(x.shape[0], -1).mean(dim=1)
    scale = grad / (result * max(math.prod(x.shape[1:]) - ctx.numbers[0], 0.0))
    # A sample without spread has no gradient, as in torch.
    scale = scale.masked_fill(result == 0, 0.0)
    return ((_per_sample(scale, x) * (wide - _per_sample(around, x))).to(x.dtype), None, None)


def _norm_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, result = ctx.saved_tensors
    scale = (grad / result).masked_fill(result == 0, 0.0)
    return ((_per_sample(scale, x) * _wide(x)).to(x.dtype), None)


def _dot_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, y, _ = ctx.saved_tensors
    scale = _per_sample(grad, x)
    return ((scale * _wide(y)).to(x.dtype), (scale * _wide(x)).to(y.dtype), None)


def _register(
    name: str, names: Sequence[str], run: Callable[..., Tensor], backward: Callable[..., Any]
) -> Callable[..., Tensor]:
    """Register ``fastdiff::name``, and return a function that runs it as autograd, torch.func and compilers need."""

    def fold(info: Any, in_dims: tuple[int | None, ...], *values: Any) -> tuple[Tensor, int]:
        size = info.batch_size
        folded = [
            fold_samples(value, dim, size) if isinstance(value, Tensor) else value
            for value, dim in zip(values, in_dims, strict=True)
        ]
        return apply(*folded).reshape(size, len(folded[0]) // max(size, 1)), 0

    def operator(*values: Any) -> Any:
        return getattr(torch.ops.fastdiff, name)(*values)

    op = torch.library.custom_op(f"fastdiff::{name}", run, mutates_args=())
    op.register_fake(_fake)
    op.register_autograd(backward, setup_context=_save)
    torch.library.register_vmap(op, fold)
    apply = eager_operator(name, names, operator, run, _save, backward, fold)
    return apply


_apply = {
    name: _register(name, names, run, backward)
    for name, names, run, backward in (
        ("quantile", ("x",), _run_quantile, _quantile_backward),
        ("mean", ("x",), _run_mean, _mean_backward),
        ("std", ("x",), _run_std, _std_backward),
        ("norm", ("x",), _run_norm, _norm_backward),
        ("dot", ("x", "y"), _run_dot, _dot_backward),
    )
}
