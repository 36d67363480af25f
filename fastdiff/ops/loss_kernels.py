# SPDX-License-Identifier: MIT
"""The loss a sample and its gradient on the backend that was chosen, and the reference in plain torch.

Both passes are a step whose sample is x0, whose model output is the model's, and whose kept output is the target.  A
call is offered to the extension as it is; what that declines is checked and made canonical.  The first half of an
output with twice the channels keeps its stride from sample to sample, and so does its gradient.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..row_layout import COLUMNS, KEEP_0
from . import backends, reductions_reference, reference
from .call import FIELDS, StepCall
from .canonicalize import canonicalize
from .checks import check
from .fallback import backend_to_run
from .layout import block_strides, output_strides, to_strides

#: By the numbers of `Loss` in csrc/diffusion_loss_math.h.
LOSSES = ("l2", "l1", "huber")
_SAMPLE, _NOISE = KEEP_0 + COLUMNS.index("sample"), KEEP_0 + COLUMNS.index("noise")


def forward(*values: Any) -> Tensor:
    """Return the mean of ρ over each sample's elements, ``[B]`` in the compute dtype; see ``fastdiff::diffusion_loss``.

    Raises:
        TypeError, ValueError, RuntimeError: as `fastdiff.ops.diffusion_loss`.
    """
    with torch.no_grad():
        fields, loss, c, backend = _fields(*values)
        found = _offer(fields, loss, c, backend, None, ())
        if found is not None:
            return found[0]
        call = StepCall(**fields)
        check(call)
        if call.sample.numel() == 0:
            return torch.full(call.sample.shape[:1], torch.nan, dtype=call.table.dtype, device=call.sample.device)
        blocks = _blocks(call)
        if backend == "reference":
            return _loss_by_reference(blocks, loss, c)
        return _run(canonicalize(replace(blocks, out=())), loss, c, backend, None, ())[0]


def backward(grad: Tensor, wanted: Sequence[bool], *values: Any) -> list[Tensor]:
    """Return the wanted gradients of output, x0 and noise; `grad` is that of the samples' losses, ``[B]``."""
    with torch.no_grad():
        fields, loss, c, backend = _fields(*values)
        output, x0, noise = values[0], values[1], values[5]
        likes = [tensor if want else None for tensor, want in zip((output, x0, noise), wanted, strict=True)]
        if x0.numel() == 0:
            return [new_gradient(like).zero_() for like in likes if like is not None]
        factor = grad.to(fields["table"].dtype) * ((2.0 if loss == "l2" else 1.0) / math.prod(x0.shape[1:]))
        # The half of an output that is a variance has a gradient of 0.
        whole = new_gradient(output).zero_() if wanted[0] and output.shape != x0.shape else None
        out = [None if like is None else like.dtype for like in likes]
        if whole is not None:
            out[0] = _half(whole, x0)
        found = _offer(fields, loss, c, backend, factor, out)
        if found is None:
            found = _checked_gradients(StepCall(**fields), loss, c, backend, factor, out)
        if whole is not None:
            if found[0] is not out[0]:
                _half(whole, x0).copy_(found[0])
            found = [whole, *found[1:]]
        given = [like for like in likes if like is not None]
        return [to_strides(value, output_strides(like)) for value, like in zip(found, given, strict=True)]


def new_gradient(tensor: Tensor) -> Tensor:
    """Return a new tensor for a gradient, in the layout of the tensor where that is dense, else contiguous."""
    return tensor.new_empty_strided(tensor.shape, output_strides(tensor))


def _half(output: Tensor, x0: Tensor) -> Tensor:
    """Return the part of a model's output, or of its gradient, that the loss reads."""
    return output if output.shape == x0.shape else output.narrow(1, 0, x0.shape[1])


def _fields(
    output: Tensor,
    x0: Tensor,
    table: Tensor,
    row_index: int,
    row_indices: Tensor | None,
    noise: Tensor | None,
    seeds: Tensor | None,
    noise_step: int,
    noise_steps: Tensor | None,
    purpose: int,
    loss: str,
    c: float,
    backend: str,
) -> tuple[dict[str, Any], str, float, str]:
    """Return the fields of the step whose kept output is the target, the loss, c and the backend's name."""
    fields = {
        "sample": x0,
        "model_output": _half(output, x0),
        "table": table,
        "row_index": row_index if row_indices is None else row_indices,
        "noise": noise,
        "seeds": seeds,
        "noise_step": noise_step if noise_steps is None else noise_steps,
        "purpose": purpose,
    }
    return fields, loss, c, backend or backend_to_run(x0, None, "diffusion_loss")


def _blocks(call: StepCall) -> StepCall:
    """Return a call whose samples are blocks of memory, whose order is that of the sum."""
    return replace(call, sample=to_strides(call.sample, block_strides(call.sample)))


def _offer(
    fields: dict[str, Any], loss: str, c: float, backend: str, factor: Tensor | None, out: Sequence[Any]
) -> list[Tensor] | None:
    """Return what the extension makes of a call; None where it declines, or another backend was chosen."""
    if backend not in ("cpu", "cuda"):
        return None
    assert backends.extension is not None
    targets = None if factor is None else tuple(out)
    done = backends.extension.diffusion_loss(LOSSES.index(loss), c, factor, **fields, out=targets, in_operator=True)
    return list(done) if isinstance(done, tuple) else None


def _run(call: StepCall, loss: str, c: float, backend: str, factor: Tensor | None, out: Sequence[Any]) -> list[Tensor]:
    """Run a canonical call on a compiled backend."""
    if backend == "triton":
        made: list[Tensor] = backends.triton_module("diffusion_loss").launch(
            call, LOSSES.index(loss), c, factor, list(out)
        )
        return made
    fields = {name: getattr(call, name) for name in FIELDS if name != "out"}
    found = _offer(fields, loss, c, backend, factor, out)
    if found is None:
        raise AssertionError(f"diffusion_loss: the extension declined a canonical call: {call}")
    return found


def _checked_gradients(
    call: StepCall, loss: str, c: float, backend: str, factor: Tensor, out: Sequence[Any]
) -> list[Tensor]:
    """Check a call and return the gradients for which `out` has a tensor or a dtype."""
    check(call)
    blocks = _blocks(call)
    if backend == "reference":
        dtypes = [to.dtype if isinstance(to, Tensor) else to for to in out]
        made = _gradient_by_reference(blocks, loss, c, factor, [to is not None for to in out])
        return [value.to(dtype) for value, dtype in zip(made, filter(None, dtypes), strict=True)]
    canonical = canonicalize(replace(blocks, out=()))
    targets = list(out)
    model, sample = canonical.model_output, canonical.sample
    if model.stride() != sample.stride() and not (isinstance(out[0], Tensor) and out[0].stride() == model.stride()):
        # A half of a larger tensor whose gradient has another layout, or none that was asked for.
        canonical = replace(canonical, model_output=to_strides(model, sample.stride()))
    if isinstance(out[0], Tensor) and out[0].stride() != canonical.model_output.stride():
        targets[0] = out[0].dtype
    return _run(canonical, loss, c, backend, factor.contiguous(), targets)


# --- The reference ---------------------------------------------------------------------------------------------------


def _residual(call: StepCall) -> tuple[Tensor, Tensor]:
    """Return output − target in the compute dtype, and the rows of the samples, ``[1, 32]`` or ``[B, 32]``."""
    compute = call.table.dtype
    _, target = reference.step(replace(call, keeps=1, out=(compute, compute)))
    index = call.row_index
    if isinstance(index, Tensor):
        rows, taken = reference.select_rows(call.table, index)
        target = torch.where(reference.per_sample(taken, target), target, torch.nan)
    else:
        rows = call.table[index][None]
    return call.model_output.to(compute) - target, rows


def _loss_by_reference(call: StepCall, loss: str, c: float) -> Tensor:
    """Return the samples' losses by plain torch: the specification of the kernels."""
    r, _ = _residual(call)
    if loss == "l2":
        each = r * r
    elif loss == "l1":
        each = r.abs()
    else:
        square = r * r
        each = square / ((square + c * c).sqrt() + c)  # √(r² + c²) − c without cancellation
    each = to_strides(each, call.sample.stride())
    return (reductions_reference.total(each) / math.prod(call.sample.shape[1:])).to(call.table.dtype)


def _gradient_by_reference(call: StepCall, loss: str, c: float, factor: Tensor, wanted: Sequence[bool]) -> list[Tensor]:
    """Return the wanted gradients of output, x0 and noise in the compute dtype."""
    r, rows = _residual(call)
    if loss == "l1":
        r = torch.where(r.isnan(), r, r.sign())
    elif loss == "huber":
        r = r / (r * r + c * c).sqrt()
    of_output = reference.per_sample(factor, r) * r
    maps = (None, -rows[:, _SAMPLE], -rows[:, _NOISE])
    return [
        of_output if weight is None else reference.per_sample(weight, r) * of_output
        for weight, want in zip(maps, wanted, strict=True)
        if want
    ]
