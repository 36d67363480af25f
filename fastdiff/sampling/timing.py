# SPDX-License-Identifier: MIT
"""The time and the memory of a sampling loop."""

from __future__ import annotations

import os
import sys
import time
from types import TracebackType
from typing import Any

import torch

_clock = time.perf_counter

#: Seconds on the CPU; on a GPU the events at the start and the end of a part.
Span = float | tuple[torch.cuda.Event, torch.cuda.Event]


class Stopwatch:
    """Adds up the time of named parts of a loop.

    On the CPU it reads the clock.  On a GPU it records events on the current stream and reads them when it is asked for
    the sums, so that timing adds no sync to the loop, and none after it where nobody asks.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._on_gpu = device.type == "cuda"
        self._parts: dict[str, _ClockPart | _EventPart] = {}

    def part(self, name: str) -> _ClockPart | _EventPart:
        """Return a block that counts its time under `name`; blocks of different names may contain one another."""
        found = self._parts.get(name)
        if found is None:
            found = self._parts[name] = _EventPart(self) if self._on_gpu else _ClockPart()
        return found

    def now(self) -> Any:
        """Return the time on the clock, or an event for this place on the device's current stream."""
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return event

    def latest(self) -> dict[str, Span]:
        """Return the last span of each part."""
        return {name: part.last for name, part in self._parts.items() if part.last is not None}

    def seconds(self) -> dict[str, float]:
        """The sums in seconds; on a GPU the first call waits for the device to have finished the parts."""
        return {name: part.seconds() for name, part in self._parts.items() if part.last is not None}

    def __getstate__(self) -> dict[str, Any]:
        """A copy, or a pickle, has the times themselves: events belong to this process."""
        parts = {name: _ClockPart(seconds) for name, seconds in self.seconds().items()}
        return {"_device": self._device, "_on_gpu": self._on_gpu, "_parts": parts}


class _ClockPart:
    """A block that is timed by the clock."""

    __slots__ = ("_begun", "_total", "last")

    def __init__(self, total: float | None = None) -> None:
        self._begun = 0.0
        self._total = total or 0.0
        self.last: Span | None = total

    def __enter__(self) -> None:
        self._begun = _clock()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is None:
            self.last = spent = _clock() - self._begun
            self._total += spent

    def seconds(self) -> float:
        return self._total


class _EventPart:
    """A block that is timed by events on a GPU's stream."""

    __slots__ = ("_begun", "_spans", "_total", "_watch", "last")

    def __init__(self, watch: Stopwatch) -> None:
        self._watch = watch
        self._begun: Any = None
        self._spans: list[Span] = []
        self._total = 0.0
        self.last: Span | None = None

    def __enter__(self) -> None:
        self._begun = self._watch.now()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is None:
            self.last = self._begun, self._watch.now()
            self._spans.append(self.last)

    def seconds(self) -> float:
        while self._spans:
            self._total += span_seconds(self._spans[-1])
            self._spans.pop()
        return self._total


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
