# SPDX-License-Identifier: MIT
"""A solver's row with the weights of guidance in it: the guided output is never written to memory.

A row reads the model's output m in its prediction and in its maps.  Where m is a weighted sum of tensors, the row can
name these instead: two of them as m = κ·(b + g·(a − b)), which the step combines by itself, others in history slots
that the row does not read.  The sample's weight is added to the sample's own coefficients.
"""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..device_copy import to_device
from ..row_layout import (
    CLIP,
    COLUMNS,
    KEEP_0,
    KEEP_1,
    NUM_REGISTERS,
    PREDICTION_OUTPUT,
    PREDICTION_SAMPLE,
    PREV_SAMPLE,
    ROW_WIDTH,
    STORE_0,
    blank_row,
    compute_dtype,
)
from .scalars import Scalar

_SAMPLE, _OUTPUT, _PREDICTION, _HISTORY = (
    COLUMNS.index(name) for name in ("sample", "model_output", "prediction", "history_0")
)
_MAPS = (PREV_SAMPLE, KEEP_0, KEEP_1)
#: The columns that multiply the model's output.
OUTPUT_COLUMNS = (PREDICTION_OUTPUT, *(first + _OUTPUT for first in _MAPS))
#: A sum of weights below this share of the weights is replaced by it: its error is far below rounding.
_TINY = 1e-20
#: The most tensors that one pass combines: two by their pair, four in history slots.
MOST_BRANCHES = 2 + NUM_REGISTERS

#: The row of a pass that only combines: the previous sample is m.
COMBINING_ROW = tuple(1.0 if i == PREV_SAMPLE + _OUTPUT else value for i, value in enumerate(blank_row()))


@dataclass(frozen=True)
class Placement:
    """The tensors of a step with guidance.

    Attributes:
        paired: the second branch is the step's `uncond`; else it is in a history slot as the ones after it.
        slots: the history slot of each branch after the first, or after the pair.
        terms: the history slot of each extra term of the previous sample.
        kept: the number of the row's own kept outputs, before the one that guidance keeps.
    """

    paired: bool
    slots: tuple[int, ...]
    terms: tuple[int, ...] = ()
    kept: int = 0


def uses_bounded_x0(row: Sequence[float], thresholding: bool) -> bool:
    """Return whether a row uses an x0 that is clipped or thresholded."""
    bounded = thresholding or row[CLIP] != float("inf")
    return bounded and any(row[first + _PREDICTION] != 0.0 for first in _MAPS)


def place_branches(
    reads: Sequence[int], kept: int, branches: int, *, keeps: bool, terms: int, bounded: bool
) -> Placement | None:
    """Return the placement with which the row's step is the only pass; None where another pass has to combine first.

    Args:
        reads: the history slots that the solver's row reads.
        kept: the number of its kept outputs.
        branches: the number of tensors with a weight in m.
        keeps: guidance keeps a weighted sum of them.
        terms: the number of tensors that are added to the previous sample.
        bounded: the row uses an x0 that is clipped or thresholded.
    """
    paired = branches > 1 and not keeps
    others = branches - 1 - paired
    free = [slot for slot in range(NUM_REGISTERS) if slot not in reads]
    if others + terms > len(free) or kept + keeps > 2 or (others > 0 and bounded):
        return None
    return Placement(paired, tuple(free[:others]), tuple(free[others : others + terms]), kept)


def combining_placement(branches: int, *, keeps: bool) -> Placement:
    """Return the placement of a pass that only combines."""
    paired = branches > 1 and not keeps
    return Placement(paired, tuple(range(branches - 1 - paired)))


def scaled_pair(first: Scalar, second: Scalar) -> tuple[Scalar, Scalar]:
    """Return (κ, g) with first·a + second·b = κ·(b + g·(a − b)).

    The error is that of rounding first·(a − b) and second·b, also where the two weights nearly cancel.
    """
    total = first + second
    if isinstance(total, Tensor):
        size = abs(first) + abs(second)
        total = torch.where(total.abs() < _TINY * size, _TINY * size, total)
        return total, torch.where(total == 0.0, 1.0, first / total)
    size = abs(first) + abs(second)
    if abs(total - 1.0) <= 1e-15 * size:
        return 1.0, first
    if abs(total) < _TINY * size:
        total = _TINY * size
    return total, first / total if total != 0.0 else 1.0


def guided_row(
    row: Sequence[float], placement: Placement, weights: Sequence[Scalar], kept: Sequence[Scalar] | None,
    terms: Sequence[Scalar] = (),
) -> tuple[list[Scalar], Scalar]:  # fmt: skip
    """Return a row for the branches in place of the model's output, and the guidance scale that goes with it.

    Args:
        row: the solver's row, or `COMBINING_ROW`.
        placement: where the branches are.
        weights: of the branches in m and, last, of the sample.
        kept: the weights of what guidance keeps, likewise.
        terms: the weights of the extra terms in the previous sample.
    """
    found: list[Scalar] = list(row)
    scale: Scalar = 1.0
    for j in range(placement.kept):
        found[STORE_0 + j] = float(j)
    if placement.paired and len(weights) == 3 and kept is None and not terms and _is_zero(weights[2]):
        factor, scale = scaled_pair(weights[0], weights[1])
        if not _is_one(factor):
            for column in OUTPUT_COLUMNS:
                if row[column] != 0.0:
                    found[column] = row[column] * factor
        return found, scale
    of_branches, of_sample = weights[:-1], weights[-1]
    if placement.paired:
        first, scale = scaled_pair(of_branches[0], of_branches[1])
        others = of_branches[2:]
    else:
        first, others = of_branches[0], of_branches[1:]
    p, q = row[PREDICTION_SAMPLE], row[PREDICTION_OUTPUT]
    for start in _MAPS:
        output = row[start + _OUTPUT]
        if others and row[start + _PREDICTION] != 0.0:  # x0 is not bounded here: it is p·x + q·m
            output += row[start + _PREDICTION] * q
            found[start + _SAMPLE] = found[start + _SAMPLE] + row[start + _PREDICTION] * p
            found[start + _PREDICTION] = 0.0
        if output == 0.0:
            continue
        found[start + _SAMPLE] = found[start + _SAMPLE] + output * of_sample
        found[start + _OUTPUT] = output * first
        for slot, weight in zip(placement.slots, others, strict=True):
            found[start + _HISTORY + slot] = output * weight
    if q != 0.0:
        found[PREDICTION_SAMPLE] = p + q * of_sample
        found[PREDICTION_OUTPUT] = q * first
    for slot, weight in zip(placement.terms, terms, strict=True):
        found[PREV_SAMPLE + _HISTORY + slot] = weight
    if kept is not None:
        start = _MAPS[1 + placement.kept]
        found[STORE_0 + placement.kept] = float(placement.kept)
        found[start + _OUTPUT], found[start + _SAMPLE] = kept[0], kept[-1]
        for slot, weight in zip(placement.slots, kept[1:-1], strict=True):
            found[start + _HISTORY + slot] = weight
    return found, scale


def _is_zero(weight: Scalar) -> bool:
    return isinstance(weight, float) and weight == 0.0


def _is_one(weight: Scalar) -> bool:
    return isinstance(weight, float) and weight == 1.0


def table_of(rows: Sequence[Sequence[Scalar]], batch: int, like: Tensor) -> Tensor:
    """Return rows as a table in the compute dtype of `like`, on its device.

    Args:
        rows: of numbers, one or one a sample; or one row with scalars ``[B]`` in it.
        batch: B.
        like: the samples.

    Returns:
        ``[1, 32]`` or ``[B, 32]``.
    """
    dtype, device = compute_dtype(like.dtype), like.device
    varying = [column for column, value in enumerate(rows[0]) if type(value) is not float]
    if varying:
        fixed = [0.0 if column in varying else value for column, value in enumerate(rows[0])]
        table = to_device(torch.tensor([fixed], dtype=dtype), device).repeat(batch, 1)
        # One column at a time: an index list would be copied to the device.
        for column in varying:
            table[:, column] = rows[0][column]
        return table
    if device.type != "cpu":
        return to_device(torch.tensor(rows, dtype=dtype), device)
    # A third of the time of torch.tensor, which is as long as a small step.
    numbers = array("d" if dtype is torch.float64 else "f", itertools.chain.from_iterable(rows))
    return torch.frombuffer(numbers, dtype=dtype).view(-1, ROW_WIDTH)
