# SPDX-License-Identifier: MIT
"""Peer "torch.compile": the reference's formula compiled, specialized as far as a table allows.

One graph is compiled for each set of nonzero terms among the table's rows: the terms of each output are constant, and
the weights are a tensor, so that rows with equal terms share a graph. Outputs are written in place, like fastdiff's;
otherwise inductor would allocate them. The reference itself cannot be compiled to one graph: it branches on weights.
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
from .peers import RepeatingLoop

_SAMPLE, _OUTPUT, _PREDICTION, _HISTORY, _NOISE = 0, 1, 2, 3, 7


class CompiledRow(NamedTuple):
    """One row: its graph, its scalars, the history slots that it reads and writes, and whether it draws noise."""

    step: Callable[..., None]
    scalars: Tensor
    reads: tuple[int, ...]
    slots: tuple[int, ...]
    draws_noise: bool


#: Columns of the terms that each output sums; a history column counts its position among the slots that are read.
Terms = tuple[tuple[int, ...], ...]


def formula(terms: Terms) -> Callable[..., None]:
    """Return the in-place step for rows with these terms; its scalars are p, q, clip, then the weights per output."""

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
        values: dict[int, Any] = {_SAMPLE: x, _OUTPUT: m}
        if any(_PREDICTION in columns for columns in terms):
            values[_PREDICTION] = torch.clamp(scalars[0] * x + scalars[1] * m, -scalars[2], scalars[2])
        values.update({_HISTORY + j: tensor.to(dtype) for j, tensor in enumerate(history)})
        if noise is not None:
            values[_NOISE] = noise.to(dtype)
        at = 3
        results = []
        for columns in terms:
            total = scalars[at] * values[columns[0]]
            for k, column in enumerate(columns[1:], at + 1):
                total = total + scalars[k] * values[column]
            at += len(columns)
            results.append(total.to(sample.dtype))
        for target, result in zip((sample, *kept), results, strict=True):
            target.copy_(result)

    # A separate code object: Dynamo caches by code object, and all functions would share one list of guards.
    step.__code__ = step.__code__.replace()
    return step


@functools.lru_cache(maxsize=2)  # the cold run of a case follows its warm run
def compiled_rows(case: Case, threads: int) -> list[CompiledRow]:
    """Return the table's rows with their graphs; a graph depends on the number of threads."""
    compiled: dict[Terms, Callable[..., None]] = {}
    dtype = compute_dtype(case.torch_dtype)
    rows = []
    for i, row in enumerate(case.table):
        reads = case.table.read_slots[i]
        position = {_HISTORY + slot: _HISTORY + j for j, slot in enumerate(reads)}
        maps = [affine.coefficients for affine in (row.prev_sample, *row.kept)]
        used = [[column for column in range(len(COLUMNS)) if weights[column]] for weights in maps]
        terms = tuple(tuple(position.get(column, column) for column in columns) for columns in used)
        weights = [weights[column] for weights, columns in zip(maps, used, strict=True) for column in columns]
        scalars = torch.tensor([*row.prediction, row.clip, *weights], dtype=dtype, device=case.device)
        if terms not in compiled:
            compiled[terms] = torch.compile(formula(terms), fullgraph=True, dynamic=False)
        rows.append(CompiledRow(compiled[terms], scalars, reads, case.table.kept_slots[i], case.table.draws_noise[i]))
    return rows


def repeating_loops(case: Case, sets: Sequence[Tensors]) -> list[RepeatingLoop]:
    """Return a compiled loop per set of tensors.

    Raises:
        RuntimeError: torch cannot compile here, usually because there is no C++ compiler.
    """
    rows = compiled_rows(case, torch.get_num_threads())
    loops = [RepeatingLoop(_loop(rows, tensors)) for tensors in sets]
    try:
        for _ in range(len(rows)):
            loops[0].advance()
    except Exception as error:  # inductor raises many types
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise RuntimeError(f"unavailable ({reason})") from error
    return loops


def _loop(rows: list[CompiledRow], tensors: Tensors) -> Callable[[], object]:
    start, cond, uncond = tensors
    sample = torch.empty_like(start)
    slots = {j: torch.zeros_like(start) for row in rows for j in row.slots}
    generator = torch.Generator(start.device).manual_seed(0)
    # Look up the tensors that each row reads and writes once, not at each step.
    row_tensors = [(tuple(slots[j] for j in row.reads), tuple(slots[j] for j in row.slots)) for row in rows]
    position = len(rows)

    def advance() -> None:
        nonlocal position
        if position == len(rows):
            sample.copy_(start)
            position = 0
        row = rows[position]
        history, kept = row_tensors[position]
        noise = draw(start.shape, generator, dtype=start.dtype, device=start.device) if row.draws_noise else None
        row.step(sample, cond, uncond, row.scalars, history, noise, kept)
        position += 1

    return advance
