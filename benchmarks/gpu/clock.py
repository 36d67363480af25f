# SPDX-License-Identifier: MIT
"""How a unit of steps is timed: on a GPU by events and without waiting, on the CPU by the clock."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import torch

#: Cycles a second that a GPU's clock does not exceed by much: a sleep of so many is at least about that long.
_CYCLES = 2e9


class Unit(NamedTuple):
    """Some steps that are timed together.

    Attributes:
        prepare: puts everything back to where the steps begin; not timed.
        run: takes the steps.
        steps: how many.
    """

    prepare: Callable[[], object]
    run: Callable[[], object]
    steps: int


class HostClock:
    """The host's clock for both times; the rehearsal's, and no figure of a GPU."""

    device = "cpu"

    def host(self, unit: Unit) -> float:
        """Microseconds of the host for each step."""
        unit.prepare()
        started = time.perf_counter()
        unit.run()
        return (time.perf_counter() - started) / unit.steps * 1e6

    def elapsed(self, unit: Unit, host: float) -> float:
        """Microseconds of the device for each step."""
        return self.host(unit)

    def settle(self) -> None:
        """Wait until nothing is under way."""


class CudaClock:
    """Events around the steps, enqueued while the device sleeps, so that no launch is waited for."""

    device = "cuda"

    def host(self, unit: Unit) -> float:
        """Microseconds of the host for each step: until the last one is enqueued, not until it has run.

        A queue holds about a thousand launches; a unit must stay below that, or its host waits for the device.
        """
        unit.prepare()
        torch.cuda.synchronize()
        started = time.perf_counter()
        unit.run()
        taken = time.perf_counter() - started
        torch.cuda.synchronize()
        return taken / unit.steps * 1e6

    def elapsed(self, unit: Unit, host: float) -> float:
        """Microseconds of the device from one step's beginning to the next one's.

        The device sleeps for as long as the host needs to enqueue them all, `host` microseconds a step: what is timed
        is the device alone, gaps between kernels included. Who waits for it inside a step pays for the way there.
        """
        unit.prepare()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        seconds = min(0.05, 1.5e-6 * host * unit.steps + 1e-4)
        torch.cuda._sleep(int(seconds * _CYCLES))
        start.record()
        unit.run()
        end.record()
        torch.cuda.synchronize()
        return float(start.elapsed_time(end)) / unit.steps * 1e3

    def settle(self) -> None:
        """Wait until nothing is under way."""
        torch.cuda.synchronize()


Clock = HostClock | CudaClock


def clock_for(device: str) -> Clock:
    return CudaClock() if device == "cuda" else HostClock()
