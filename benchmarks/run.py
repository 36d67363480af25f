# SPDX-License-Identifier: MIT
"""Measures peers in turn: each round times every peer once, so that a machine that drifts drifts for all."""

from __future__ import annotations

import datetime
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdiff import __version__, ops

from .cases import PEERS, Case


def measure(case: Case, rounds: int, seconds: float) -> dict[str, Any]:
    """Microseconds a step for each peer: medians over `rounds`, with the 20 and 80 % quantiles.

    A round repeats a short loop until it fills its share of `seconds`.
    """
    loops: dict[str, Callable[[], Tensor]] = {peer: case.loop(peer) for peer in PEERS}
    repeats = {peer: _repeats(loop, seconds / rounds) for peer, loop in loops.items()}
    samples: dict[str, list[float]] = {peer: [] for peer in PEERS}
    for _ in range(rounds):
        for peer, loop in loops.items():
            started = time.perf_counter()
            for _ in range(repeats[peer]):
                loop()
            elapsed = time.perf_counter() - started
            samples[peer].append(elapsed / repeats[peer] / case.calls * 1e6)
    result: dict[str, Any] = {"case": case.name, "sampler": case.sampler, "shape": case.shape}
    for peer, values in samples.items():
        low, *_, high = statistics.quantiles(values, n=5)
        result[peer] = {"median_us": statistics.median(values), "p20_us": low, "p80_us": high}
    for peer in PEERS[1:]:
        ratios = [other / ours for other, ours in zip(samples[peer], samples["fastdiff"], strict=True)]
        result[f"{peer}_over_fastdiff"] = statistics.median(ratios)
    return result


def _repeats(loop: Callable[[], Tensor], seconds: float) -> int:
    loop()  # warms caches, and compiles what is compiled at first use
    started = time.perf_counter()
    loop()
    return max(1, int(seconds / (time.perf_counter() - started)))


def conditions() -> dict[str, Any]:
    """What a figure is worth nothing without."""
    try:
        import diffusers

        peer = diffusers.__version__
    except ImportError:
        peer = "not installed"
    return {
        "date": datetime.date.today().isoformat(),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu_build": ops.cpu_build(),
        "backend": ops.backend_for(torch.empty(0)),
        "fastdiff": __version__,
        "torch": torch.__version__,
        "diffusers": peer,
        "python": platform.python_version(),
        "load_average": [round(load, 2) for load in os.getloadavg()],
    }


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown"
