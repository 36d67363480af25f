# SPDX-License-Identifier: MIT
"""A batch whose samples take rows of different solvers at different places in their loops: one launch, ours alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from fastdiff import create_sampler, ops
from fastdiff.row_layout import NUM_REGISTERS, compute_dtype

from ..cases import DTYPES, GUIDANCE, OPS
from ..traffic import tensors_moved
from .clock import Unit
from .launchers import launchers

#: Taken by the samples in turn.
SOLVERS = ("ddim", "dpmsolver++2m", "ddpm (philox)", "dpmsolver++3m")
_STEPS = 20


@dataclass(frozen=True)
class MixedCase:
    """A batch of `shape` in `dtype`, row by row."""

    shape: tuple[int, ...]
    dtype: str
    device: str

    @property
    def name(self) -> str:
        return f"mixed rows {'x'.join(map(str, self.shape))} {self.dtype}"

    def made(self) -> tuple[Any, torch.Tensor, float]:
        """The tables, each sample's row, and the bytes that such a step must move."""
        tables = [create_sampler("linear", num_inference_steps=_STEPS, **OPS[name].config).table for name in SOLVERS]
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
    """A unit a launcher, going round `copies` batches, and the bytes of a step."""
    table, rows, moved = case.made()
    found = {}
    for name, launcher in launchers(case.device).items():
        if launcher.missing:
            absent[name] = launcher.missing
            continue
        batches = [_arguments(case, table, rows) for _ in range(copies)]
        found[name] = launcher.hold(Unit(*_steps(batches * repeats, launcher.backend), repeats * copies))
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

    def nothing() -> None:
        """The output is not an input: nothing has to be put back; registers stay bounded by what they are made of."""

    return nothing, run
