# SPDX-License-Identifier: MIT
"""Steps under autograd on the CPU that the extension takes as they are: one linear row of all samples.

The way of every other step (autograd.py) checks and orders a call in Python, and takes any row.  For a small step that
is ten times the time of the formula in torch operators.  Here the outputs are weighted sums of the inputs, so their
gradients are weighted sums of the outputs' gradients: the extension again, with a table that is kept from call to call.
Nothing but numbers is saved.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..row_layout import (
    CLIP,
    COLUMNS,
    NUM_REGISTERS,
    PREV_SAMPLE,
    ROW_WIDTH,
    blank_row,
    compute_dtype,
)
from .autograd import apply_step, input_weights
from .backends import direct_extension, offer
from .call import HISTORY_SLOTS, StepCall

_INPUTS = ("sample", "model_output", "uncond", *HISTORY_SLOTS, "noise")
_H0 = COLUMNS.index("history_0")
#: Maps of a row.
_MAPS = 3


def record_step(call: StepCall) -> tuple[Tensor, ...] | None:
    """Take a step that autograd has to record; None, with nothing done, where it goes another way.

    Args:
        call: not checked yet.
    """
    if not torch.is_grad_enabled() or torch._C._are_functorch_transforms_active():
        return None
    if direct_extension() is None or not _fits(call):
        return None
    row = tuple(call.table[call.row_index].tolist())
    if len(row) != ROW_WIDTH or row[CLIP] < math.inf:
        return None
    with torch.no_grad():
        offered = offer(call, in_operator=False)
    if not isinstance(offered, tuple):
        return None
    history = (*call.history, *[None] * NUM_REGISTERS)[:NUM_REGISTERS]
    inputs = (call.sample, call.model_output, call.uncond, *history, call.noise)
    scale = call.guidance_scale if call.uncond is not None else None
    results = _LinearStep.apply(offered, row, scale, *inputs)  # type: ignore[no-untyped-call]
    return tuple(results)


def _fits(call: StepCall) -> bool:
    """Return True for one row, numbers as scalars, new outputs, and inputs of one dtype of which one has a graph."""
    others = (call.threshold, call.mask, call.variance, call.model_input, call.out)
    if call.write_history or len(call.history) > NUM_REGISTERS or any(value is not None for value in others):
        return False
    optional = [value for value in (call.uncond, *call.history, call.noise) if value is not None]
    table: Any = call.table
    tensors: list[Any] = [call.sample, call.model_output, *optional]
    if not all(isinstance(value, Tensor) and value.device.type == "cpu" for value in (table, *tensors)):
        return False
    if isinstance(call.guidance_scale, Tensor) or table.requires_grad or table.dim() != 2:
        return False
    if not isinstance(call.row_index, int) or not 0 <= call.row_index < len(table):
        return False
    return all(t.dtype == tensors[0].dtype for t in tensors) and any(t.requires_grad for t in tensors)


class _LinearStep(torch.autograd.Function):
    """Record the outputs that the extension has computed."""

    @staticmethod
    def forward(
        ctx: Any, outputs: tuple[Tensor, ...], row: tuple[float, ...], scale: float | None, *inputs: Tensor | None
    ) -> tuple[Tensor, ...]:
        ctx.row, ctx.scale = row, scale
        ctx.set_materialize_grads(False)
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        names = tuple(name for name, want in zip(_INPUTS, ctx.needs_input_grad[3:], strict=True) if want)
        made = tuple(o for o, grad in enumerate(grads) if grad is not None)
        found: dict[str, Tensor] = {}
        if made:
            sources = [grad for grad in grads if grad is not None]
            dtype = compute_dtype(sources[0].dtype)
            table = _pulled_back(ctx.row, ctx.scale, names, made, dtype)
            for index, first in enumerate(range(0, len(names), _MAPS)):
                group = names[first : first + _MAPS]
                found |= dict(zip(group, _weighted_sums(sources, table, index, len(group)), strict=True))
        return None, None, None, *(found.get(name) for name in _INPUTS)


def _weighted_sums(sources: Sequence[Tensor], table: Tensor, index: int, count: int) -> Sequence[Tensor]:
    """Return up to three weighted sums of tensors, whose weights are those of a row for the history."""
    call = StepCall(
        sample=sources[0],
        model_output=sources[0],
        table=table,
        row_index=index,
        history=tuple(sources),
        keeps=count - 1,
    )
    if direct_extension() is not None:
        offered = offer(call, in_operator=False)
        if isinstance(offered, tuple):
            return offered
    return apply_step(call, "")  # gradients with a graph of their own


@functools.lru_cache(maxsize=256)
def _pulled_back(
    row: tuple[float, ...], scale: float | None, names: tuple[str, ...], made: tuple[int, ...], dtype: torch.dtype
) -> Tensor:
    """Return the table whose maps are the gradients of the named inputs, three a row, from those of the outputs.

    Args:
        row: of the step.
        scale: of guidance; None without.
        names: of inputs.
        made: the outputs with a gradient, which are the history in this order.
        dtype: of the table.
    """
    weights = [input_weights(row, output, scale, dtype) for output in made]
    rows = []
    for first in range(0, len(names), _MAPS):
        new = blank_row()
        for k, name in enumerate(names[first : first + _MAPS]):
            start = PREV_SAMPLE + k * len(COLUMNS) + _H0
            new[start : start + len(made)] = [of_output[name] for of_output in weights]
        rows.append(new)
    with torch.inference_mode(False):  # autograd saves no inference tensor, and this one is kept
        return torch.tensor(rows, dtype=torch.float64, device="cpu").to(dtype)
