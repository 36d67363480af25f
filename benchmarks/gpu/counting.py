# SPDX-License-Identifier: MIT
"""Counts of kernels, launches, copies and waits of a step, from the profiler.

Without a GPU, counts of the operators that pass through torch's dispatcher.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from ..dispatches import count_operators
from .clock import Unit

_RANGE = "fastdiff: the steps"
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cuCtxSynchronize")
_LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch", "cudaLaunchCooperativeKernel")


def count(unit: Unit, device: str) -> dict[str, Any]:
    """Count kernels, copies (memcpy and memset), launches, waits and scalar reads per step; list kernel names."""
    unit.prepare()
    if device == "cpu":
        counted = count_operators(unit.run)
        return {"operators": counted.operators / unit.steps, "scalar_reads": counted.reads / unit.steps}
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        with record_function(_RANGE):
            unit.run()
        torch.cuda.synchronize()
    return _read(list(profiler.events() or []), unit.steps)


def _read(events: list[Any], steps: int) -> dict[str, Any]:
    """Count the profiler's events per step.

    Raises:
        RuntimeError: there is no device event, because the profiler has no permission.
    """
    host = [event for event in events if event.device_type == DeviceType.CPU]
    ranges = [event.time_range for event in host if event.name == _RANGE]
    inside = [e for e in host if any(r.start <= e.time_range.start <= r.end for r in ranges)]
    # The range itself is an event on the device too.
    device = [e for e in events if e.device_type == DeviceType.CUDA and e.name != _RANGE]
    if not device:
        raise RuntimeError("the profiler is not allowed to see kernels here")
    copies = [e for e in device if e.name.startswith(("Memcpy", "Memset"))]
    kernels = [e for e in device if not e.name.startswith(("Memcpy", "Memset"))]
    return {
        "kernels": len(kernels) / steps,
        "kernel_microseconds": sum(e.time_range.elapsed_us() for e in kernels) / steps,
        "copies": len(copies) / steps,
        "launches": _named(inside, _LAUNCHES) / steps,
        # cudaMemcpy waits too; cudaMemcpyAsync to pageable memory is followed by an explicit wait.
        "waits": (_named(inside, WAITS) + sum(e.name == "cudaMemcpy" for e in inside)) / steps,
        "scalar_reads": sum(e.name == "aten::_local_scalar_dense" for e in inside) / steps,
        "names": dict(Counter(e.name[:120] for e in kernels).most_common(8)),
    }


def _named(events: list[Any], beginnings: tuple[str, ...]) -> int:
    return sum(event.name.startswith(beginnings) for event in events)
