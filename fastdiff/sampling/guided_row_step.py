# SPDX-License-Identifier: MIT
"""The pass that takes a solver's step with the branches of guidance in its row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import ops
from ..errors import error_message
from ..guidance.combining import as_tokens, or_empty, row_index
from ..guidance.rows import Placement
from ..noise.generators import draw
from ..ops.thresholding import dynamic_threshold
from ..philox import Purpose
from ..row_layout import NUM_REGISTERS
from ..solvers.table import prediction_rows
from .stepper import Stepper


class GuidedRows(NamedTuple):
    """The rows of a guided step.

    Attributes:
        table: the rows.
        row_index: the row of all samples, or of each.
        scale: the guidance scale of the pair of branches, a float or ``[B]``.
        placement: where the branches are.
        keeps: guidance keeps a weighted sum of them.
    """

    table: Tensor
    row_index: int | Tensor
    scale: float | Tensor
    placement: Placement
    keeps: bool = False


def step_with_rows(
    stepper: Stepper, sample: Tensor, tensors: Sequence[Tensor], rows: GuidedRows, given: Mapping[str, Any], *,
    moves: Sequence[Tensor] = (), token_dims: int | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Take the stepper's next step with the branches in the row, outside of autograd.

    Args:
        stepper: the state of the loop.
        sample: x.
        tensors: the branches, ``[B, ...]``.
        rows: the guided row, or one a sample.
        given: the arguments ``variance``, ``noise``, ``generator``, ``out`` and ``model_input`` of `Stepper.step`.
        moves: the tensors of the placement's extra terms.
        token_dims: the trailing dimensions of a token, where the rows are for tokens.

    Returns:
        The previous sample, and what guidance keeps or None.
    """
    index = stepper.index
    if sample is not stepper._seen:
        stepper._look_at(sample)
    reads, slots, draws = stepper._plan[index]
    noise, seeds = given["noise"], None
    if draws and noise is None:
        seeds = stepper._seeds
        if seeds is None:
            noise = draw(sample.shape, given["generator"], dtype=sample.dtype, device=sample.device)
        elif token_dims is not None:  # rows a token, seeds a sample
            noise, seeds = ops.randn(sample.shape, seeds, index, Purpose.STEP, sample.device), None
    own, placement, out = stepper._history, rows.placement, given["out"]
    history = [own[j] if j in reads else None for j in range(NUM_REGISTERS)]
    for slot, tensor in zip(placement.slots, tensors[1 + placement.paired :], strict=True):
        history[slot] = tensor
    for slot, tensor in zip(placement.terms, moves, strict=True):
        history[slot] = tensor
    keeps = len(slots) + rows.keeps
    outs: list[Tensor] | None = None
    if keeps or out is not None or isinstance(rows.row_index, Tensor):  # row indices in a tensor may skip samples
        outs = [or_empty(out, sample), *[or_empty(own[slot], sample) for slot in slots]]
        if rows.keeps:  # not in place: x0 may be asked for after the step
            outs.append(torch.empty_like(sample))
    variance = given["variance"]
    arguments: dict[str, Any] = {
        "sample": sample,
        "model_output": tensors[0],
        "uncond": tensors[1] if placement.paired else None,
        "guidance_scale": rows.scale if placement.paired else None,
        "history": history,
        "noise": noise,
        "variance": variance,
        "model_input": given["model_input"],
        "out": outs,
    }
    if token_dims is not None:
        arguments = _by_token(arguments, token_dims)
    threshold = None
    if stepper.table.thresholding:
        measured = {name: arguments[name] for name in ("sample", "model_output", "uncond", "guidance_scale")}
        table = prediction_rows(rows.table)
        (x0,) = ops.step(**measured, table=table, row_index=row_index(table), backend=stepper.backend)
        threshold = dynamic_threshold(x0, stepper._ratio, stepper._max_value)
    results = ops.step(
        **arguments,
        table=rows.table,
        row_index=rows.row_index,
        threshold=threshold,
        variance_kind=stepper._variance_kind(variance) if stepper._measures else 0,
        keeps=keeps,
        seeds=seeds,
        noise_step=index,
        backend=stepper.backend,
    )
    results = tuple(outs) if outs is not None else results
    for slot, result in zip(slots, results[1:], strict=False):
        own[slot] = result
    stepper.index = index + 1
    stepper._seen = results[0]
    return results[0], results[-1] if rows.keeps else None


def _by_token(arguments: Mapping[str, Any], token_dims: int) -> dict[str, Any]:
    """Return the arguments of a step with a sample for each token; tensors to write keep their memory."""
    found = dict(arguments)
    for name in ("sample", "model_output", "uncond", "noise"):
        found[name] = None if found[name] is None else as_tokens(found[name], token_dims)
    found["history"] = [None if t is None else as_tokens(t, token_dims) for t in found["history"]]
    found["out"] = [_viewed(tensor, token_dims) for tensor in found["out"]]
    found["model_input"] = None if found["model_input"] is None else _viewed(found["model_input"], token_dims)
    return found


def _viewed(tensor: Tensor, token_dims: int) -> Tensor:
    """Return a tensor to write as tokens, in its own memory."""
    if not tensor.is_contiguous():
        remedy = "pass contiguous tensors"
        raise ValueError(error_message("step", "sample", "is not contiguous", "row-major memory for tokens", remedy))
    return tensor.view(-1, *tensor.shape[tensor.dim() - token_dims :])
