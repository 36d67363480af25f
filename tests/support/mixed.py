# SPDX-License-Identifier: MIT
"""Batches whose samples take rows of their own, for the tests of `ops.step_rows`; and each sample of one, alone."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor

import fastdiff
from fastdiff import ops
from fastdiff.row_layout import (
    KEEP_0,
    MODEL_INPUT_SCALE,
    NUM_REGISTERS,
    ROW_WIDTH,
    STORE_0,
    STORE_1,
    Variance,
    compute_dtype,
)
from fastdiff.solvers.table import StepTable
from support import solver_cases
from support.oracle import DTYPES

#: Every method, and one that keeps two tensors.
METHODS: tuple[tuple[str, dict[str, Any]], ...] = (
    *((method, {}) for method in solver_cases.METHODS),
    ("dpm_solver", {"solver_order": 3}),
)

#: The arguments of `ops.step_rows` by name; those that are None are left out.
Batch = dict[str, Any]


def _table(method: str, fields: dict[str, Any]) -> StepTable:
    table = fastdiff.create_sampler("linear", method, num_inference_steps=7, **fields).table
    assert table is not None
    return table


def laid_out(tensor: Tensor, channels_last: bool) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def solvers(
    seed: int, dtype: torch.dtype, inner: tuple[int, ...], batch: int = 9, channels_last: bool = False
) -> Batch:
    """Real solvers in the middle of their loops, each sample with a seed, a step and a guidance scale of its own.

    Registers hold NaN where the sample's solver has not written yet; every fifth sample stays as it is.
    """
    gen = torch.Generator().manual_seed(seed)
    rng = random.Random(seed)
    tables = [_table(method, fields) for method, fields in METHODS]
    firsts = [sum(len(t) for t in tables[:i]) for i in range(len(tables))]

    def like_sample() -> Tensor:
        return laid_out(torch.randn((batch, *inner), generator=gen, dtype=torch.float64).to(dtype), channels_last)

    registers = [torch.full_like(like_sample(), float("nan")) for _ in range(NUM_REGISTERS)]
    rows = torch.empty(batch, dtype=torch.int64)
    for i in range(batch):
        which = i % len(tables)
        step = rng.randrange(len(tables[which]))
        rows[i] = -1 - rng.randrange(3) if i % 5 == 4 else firsts[which] + step
        for register in {j for slots in tables[which].kept_slots[:step] for j in slots}:
            registers[register][i] = torch.randn(inner, generator=gen, dtype=torch.float64).to(dtype)
    used = 1 + max(j for t in tables for slots in t.kept_slots for j in slots)
    compute = compute_dtype(dtype)
    return {
        "sample": like_sample(),
        "model_output": like_sample(),
        "table": torch.cat([t.coefficients for t in tables]).to(compute),
        "row_index": rows,
        "history": registers[:used],
        "uncond": like_sample(),
        "guidance_scale": torch.rand(batch, generator=gen, dtype=torch.float64).mul(8).to(compute),
        "seeds": torch.randint(-(2**63), 2**63 - 1, (batch,), generator=gen),
        "noise_step": torch.randint(0, 2**32, (batch,), generator=gen),
        "model_input": laid_out(torch.full((2 * batch, *inner), float("nan"), dtype=dtype), channels_last),
    }


def random_batch(seed: int, dtype: torch.dtype, model_input_dtypes: tuple[torch.dtype, ...] = DTYPES) -> Batch:
    """Rows of random numbers, half of them 0, that store anywhere; any optional tensor there or not."""
    gen = torch.Generator().manual_seed(seed)
    rng = random.Random(seed)
    channels_last = rng.random() < 0.4
    batch = rng.randint(1, 4)
    inner = (rng.randint(1, 5), rng.randint(1, 6), rng.randint(1, 7)) if channels_last else (rng.randint(1, 70),)
    compute = compute_dtype(dtype)
    count = rng.randint(1, 5)

    def like_sample() -> Tensor:
        return laid_out(torch.randn((batch, *inner), generator=gen, dtype=torch.float64).to(dtype), channels_last)

    def a_sample(low: float, high: float, size: int = batch) -> Tensor:
        return (torch.rand(size, generator=gen, dtype=torch.float64) * (high - low) + low).to(compute)

    table = torch.randn(count, ROW_WIDTH, generator=gen, dtype=torch.float64)
    table = torch.where(torch.rand(table.shape, generator=gen) < 0.5, 0.0, table)
    table[:, 2] = float("inf") if rng.random() < 0.5 else 0.7
    table[:, 3:5] *= 0.5
    table[:, MODEL_INPUT_SCALE] = 1.0 if rng.random() < 0.3 else 0.37
    there = [j for j in range(NUM_REGISTERS) if rng.random() < 0.7]
    for row in table:
        slots = rng.sample([-1, -1, *there], 2)
        row[STORE_0], row[STORE_1] = slots
        for map_, slot in zip((row[KEEP_0 : KEEP_0 + 8], row[KEEP_0 + 8 :]), slots, strict=True):
            if slot < 0:
                map_.zero_()
    guided = rng.random() < 0.6
    kind = rng.choice(tuple(Variance))
    noise = rng.choice(("none", "given", "drawn", "drawn"))
    steps: int | Tensor = torch.randint(0, 2**32, (rng.choice((1, batch)),), generator=gen)
    copies = rng.randint(0, 2)
    one_row = rng.random() < 0.2
    # Where rows are negative, all such numbers mean the same.
    rows = torch.tensor([rng.randint(-2, count - 1) for _ in range(1 if one_row else batch)])
    next_dtype = rng.choice(model_input_dtypes)
    return {
        "sample": like_sample(),
        "model_output": like_sample(),
        "table": table.to(compute),
        "row_index": rows,
        "history": [like_sample() if j in there else None for j in range(NUM_REGISTERS)],
        "uncond": like_sample() if guided else None,
        "guidance_scale": a_sample(-1.0, 9.0, rng.choice((1, batch))) if guided else None,
        "noise": like_sample() if noise == "given" else None,
        "seeds": torch.randint(-(2**63), 2**63 - 1, (batch,), generator=gen) if noise == "drawn" else None,
        "noise_step": rng.choice((steps, rng.randrange(2**32))),
        "purpose": rng.randrange(2**32),
        "variance": like_sample().abs() if kind else None,
        "variance_kind": int(kind),
        "threshold": a_sample(0.5, 3.0) if rng.random() < 0.3 else None,
        "model_input": laid_out(torch.full((copies * batch, *inner), float("nan"), dtype=next_dtype), channels_last)
        if copies
        else None,
    }


def copied(batch: Batch, device: str | None = None) -> Batch:
    """Copy a batch to a device, or where it is, in memory of its own and in the same layout."""

    def copy(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.clone() if device is None else value.clone().to(device)
        return [copy(v) for v in value] if isinstance(value, list) else value

    return {name: copy(value) for name, value in batch.items()}


def run(batch: Batch, backend: str | None) -> list[Tensor]:
    """Run it on tensors of its own; prev_sample, the registers and the model input."""
    own = copied(batch)
    with torch.no_grad():
        return [ops.step_rows(**own, backend=backend), *written(own)]


def written(batch: Batch) -> list[Tensor]:
    """What a call writes besides prev_sample."""
    return [tensor for tensor in (*batch["history"], batch.get("model_input")) if tensor is not None]


def alone(batch: Batch, i: int, backend: str | None) -> list[Tensor]:
    """What `run` gives for sample i, from `ops.step` on it alone with its row as a number, and kept tensors by hand."""
    size = len(batch["sample"])

    def mine(name: str) -> Any:
        value = batch.get(name)
        return value[i : i + 1] if isinstance(value, Tensor) and value.numel() > 1 else value

    def sliced(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor[i : i + 1].clone()

    rows, target = batch["row_index"], batch.get("model_input")
    row = int(rows[i] if len(rows) > 1 else rows[0])
    registers = [sliced(h) for h in batch["history"]]
    next_input = None
    if target is not None:
        copies = len(target) // size
        next_input = torch.cat([target[i : i + 1]] * copies).clone()
    if row < 0:
        result = sliced(batch["sample"])
        assert result is not None
        if next_input is not None:
            next_input.copy_(torch.cat([result] * copies).to(next_input.dtype))
        return [tensor for tensor in (result, *registers, next_input) if tensor is not None]
    names = ("uncond", "variance", "noise", "seeds", "threshold")
    rest = {name: sliced(batch[name]) for name in names if batch.get(name) is not None}
    rest |= {name: mine(name) for name in ("guidance_scale", "noise_step") if batch.get(name) is not None}
    rest |= {name: batch[name] for name in ("purpose", "variance_kind") if name in batch}
    with torch.no_grad():
        result, *kept = ops.step(
            sliced(batch["sample"]),
            sliced(batch["model_output"]),
            batch["table"],
            row,
            history=registers,
            keeps=2,
            model_input=next_input,
            backend=backend,
            **rest,
        )
    for column, value in zip((STORE_0, STORE_1), kept, strict=True):
        slot = int(batch["table"][row, column])
        if slot >= 0:
            registers[slot] = value
    return [tensor for tensor in (result, *registers, next_input) if tensor is not None]


def of_sample(results: list[Tensor], i: int, batch: int) -> list[Tensor]:
    """Sample i's part of what `run` gives, as `alone` gives it."""
    return [
        r[i : i + 1] if len(r) == batch else torch.cat([r[i : i + 1], r[batch + i : batch + i + 1]]) for r in results
    ]
