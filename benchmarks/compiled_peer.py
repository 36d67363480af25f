# SPDX-License-Identifier: MIT
"""The reference's formula under torch.compile, given every advantage that a table allows.

A graph is compiled for each form that rows of the table have: which terms an output sums is then constant, and only the
weights come as a tensor, so that no row compiles again. It writes in place, as fastdiff does; without that, inductor
would allocate outputs. The form of the reference itself cannot be compiled whole: it looks at its weights.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdiff.noise.generators import draw
from fastdiff.row_layout import COLUMNS, compute_dtype

from .cases import GUIDANCE, Case, Tensors
from .peers import Walk

_SAMPLE, _OUTPUT, _PREDICTION, _HISTORY, _NOISE = 0, 1, 2, 3, 7


class Plan(NamedTuple):
    """One row: its graph, its scalars, the history slots that it reads and writes, and True where it draws noise."""

    step: Callable[..., None]
    scalars: Tensor
    reads: tuple[int, ...]
    slots: tuple[int, ...]
    draws_noise: bool


#: The terms that each output sums: columns, with history counted by its place among the slots that are read.
Form = tuple[tuple[int, ...], ...]


def formula(form: Form) -> Callable[..., None]:
    """The step for rows of one form, in place; its scalars are p, q, clip and then the weights, output by output."""

    def step(
        sample: Tensor,
        cond: Tensor,
        uncond: Tensor,
        scalars: Tensor,
        history: tuple[Tensor, ...],
        noise: Tensor | None,
        kept: tuple[Tensor, ...],
    ) -> None:
        dtype = scalars.dtype
        x, c, u = sample.to(dtype), cond.to(dtype), uncond.to(dtype)
        m = u + GUIDANCE * (c - u)
        terms: dict[int, Any] = {_SAMPLE: x, _OUTPUT: m}
        if any(_PREDICTION in columns for columns in form):
            terms[_PREDICTION] = torch.clamp(scalars[0] * x + scalars[1] * m, -scalars[2], scalars[2])
        terms.update({_HISTORY + j: tensor.to(dtype) for j, tensor in enumerate(history)})
        if noise is not None:
            terms[_NOISE] = noise.to(dtype)
        at = 3
        results = []
        for columns in form:
            total = scalars[at] * terms[columns[0]]
            for k, column in enumerate(columns[1:], at + 1):
                total = total + scalars[k] * terms[column]
            at += len(columns)
            results.append(total.to(sample.dtype))
        for target, result in zip((sample, *kept), results, strict=True):
            target.copy_(result)

    # A code object of its own: what is compiled is kept by code, and the forms would share one list of guards.
    step.__code__ = step.__code__.replace()
    return step


@functools.lru_cache(maxsize=2)  # a case's cold run follows its warm one
def plans(case: Case, threads: int) -> list[Plan]:
    """The table's rows, ready to run. Graphs are made for a number of threads."""
    compiled: dict[Form, Callable[..., None]] = {}
    dtype = compute_dtype(case.torch_dtype)
    made = []
    for i, row in enumerate(case.table):
        reads = case.table.read_slots[i]
        place = {_HISTORY + slot: _HISTORY + j for j, slot in enumerate(reads)}
        maps = [form.coefficients for form in (row.prev_sample, *row.kept)]
        used = [[column for column in range(len(COLUMNS)) if weights[column]] for weights in maps]
        form = tuple(tuple(place.get(column, column) for column in columns) for columns in used)
        weights = [weights[column] for weights, columns in zip(maps, used, strict=True) for column in columns]
        scalars = torch.tensor([*row.prediction, row.clip, *weights], dtype=dtype, device=case.device)
        if form not in compiled:
            compiled[form] = torch.compile(formula(form), fullgraph=True, dynamic=False)
        made.append(Plan(compiled[form], scalars, reads, case.table.kept_slots[i], case.table.draws_noise[i]))
    return made


def walks(case: Case, sets: Sequence[Tensors]) -> list[Walk]:
    """A walk a set, compiled already.

    Raises:
        RuntimeError: torch cannot compile here, for want of a C++ compiler most likely.
    """
    rows = plans(case, torch.get_num_threads())
    made = [Walk(_walk(rows, tensors)) for tensors in sets]
    try:
        for _ in range(len(rows)):
            made[0].advance()
    except Exception as error:  # of many kinds, by what inductor lacks
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise RuntimeError(f"unavailable ({reason})") from error
    return made


def _walk(rows: list[Plan], tensors: Tensors) -> Callable[[], object]:
    start, cond, uncond = tensors
    sample = torch.empty_like(start)
    slots = {j: torch.zeros_like(start) for row in rows for j in row.slots}
    generator = torch.Generator(start.device).manual_seed(0)
    # The tensors that each row reads and writes, looked up once and not at each step.
    places = [(tuple(slots[j] for j in row.reads), tuple(slots[j] for j in row.slots)) for row in rows]
    position = len(rows)

    def advance() -> None:
        nonlocal position
        if position == len(rows):
            sample.copy_(start)
            position = 0
        row = rows[position]
        history, kept = places[position]
        noise = draw(start.shape, generator, dtype=start.dtype, device=start.device) if row.draws_noise else None
        row.step(sample, cond, uncond, row.scalars, history, noise, kept)
        position += 1

    return advance
