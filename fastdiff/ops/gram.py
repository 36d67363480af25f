# SPDX-License-Identifier: MIT
"""The Gram matrix of a few tensors, a sample: all their scalar products and norms from one pass over memory.

Guidance methods that project, rescale or compare branches (arXiv 2410.02416 and others) need scalar products and
norms of the same tensors.  One reduction reads each tensor once and gives all of them.  Every entry is summed in the
order of ``csrc/reduce_math.h``, so ``gram(...)[:, i, j]`` has the bits of ``dot(x_i, x_j)`` on every backend.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor

from ..errors import error_message
from ..row_layout import compute_dtype
from . import backends
from . import reductions_reference as reference
from .checks import DTYPES, check_memory
from .fallback import backend_to_run
from .layout import block_strides, to_strides
from .transforms import eager_operator
from .vmap import fold_samples

#: The fewest and the most tensors of one call; csrc/reduce_math.h has the same most.
FEWEST, MOST = 2, 6


@overload
def gram(tensors: Sequence[Tensor], *, sums: Literal[False] = False, backend: str | None = None) -> Tensor: ...


@overload
def gram(tensors: Sequence[Tensor], *, sums: Literal[True], backend: str | None = None) -> tuple[Tensor, Tensor]: ...


def gram(
    tensors: Sequence[Tensor], *, sums: bool = False, backend: str | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute the scalar products of all pairs of tensors, a sample: ``G[b, i, j] = Σ x_i[b]·x_j[b]``.

    The diagonal holds the squared norms.  With `sums` the sum of each tensor's elements comes from the same pass: the
    mean of n elements is ``s/n``, and the standard deviation is ``√((G_ii − s_i²/n)/(n − 1))`` where the mean is small
    beside the deviation (`std` is exact everywhere).

    Args:
        tensors: K = 2 to 6 tensors ``[B, ...]``, alike in shape, dtype and device; float16, bfloat16, float32 or
            float64, any strides.  They are read in the memory order of the first; one whose strides differ from the
            first's is copied to those.  A tensor may be given twice.
        sums: also return the sum of the elements of each tensor.
        backend: a name of `BACKENDS`, to force it.

    Returns:
        G, ``[B, K, K]``, symmetric, float32 (float64 for float64); with `sums` the pair (G, s) with s ``[B, K]``.  0 of
        samples without elements.  Differentiable in each tensor.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it, what was expected and the remedy.
        RuntimeError: a forced backend is missing.
    """
    extension = backends.direct_extension() if backend is None else None
    if extension is not None and torch._C._len_torch_dispatch_stack() == 0:
        done: Tensor | tuple[Tensor, Tensor] | None = extension.gram(tensors, bool(sums), True)
        if done is not None:
            return done
    given = _checked_list(tensors)
    _check(given)
    joined = _apply(bool(sums), backend_to_run(given[0], backend, "gram"), *given)
    count = len(given)
    return (joined[:, :, :count], joined[:, :, count]) if sums else joined


def host_gram(tensors: Sequence[Tensor]) -> list[list[list[float]]]:
    """Compute `gram` as Python numbers, for formulas of a few scalars; on a GPU it waits for the result.

    Args:
        tensors: as in `gram`.

    Returns:
        G as a list of K lists of K numbers a sample.

    Raises:
        TypeError, ValueError: as `gram`.
    """
    extension = backends.direct_extension()
    if extension is not None and torch._C._len_torch_dispatch_stack() == 0:
        # No tensor is made on the CPU: that takes longer than the reduction of a small call.
        found: list[list[list[float]]] | None = extension.host_gram(tensors)
        if found is not None:
            return found
    return gram(tensors).tolist()


# --- Checks ----------------------------------------------------------------------------------------------------------


def _checked_list(tensors: object) -> list[Any]:
    if not isinstance(tensors, (list, tuple)):
        remedy = "pass gram([x, y])"
        kind = type(tensors).__name__
        raise TypeError(error_message("gram", "tensors", f"is a {kind}", "a list or tuple of tensors", remedy))
    if not FEWEST <= len(tensors) <= MOST:
        expected = f"{FEWEST} to {MOST}"
        remedy = "use norm for one tensor, and combine tensors before where there are more"
        raise ValueError(error_message("gram", "tensors", f"holds {len(tensors)} tensors", expected, remedy))
    return list(tensors)


def _check(tensors: Sequence[Any]) -> None:
    first: Any = tensors[0]
    for i, tensor in enumerate(tensors):
        name = f"tensors[{i}]"
        if not isinstance(tensor, Tensor):
            got = f"is a {type(tensor).__name__}"
            raise TypeError(error_message("gram", name, got, "a torch.Tensor", "pass a tensor"))
        if tensor.dtype not in DTYPES:
            expected = "float16, bfloat16, float32 or float64"
            raise TypeError(error_message("gram", name, f"has dtype {tensor.dtype}", expected, "convert it first"))
        if tensor.dim() == 0:
            remedy = "add a dimension of samples with x[None]"
            raise ValueError(error_message("gram", name, "has no dimension", "[B, ...], a batch of samples", remedy))
        compared: tuple[tuple[str, object, object], ...] = (
            ("shape", list(tensor.shape), list(first.shape)),
            ("dtype", tensor.dtype, first.dtype),
            ("device", tensor.device, first.device),
        )
        for what, found, wanted in compared:
            if found != wanted:
                kind = TypeError if what == "dtype" else ValueError
                message = error_message(
                    "gram", name, f"has {what} {found}", f"{wanted} like tensors[0]", "make the tensors alike"
                )
                raise kind(message)
        check_memory(name, tensor, "gram")


# --- The operator of the dispatcher ----------------------------------------------------------------------------------


def _run(tensors: Sequence[Tensor], sums: bool, backend: str) -> Tensor:
    """Compute `gram` as one tensor: ``[B, K, K]``, or ``[B, K, K + 1]`` with the sums last."""
    _check(tensors)
    first, count = tensors[0], len(tensors)
    name = backend_to_run(first, backend or None, "gram")
    if first.numel() == 0:
        return torch.zeros((first.shape[0], count, count + sums), dtype=compute_dtype(first.dtype), device=first.device)
    strides = block_strides(first)
    laid_out = [to_strides(tensor.detach(), strides) for tensor in tensors]
    if name == "reference":
        return reference.gram(laid_out, sums)
    if name == "triton":
        return backends.triton_module("gram").gram(laid_out, sums)  # type: ignore[no-any-return]
    done = backends.extension.gram(laid_out, sums, False)  # type: ignore[union-attr]
    if done is None:
        raise AssertionError("the extension declined a canonical gram")
    return done  # type: ignore[no-any-return]


_gram_op = torch.library.custom_op("fastdiff::gram", _run, mutates_args=())


@_gram_op.register_fake
def _(tensors: Sequence[Tensor], sums: bool, backend: str) -> Tensor:
    first, count = tensors[0], len(tensors)
    return first.new_empty((first.shape[0], count, count + sums), dtype=compute_dtype(first.dtype))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    tensors, ctx.sums, _ = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return _gradients(ctx, grad), None, None


def _gradients(ctx: Any, grad: Tensor) -> list[Tensor]:
    """Return Σ_j (G_ij + G_ji)·x_j and, with the sums, s_i, where G and s are the gradients of the results."""
    tensors = ctx.saved_tensors
    count = len(tensors)
    products = grad[:, :, :count]
    weights = products + products.transpose(1, 2)
    per_sample = (-1, *[1] * (tensors[0].dim() - 1))
    found: list[Tensor] = []
    wide = [x.to(weights.dtype) for x in tensors]
    for i, x in enumerate(tensors):
        total = torch.zeros_like(wide[0])
        for j in range(count):
            total = total + weights[:, i, j].reshape(per_sample) * wide[j]
        if ctx.sums:
            total = total + grad[:, i, count].reshape(per_sample)
        found.append(total.to(x.dtype))
    return found


_gram_op.register_autograd(_backward, setup_context=_save)


@_gram_op.register_vmap
def _(info: Any, in_dims: tuple[Any, ...], tensors: Sequence[Tensor], sums: bool, backend: str) -> tuple[Tensor, int]:
    return _fold(info, (None, None, *in_dims[0]), sums, backend, *tensors)


# --- In eager calls --------------------------------------------------------------------------------------------------


def _operator(sums: bool, backend: str, *tensors: Tensor) -> Any:
    return torch.ops.fastdiff.gram(tensors, sums, backend)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    sums, backend, *tensors = inputs
    _save(ctx, (tensors, sums, backend), output)


def _fold(info: Any, in_dims: tuple[int | None, ...], sums: bool, backend: str, *tensors: Tensor) -> tuple[Tensor, int]:
    size = info.batch_size
    folded = [fold_samples(tensor, dim, size) for tensor, dim in zip(tensors, in_dims[2:], strict=True)]
    joined = _apply(sums, backend, *folded)
    return joined.reshape(size, len(joined) // max(size, 1), *joined.shape[1:]), 0


#: Run ``fastdiff::gram`` with a tensor an argument, as functions of autograd need them.
_apply: Callable[..., Tensor] = eager_operator(
    "gram",
    ("sums", "backend", *(f"tensors[{i}]" for i in range(MOST))),
    _operator,
    lambda sums, backend, *tensors: _run(tensors, sums, backend),
    _setup_context,
    lambda ctx, grad: (None, None, *_gradients(ctx, grad)),
    _fold,
)
