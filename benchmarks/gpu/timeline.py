# SPDX-License-Identifier: MIT
"""Timeline picture: activity of host and device over a few steps of diffusers and fastdiff, on one time axis.

A dry run has no device: it shows the innermost operators in place of kernels, and the picture says so.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from fastdiff.errors import require
from fastdiff.files import write_whole

from .cases import SMALL, GpuCase
from .clock import Unit
from .counting import WAITS
from .implementations import units

#: Implementations in the order of the picture, from the slowest to the fastest.
IMPLEMENTATIONS = ("diffusers", "diffusers, torch.compile", "C++ op", "CUDA graph")
LABELS = {"C++ op": "fastdiff", "CUDA graph": "fastdiff, CUDA graph"}
STEPS = 5
_RANGE = "fastdiff: the steps"
_HOST, _WAIT, _DEVICE = "#7f8fa6", "#d63031", "#0984e3"

#: Begin and length in µs.
Span = tuple[float, float]


class Lanes(NamedTuple):
    """Activity of one implementation; times are relative to the beginning of the first step."""

    total: Span
    host: list[Span]
    waits: list[Span]
    device: list[Span]


def draw(device: str, picture: Path, rehearse: bool) -> dict[str, Any]:
    """Profile the implementations, draw a .png, and return the lanes for the results.

    Raises:
        ImportError: matplotlib is not installed.
        RuntimeError: none of `IMPLEMENTATIONS` is available.
    """
    require("matplotlib", "plots", "the timeline")
    shape = SMALL["image-128"] if rehearse else (1, 4, 128, 128)
    case = GpuCase("ddim", shape, device=device, steps=STEPS + 1, core=not rehearse)
    absent: dict[str, str] = {}
    with torch.no_grad():
        made = units(case, case.tensors(), absent, IMPLEMENTATIONS)
        found = {name: profiled(made[name], device) for name in IMPLEMENTATIONS if name in made}
    if not found:
        raise RuntimeError(f"the timeline: nobody takes the steps here: {absent}")
    picture.parent.mkdir(parents=True, exist_ok=True)
    _plot(found, case, picture, rehearse)
    return {"case": case.name, "steps": STEPS, "absent": absent, "lanes": {n: v._asdict() for n, v in found.items()}}


def profiled(unit: Unit, device: str) -> Lanes:
    """Profile one unit and return its lanes."""
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device == "cuda" else [])
    for _ in range(2):  # the first run includes the profiler's setup
        unit.prepare()
        if device == "cuda":
            torch.cuda.synchronize()
        with profile(activities=activities) as profiler:
            with record_function(_RANGE):
                unit.run()
            if device == "cuda":
                torch.cuda.synchronize()
    return lanes_of(list(profiler.events() or []), device)


def lanes_of(events: list[Any], device: str) -> Lanes:
    """Extract the spans of the host's outermost calls, of its waits, and of the device's kernels."""
    host = [event for event in events if event.device_type == DeviceType.CPU]
    total = next(event for event in host if event.name == _RANGE)
    zero, end = total.time_range.start, total.time_range.end

    def span(event: Any) -> Span:
        return event.time_range.start - zero, event.time_range.elapsed_us()

    inside = [e for e in host if e is not total and zero <= e.time_range.start <= end]
    called = [e for e in inside if e.cpu_parent is None or e.cpu_parent is total]
    if device == "cuda":
        on_device = [e for e in events if e.device_type == DeviceType.CUDA and e.name != _RANGE]
        device_spans = [span(e) for e in on_device]
    else:
        device_spans = [span(e) for e in inside if not e.cpu_children] or [span(total)]
    # On a GPU a number may be read from host memory without a wait: use the driver's waits.
    beginnings = WAITS if device == "cuda" else ("aten::_local_scalar_dense",)
    waits = [span(e) for e in inside if e.name.startswith(beginnings)]
    return Lanes(span(total), [span(e) for e in called], waits, device_spans)


def _plot(found: dict[str, Lanes], case: GpuCase, picture: Path, rehearse: bool) -> None:
    require("matplotlib", "plots", "the timeline").use("Agg")
    pyplot = require("matplotlib.pyplot", "plots", "the timeline")
    patches = require("matplotlib.patches", "plots", "the timeline")
    figure, axis = pyplot.subplots(figsize=(11, 1.2 + 0.95 * len(found)), layout="constrained")
    longest = max(_end(lanes) for lanes in found.values())
    ticks, labels = [], []
    for i, (name, lanes) in enumerate(found.items()):
        top = -2.5 * i
        for lane, y in (("host", top), ("device", top - 1.0)):
            axis.axhspan(y - 0.4, y + 0.4, color="#f5f6fa", zorder=0)
            ticks.append(y)
            labels.append(f"{LABELS.get(name, name)}: {lane}" if lane == "host" else lane)
        # The light bar is the host's total time for the steps, including Python.
        axis.broken_barh([lanes.total], (top - 0.4, 0.8), color="#dcdde1", zorder=1)
        axis.broken_barh(lanes.host, (top - 0.3, 0.6), facecolor=_HOST, linewidth=0, zorder=2)
        # The edges keep spans of a microsecond visible.
        axis.broken_barh(lanes.waits, (top - 0.4, 0.8), facecolor=_WAIT, edgecolor=_WAIT, linewidth=0.8, zorder=3)
        axis.broken_barh(lanes.device, (top - 1.3, 0.6), facecolor=_DEVICE, edgecolor=_DEVICE, linewidth=0.3, zorder=2)
        busy = sum(length for _, length in lanes.device)
        note = f"host {_us(lanes.total[1])}" if rehearse else f"host {_us(lanes.total[1])}, device busy {_us(busy)}"
        axis.annotate(note, (_end(lanes), top - 0.5), (6, 0), textcoords="offset points", va="center", fontsize=9)
    axis.set_yticks(ticks, labels, fontsize=9)
    axis.set_xlim(0, 1.22 * longest)
    axis.set_xlabel("µs from the first step's beginning")
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.tick_params(axis="y", length=0)
    shape = "×".join(str(size) for size in case.shape)
    title = f"{STEPS} steps of DDIM with guidance, {shape} {case.dtype}"
    axis.set_title(f"{title}: rehearsal on the CPU, operators stand in for kernels" if rehearse else title, loc="left")
    kinds = (
        (_HOST, "operator or launch"),
        ("#dcdde1", "Python between"),
        (_WAIT, "number read back" if rehearse else "wait for the device"),
        (_DEVICE, "operator, standing in" if rehearse else "kernel or copy"),
    )
    axis.legend(
        handles=[patches.Patch(color=color, label=label) for color, label in kinds],
        loc="lower right", fontsize=8, frameon=False,
    )  # fmt: skip
    buffer = io.BytesIO()
    figure.savefig(buffer, format=picture.suffix[1:], dpi=130)
    write_whole(picture, buffer.getvalue(), operation="timeline")
    pyplot.close(figure)


def _end(lanes: Lanes) -> float:
    return max(begin + length for begin, length in [lanes.total, *lanes.device])


def _us(value: float) -> str:
    return f"{value:.0f} µs"
