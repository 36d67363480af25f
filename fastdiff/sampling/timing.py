# SPDX-License-Identifier: MIT
"""The time and the peak memory of a sampling loop."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class Stopwatch:
    """Adds up the time of named parts of a loop.

    On the CPU it reads the clock.  On a GPU it records events on the current stream and reads them when it is asked for
    the sums, so that timing adds no sync to the loop, and none after it where nobody asks.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seconds: dict[str, float] = {}
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count the block's time under `name`; parts may contain one another."""
        if self._device.type == "cuda":
            start = self._now()
            yield
            self._events.append((name, start, self._now()))
            return
        started = time.perf_counter()
        yield
        self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - started

    def _now(self) -> torch.cuda.Event:
        """An event for this place on the device's current stream."""
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return event

    def seconds(self) -> dict[str, float]:
        """The sums in seconds; on a GPU the first call waits for the device to have finished the parts."""
        while self._events:
            name, start, end = self._events[-1]
            end.synchronize()
            self._seconds[name] = self._seconds.get(name, 0.0) + start.elapsed_time(end) / 1e3
            self._events.pop()
        return dict(self._seconds)

    def __getstate__(self) -> dict[str, Any]:
        """A copy, or a pickle, has the times themselves: events belong to this process."""
        return {"_device": self._device, "_seconds": self.seconds(), "_events": []}


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
