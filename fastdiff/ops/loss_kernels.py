# SPDX-License-Identifier: MIT
"""The loss a sample and its gradient on the backend that was chosen, and the reference in plain torch.

A call is canonical where x0, output and noise have one dense layout in which each sample is a block of memory; the
first half of an output with twice the channels keeps its stride from sample to sample.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..row_layout import COLUMNS, KEEP_0
from . import reductions_reference, reference
from .call import StepCall
from .checks import check
from .fallback import backend_to_run
from .layout import block_strides, to_strides

LOSSES = ("l2", "l1", "huber")
_SAMPLE, _NOISE = KEEP_0 + COLUMNS.index("sample"), KEEP_0 + COLUMNS.index("noise")


def forward(*values: Any) -> Tensor:
    """Return the mean of ρ over each sample's elements, ``[B]`` in the compute dtype; see ``fastdiff::diffusion_loss``.

    Raises:
        TypeError, ValueError, RuntimeError: as `fastdiff.ops.diffusion_loss`.
    """
    with torch.no_grad():
        call, loss, c, backend = _call(*values)
        if call.sample.numel() == 0:
            return torch.full(call.sample.shape[:1], torch.nan, dtype=call.table.dtype, device=call.sample.device)
        return _loss_by_reference(_blocks(call), loss, c)


def backward(grad: Tensor, wanted: list[bool], *values: Any) -> list[Tensor]:
    """Return the wanted gradients of output, x0 and noise; `grad` is that of the samples' losses, ``[B]``."""
    with torch.no_grad():
        call, loss, c, backend = _call(*values)
        output, x0, noise = values[0], values[1], values[5]
        found = [new_gradient(tensor) for tensor, want in zip((output, x0, noise), wanted, strict=True) if want]
        if call.sample.numel() == 0:
            return found
        factor = grad.to(call.table.dtype) * ((2.0 if loss == "l2" else 1.0) / math.prod(call.sample.shape[1:]))
        made = _gradient_by_reference(_blocks(call), loss, c, factor, wanted)
        for to, value in zip(found, made, strict=True):
            _half(to, call.sample).copy_(value)
        return found


def new_gradient(tensor: Tensor) -> Tensor:
    """Return zeros for a gradient like a tensor."""
    return torch.zeros_like(tensor)


def _half(output: Tensor, sample: Tensor) -> Tensor:
    """Return the part of a model's output, or of its gradient, that the loss reads."""
    return output if output.shape == sample.shape else output.narrow(1, 0, sample.shape[1])


def _call(
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
) -> tuple[StepCall, str, float, str]:
    """Return the step whose kept output is the target, checked, and the loss; the output is its model output."""
    call = StepCall(
        sample=x0,
        model_output=_half(output, x0),
        table=table,
        row_index=row_index if row_indices is None else row_indices,
        noise=noise,
        seeds=seeds,
        noise_step=noise_step if noise_steps is None else noise_steps,
        purpose=purpose,
        keeps=1,
    )
    check(call)
    return call, loss, c, backend or backend_to_run(x0, None, "diffusion_loss")


def _blocks(call: StepCall) -> StepCall:
    """Return a call whose samples are blocks of memory, whose order is that of the sum."""
    return replace(call, sample=to_strides(call.sample, block_strides(call.sample)))


# --- The reference ---------------------------------------------------------------------------------------------------


def _residual(call: StepCall) -> tuple[Tensor, Tensor]:
    """Return output − target in the compute dtype, and the rows of the samples, ``[1, 32]`` or ``[B, 32]``."""
    compute = call.table.dtype
    _, target = reference.step(replace(call, out=(compute, compute)))
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


def _gradient_by_reference(call: StepCall, loss: str, c: float, factor: Tensor, wanted: list[bool]) -> list[Tensor]:
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
