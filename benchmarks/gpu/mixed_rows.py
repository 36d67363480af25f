# SPDX-License-Identifier: MIT
"""Batches whose samples use rows of different solvers at different steps of their loops: one launch of fastdiff."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from fastdiff import create_sampler, ops
from fastdiff.row_layout import NUM_REGISTERS, compute_dtype

from ..cases import DTYPES, GUIDANCE, SAMPLER_SPECS
from ..traffic import tensors_moved
from .clock import Unit
from .launchers import launchers

#: The solvers of the samples, repeated over the batch.
SOLVERS = ("ddim", "dpmsolver++2m", "ddpm (philox)", "dpmsolver++3m")
_STEPS = 20


@dataclass(frozen=True)
class MixedCase:
    """A batch of `shape` in `dtype` with a row per sample."""

    shape: tuple[int, ...]
    dtype: str
    device: str

    @property
    def name(self) -> str:
        return f"mixed rows {'x'.join(map(str, self.shape))} {self.dtype}"

    def table_and_rows(self) -> tuple[Any, torch.Tensor, float]:
        """Return the joined tables, each sample's row, and the bytes that a step must move."""
        tables = [
            create_sampler("linear", num_inference_steps=_STEPS, **SAMPLER_SPECS[name].config).table for name in SOLVERS
        ]
        firsts = [sum(len(table) for table in tables[:i]) for i in range(len(tables))]
        rows, moved = [], 0
        for b in range(self.shape[0]):
            which, at = b % len(tables), 3 + b % (_STEPS - 4)
            rows.append(firsts[which] + at)
            moved += tensors_moved(tables[which], at, guided=True, noise_in_memory=False)
        sample_bytes = torch.Size(self.shape[1:]).numel() * DTYPES[self.dtype].itemsize
        joined = torch.cat([table.coefficients for table in tables]).to(self.device, compute_dtype(DTYPES[self.dtype]))
        return joined, torch.tensor(rows, device=self.device), float(moved * sample_bytes)


def units(case: MixedCase, copies: int, absent: dict[str, str], repeats: int = 8) -> tuple[dict[str, Unit], float]:
    """Return a unit per launcher, which rotates through `copies` batches, and the bytes that a step must move."""
    table, rows, moved = case.table_and_rows()
    found = {}
    for name, launcher in launchers(case.device).items():
        if launcher.missing:
            absent[name] = launcher.missing
            continue
        batches = [_arguments(case, table, rows) for _ in range(copies)]
        found[name] = launcher.wrap(Unit(*_steps(batches * repeats, launcher.backend), repeats * copies))
    return found, moved


def _arguments(case: MixedCase, table: torch.Tensor, rows: torch.Tensor) -> dict[str, Any]:
    dtype, device = DTYPES[case.dtype], case.device
    batch = case.shape[0]
    tensors = [torch.randn(case.shape, device=device).to(dtype) for _ in range(3 + NUM_REGISTERS)]
    return {
        "sample": tensors[0],
        "model_output": tensors[1],
        "table": table,
        "row_index": rows,
        "history": tensors[3:],
        "uncond": tensors[2],
        "guidance_scale": torch.full((batch,), GUIDANCE, dtype=table.dtype, device=device),
        "seeds": torch.arange(batch, device=device),
        "noise_step": rows,
        "out": torch.empty_like(tensors[0]),
    }


def _steps(batches: list[dict[str, Any]], backend: str | None) -> tuple[Any, Any]:
    def run() -> None:
        for arguments in batches:
            ops.step_rows(**arguments, backend=backend)

    def prepare() -> None:
        """Do nothing: the output is not an input, and the registers stay bounded."""

    return prepare, run
