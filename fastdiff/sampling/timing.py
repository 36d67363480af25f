# SPDX-License-Identifier: MIT
"""The time and the memory of a sampling loop."""

from __future__ import annotations

import os
import sys
import time
from types import TracebackType
from typing import Any

import torch

#: Seconds on the CPU; on a GPU the events at the start and the end of a part.
Span = float | tuple[torch.cuda.Event, torch.cuda.Event]


class Stopwatch:
    """Adds up the time of named parts of a loop.

    On the CPU it reads the clock.  On a GPU it records events on the current stream and reads them when it is asked for
    the sums, so that timing adds no sync to the loop, and none after it where nobody asks.

    Attributes:
        latest: the last span of each part.
        started: the start of the part that began last, for each name.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._on_gpu = device.type == "cuda"
        self._seconds: dict[str, float] = {}
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self._parts: dict[str, _Part] = {}
        self.latest: dict[str, Span] = {}
        self.started: dict[str, Any] = {}

    def part(self, name: str) -> _Part:
        """Return a block that counts its time under `name`; blocks of different names may contain one another."""
        found = self._parts.get(name)
        if found is None:
            found = self._parts[name] = _Part(self, name)
        return found

    def now(self) -> Any:
        """Return the time on the clock, or an event for this place on the device's current stream."""
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return event

    def add(self, name: str, start: Any, end: Any) -> None:
        """Count the time between two moments that `now` gave."""
        if self._on_gpu:
            self._events.append((name, start, end))
            self.latest[name] = start, end
        else:
            spent = end - start
            self._seconds[name] = self._seconds.get(name, 0.0) + spent
            self.latest[name] = spent

    def seconds(self) -> dict[str, float]:
        """The sums in seconds; on a GPU the first call waits for the device to have finished the parts."""
        while self._events:
            name, start, end = self._events[-1]
            self._seconds[name] = self._seconds.get(name, 0.0) + span_seconds((start, end))
            self._events.pop()
        return dict(self._seconds)

    def __getstate__(self) -> dict[str, Any]:
        """A copy, or a pickle, has the times themselves: events belong to this process."""
        kept = {"_device": self._device, "_on_gpu": self._on_gpu, "_seconds": self.seconds(), "_events": []}
        return {**kept, "_parts": {}, "latest": {}, "started": {}}


class _Part:
    """A block of a stopwatch."""

    __slots__ = ("_name", "_watch")

    def __init__(self, watch: Stopwatch, name: str) -> None:
        self._watch = watch
        self._name = name

    def __enter__(self) -> None:
        self._watch.started[self._name] = self._watch.now()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is None:
            watch = self._watch
            watch.add(self._name, watch.started[self._name], watch.now())


def span_seconds(span: Span) -> float:
    """Return a span in seconds; on a GPU, wait for its end."""
    if isinstance(span, float):
        return span
    start, end = span
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


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


def memory_in_use(device: torch.device) -> int:
    """Bytes: on CUDA what torch holds on the device now, elsewhere the resident memory of the process.

    0 where the system does not tell: the process's figure is that of Linux.  Waits for no device.
    """
    if device.type == "cuda":
        return int(torch.cuda.memory_allocated(device))
    if not sys.platform.startswith("linux"):
        return 0
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
