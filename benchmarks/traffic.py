# SPDX-License-Identifier: MIT
"""Memory traffic of a step: every tensor that its row uses is read once, every output is written once."""

from __future__ import annotations

from typing import Any

try:
    from fastdiff.row_layout import COLUMNS, KEEP_0, KEEP_1, PREDICTION_OUTPUT, PREDICTION_SAMPLE, PREV_SAMPLE
except ImportError:  # with --base, a commit from before the layout had a module of its own
    from fastdiff.affine import COLUMNS
    from fastdiff.table import KEEP_0, KEEP_1, PREDICTION_OUTPUT, PREDICTION_SAMPLE, PREV_SAMPLE

_SAMPLE, _OUTPUT, _PREDICTION = (COLUMNS.index(name) for name in ("sample", "model_output", "prediction"))


def tensors_moved(table: Any, index: int, *, guided: bool, noise_in_memory: bool = True) -> int:
    """Return the number of sample-sized tensors that row `index` of a StepTable must read and write.

    Args:
        table: a `StepTable`.
        index: the row.
        guided: the model output is combined with an unconditional one, which is read too.
        noise_in_memory: True if noise is a tensor, False if the kernel draws it.
    """
    row = table.source[index]
    maps = [affine.coefficients for affine in (row.prev_sample, *row.kept)]
    # d = p·x + q·m reads x if p is nonzero and m if q is; the pass that computes a threshold of d is not counted.
    prediction = any(weights[_PREDICTION] for weights in maps)
    sample = any(weights[_SAMPLE] for weights in maps) or (prediction and row.prediction[0] != 0)
    output = any(weights[_OUTPUT] for weights in maps) or (prediction and row.prediction[1] != 0)
    draws = table.draws_noise[index]
    read = int(sample) + (1 + guided) * int(output) + len(table.read_slots[index])
    read += int(draws and noise_in_memory) + int(draws and table.variance != 0)
    return read + 1 + len(table.kept_slots[index])


def bytes_a_step(table: Any, tensor_bytes: int, *, guided: bool, noise_in_memory: bool = True) -> float:
    """Return the bytes that a step of this table must move, the mean of its rows, for tensors of `tensor_bytes`."""
    moved = [tensors_moved(table, i, guided=guided, noise_in_memory=noise_in_memory) for i in range(len(table))]
    return sum(moved) / len(moved) * tensor_bytes


def tensors_of_plan(plan: Any, *, guided: bool) -> int | None:
    """Return the number of sample-sized tensors that a drop-in's plan reads and writes; None if it is not one pass."""
    if not plan.native_eligible:
        return None
    row = plan.row
    firsts = (PREV_SAMPLE, KEEP_0, KEEP_1)[: plan.kept + 1]
    used = [any(row[first + column] != 0 for first in firsts) for column in range(len(COLUMNS))]
    prediction = used[_PREDICTION]
    used[_SAMPLE] |= prediction and bool(row[PREDICTION_SAMPLE] != 0)
    used[_OUTPUT] |= prediction and bool(row[PREDICTION_OUTPUT] != 0)
    used[_PREDICTION] = False
    if plan.fused_draw is not None:
        used[COLUMNS.index("noise")] = False
    return sum(used) + (guided and used[_OUTPUT]) + 1 + plan.kept
