# SPDX-License-Identifier: MIT
"""Noise and reductions outside a step, compared with torch's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import fastdiff
from fastdiff import ops

from .clock import Unit
from .launchers import launchers

SHAPES = ((1, 4, 128, 128), (64, 4, 128, 128), (1, 16, 21, 90, 160))
SMALL = ((2, 2, 4, 4),)
_CALLS = 20

_Reduction = Callable[..., Tensor]
#: torch's reductions of flattened samples.
TORCH: dict[str, _Reduction] = {
    "quantile": lambda x: torch.quantile(x.abs().flatten(1), 0.995, dim=1),
    "mean": lambda x: x.flatten(1).mean(1),
    "std": lambda x: x.flatten(1).std(1),
    "norm": lambda x: torch.linalg.vector_norm(x.flatten(1), dim=1),
    "dot": lambda x: (x * x).flatten(1).sum(1),
}
OURS: dict[str, _Reduction] = {
    "quantile": lambda x, backend: ops.quantile(x, 0.995, absolute=True, backend=backend),
    "mean": lambda x, backend: ops.mean(x, backend=backend),
    "std": lambda x, backend: ops.std(x, backend=backend),
    "norm": lambda x, backend: ops.norm(x, backend=backend),
    "dot": lambda x, backend: ops.dot(x, x, backend=backend),
}


def groups(device: str, rehearse: bool) -> list[tuple[str, tuple[int, ...], dict[str, Unit]]]:
    """Return the groups that are measured together: a name, a shape, and a unit per implementation."""
    available = {name: launcher for name, launcher in launchers(device).items() if not launcher.missing}
    calls = 1 if rehearse else _CALLS
    groups = []
    for shape in SMALL if rehearse else SHAPES:
        x = torch.randn(shape, device=device)
        seeds = torch.arange(shape[0], device=device)
        units: dict[str, Unit] = {"torch": _unit(calls, torch.randn, shape, device=device)}
        for name, launcher in available.items():
            backend = launcher.backend
            units[name] = launcher.wrap(_unit(calls, fastdiff.randn, shape, seeds, device=device, backend=backend))
        groups.append(("randn", shape, units))
        for kind, by_torch in TORCH.items():
            units = {"torch": _unit(calls, by_torch, x)}
            for name, launcher in available.items():
                units[name] = launcher.wrap(_unit(calls, OURS[kind], x, launcher.backend))
            groups.append((kind, shape, units))
    return groups


def _unit(calls: int, function: Callable[..., Any], *arguments: Any, **options: Any) -> Unit:
    def run() -> None:
        for _ in range(calls):
            function(*arguments, **options)

    return Unit(lambda: None, run, calls)
