# SPDX-License-Identifier: MIT
"""Clocks for a unit of steps: events and host time without waiting on a GPU, the host's clock on the CPU."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import torch

#: Approximate maximum clock rate of a GPU in cycles per second, for the length of a sleep.
_CYCLES = 2e9


class Unit(NamedTuple):
    """Some steps that are timed together.

    Attributes:
        prepare: restores the state before the steps; not timed.
        run: takes the steps.
        steps: number of steps.
    """

    prepare: Callable[[], object]
    run: Callable[[], object]
    steps: int


class HostClock:
    """The host's clock for both times, used by a dry run."""

    device = "cpu"

    def host(self, unit: Unit) -> float:
        """Return microseconds per step on the host."""
        unit.prepare()
        started = time.perf_counter()
        unit.run()
        return (time.perf_counter() - started) / unit.steps * 1e6

    def elapsed(self, unit: Unit, host: float) -> float:
        """Return microseconds per step, measured on the host too."""
        return self.host(unit)

    def synchronize(self) -> None:
        """Do nothing: the host has finished its work."""


class CudaClock:
    """Events around the steps, which are enqueued while the device sleeps, so that it does not wait for launches."""

    device = "cuda"

    def host(self, unit: Unit) -> float:
        """Return microseconds per step on the host until the last step is enqueued, not until it has run.

        The launch queue has about a thousand entries; with more launches in a unit the host waits for the device.
        """
        unit.prepare()
        torch.cuda.synchronize()
        started = time.perf_counter()
        unit.run()
        taken = time.perf_counter() - started
        torch.cuda.synchronize()
        return taken / unit.steps * 1e6

    def elapsed(self, unit: Unit, host: float) -> float:
        """Return microseconds per step on the device, from the beginning of a step to that of the next.

        The device first sleeps for as long as the host needs to enqueue all steps, `host` microseconds per step, so
        that only device time is measured, with gaps between kernels. An implementation that waits for the device
        within a step also pays for the host's time.
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

    def synchronize(self) -> None:
        """Wait until the device has finished its work."""
        torch.cuda.synchronize()


Clock = HostClock | CudaClock


def clock_for(device: str) -> Clock:
    return CudaClock() if device == "cuda" else HostClock()
