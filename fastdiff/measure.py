# SPDX-License-Identifier: MIT
"""Where a sampling loop's time and memory go."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Stopwatch:
    """Adds up the time of named parts of a loop.

    On the CPU it reads the clock; on a GPU it records events and reads them once at the end, so that timing adds no
    sync to the loop.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._seconds: dict[str, float] = {}
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count the block's time under `name`."""
        if self._cuda:
            start = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            start.record()
            yield
            end.record()
            self._events.append((name, start, end))
            return
        started = time.perf_counter()
        yield
        self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - started

    def seconds(self) -> dict[str, float]:
        """The sums in seconds, waiting for the device if need be."""
        if self._events:
            torch.cuda.synchronize()
        totals = dict(self._seconds)
        for name, start, end in self._events:
            totals[name] = totals.get(name, 0.0) + start.elapsed_time(end) / 1e3
        return totals


def peak_memory(device: torch.device) -> int:
    """Bytes: on CUDA the most that torch has held on the device, elsewhere the most that the process has held."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    try:
        import resource
    except ImportError:  # Windows counts otherwise
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
