# SPDX-License-Identifier: MIT
"""The bytes that a step must move: one read of every tensor that its row uses, one write of every output."""

from __future__ import annotations

from typing import Any

try:
    from fastdiff.row_layout import COLUMNS, KEEP_0, KEEP_1, PREDICTION_OUTPUT, PREDICTION_SAMPLE, PREV_SAMPLE
except ImportError:  # with --base, a commit from before the layout had a module of its own
    from fastdiff.affine import COLUMNS
    from fastdiff.table import KEEP_0, KEEP_1, PREDICTION_OUTPUT, PREDICTION_SAMPLE, PREV_SAMPLE

_SAMPLE, _OUTPUT, _PREDICTION = (COLUMNS.index(name) for name in ("sample", "model_output", "prediction"))


def tensors_moved(table: Any, index: int, *, guided: bool, noise_in_memory: bool = True) -> int:
    """Return the number of tensors like the sample that row `index` of a StepTable must read and write.

    Args:
        guided: the model's output is combined with an unconditional one, which is then read wherever it is.
        noise_in_memory: noise comes as a tensor; False where the kernel draws it.
    """
    row = table.source[index]
    maps = [form.coefficients for form in (row.prev_sample, *row.kept)]
    # d = p·x + q·m reads what p and q do not leave out; a threshold of d is a pass of its own, not counted here.
    prediction = any(weights[_PREDICTION] for weights in maps)
    sample = any(weights[_SAMPLE] for weights in maps) or (prediction and row.prediction[0] != 0)
    output = any(weights[_OUTPUT] for weights in maps) or (prediction and row.prediction[1] != 0)
    draws = table.draws_noise[index]
    read = int(sample) + (1 + guided) * int(output) + len(table.read_slots[index])
    read += int(draws and noise_in_memory) + int(draws and table.variance != 0)
    return read + 1 + len(table.kept_slots[index])


def bytes_a_step(table: Any, tensor_bytes: int, *, guided: bool, noise_in_memory: bool = True) -> float:
    """Bytes that a step of this table must move, the mean of its rows; `tensor_bytes` is the size of one tensor."""
    moved = [tensors_moved(table, i, guided=guided, noise_in_memory=noise_in_memory) for i in range(len(table))]
    return sum(moved) / len(moved) * tensor_bytes


def tensors_of_plan(plan: Any, *, guided: bool) -> int | None:
    """Return the number of tensors that a drop-in's planned step must read and write; None where it is not one pass."""
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
