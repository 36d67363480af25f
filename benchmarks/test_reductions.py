# SPDX-License-Identifier: MIT
"""Reductions and noise of fastdiff and torch under pytest-benchmark: ``pytest benchmarks/test_reductions.py``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fastdiff
from fastdiff import ops

SHAPES = [(1, 4, 64, 64), (1, 16, 21, 90, 160)]
REDUCTIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "quantile": (
        lambda x: ops.quantile(x, 0.995, absolute=True),
        lambda x: torch.quantile(x.abs().flatten(1), 0.995, dim=1),
    ),
    "mean": (ops.mean, lambda x: x.flatten(1).mean(1)),
    "std": (ops.std, lambda x: x.flatten(1).std(1)),
    "norm": (ops.norm, lambda x: torch.linalg.vector_norm(x.flatten(1), dim=1)),
    "dot": (lambda x: ops.dot(x, x), lambda x: (x * x).flatten(1).sum(1)),
}


@pytest.mark.parametrize("peer", ["fastdiff", "torch"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
@pytest.mark.parametrize("name", REDUCTIONS)
def test_reduction(benchmark: Any, name: str, shape: tuple[int, ...], peer: str) -> None:
    torch.set_num_threads(1)
    benchmark.group = f"{name} {shape}"
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    reduce = REDUCTIONS[name][peer == "torch"]
    rounds, iterations = (20, 5) if x.numel() < 10**6 else (3, 1)
    value = benchmark.pedantic(lambda: reduce(x), rounds=rounds, iterations=iterations, warmup_rounds=1)
    assert bool(torch.isfinite(value).all())


@pytest.mark.parametrize("peer", ["fastdiff", "torch"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_randn(benchmark: Any, shape: tuple[int, ...], peer: str) -> None:
    torch.set_num_threads(1)
    benchmark.group = f"randn {shape}"
    draw = (lambda: fastdiff.randn(shape, [1])) if peer == "fastdiff" else (lambda: torch.randn(shape))
    value = benchmark.pedantic(draw, rounds=10, iterations=3, warmup_rounds=1)
    assert bool(torch.isfinite(value).all())
