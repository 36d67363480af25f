# SPDX-License-Identifier: MIT
"""Memory bandwidth of a GPU: copies of as many bytes as a step must move, by Triton and torch; the fastest counts."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..copy_bandwidth import copies_for
from .clock import Unit
from .machine import l2_bytes

#: Elements and warps per program of the Triton copy: 2 and 4 accesses of 16 bytes per thread.
TRITON_SHAPES = ((1024, 4), (2048, 4), (4096, 8))
#: Sizes of the copies measured on their own: bytes read plus bytes written.
SIZES = tuple(1 << bits for bits in (18, 20, 22, 24, 26, 28, 30))
#: Repetitions of a warm copy in a unit.
_CALLS = 20


def why_missing() -> str:
    """Return why the Triton copy is missing; empty if it is available."""
    from fastdiff.ops import backends

    return backends.why_missing("triton")


def copy_units(moved: float, cache: str, device: str) -> dict[str, Unit]:
    """Return a unit for each kind of copy; each copy reads and writes `moved` bytes in total."""
    words = max(4, round(moved / 2) // 4)
    cache_bytes = l2_bytes() if device == "cuda" else 1 << 10
    copies = copies_for(cache, 8 * words, cache_bytes)
    pairs = [
        tuple(torch.ones(words, dtype=torch.int32, device=device) for _ in range(2))
        for _ in range(copies)
    ]  # fmt: skip
    calls = pairs * max(1, (_CALLS if device == "cuda" else 2) // copies)
    found = {"copy, torch": Unit(_nothing, functools.partial(_all, calls, _by_torch), len(calls))}
    if not why_missing():
        launch = importlib.import_module(".copy_kernel", __package__).copy
        for block, warps in TRITON_SHAPES if device == "cuda" else TRITON_SHAPES[:1]:
            one = functools.partial(launch, block=block, warps=warps)
            found[f"copy, Triton {block}/{warps}"] = Unit(_nothing, functools.partial(_all, calls, one), len(calls))
    return found


def _nothing() -> None:
    """Prepare nothing: a copy does not change its inputs."""


def _by_torch(src: Tensor, dst: Tensor) -> None:
    dst.copy_(src)


def _all(calls: list[Any], copy: Callable[[Tensor, Tensor], object]) -> None:
    for src, dst in calls:
        copy(src, dst)
