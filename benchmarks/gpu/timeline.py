# SPDX-License-Identifier: MIT
"""One picture: what host and device do over a few steps, by diffusers and by us, on one axis of time.

In a rehearsal there is no device: the operators that call no other stand in for its kernels, and the picture says so.
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
from .ways import units

#: From the slowest to the quickest, as they stand in the picture.
WAYS = ("diffusers", "diffusers, torch.compile", "C++ op", "CUDA graph")
LABELS = {"C++ op": "fastdiff", "CUDA graph": "fastdiff, CUDA graph"}
STEPS = 5
_RANGE = "fastdiff: the steps"
_HOST, _WAIT, _DEVICE = "#7f8fa6", "#d63031", "#0984e3"

#: Begin and length in µs.
Span = tuple[float, float]


class Lanes(NamedTuple):
    """What one way did; times count from the first step's beginning."""

    total: Span
    host: list[Span]
    waits: list[Span]
    device: list[Span]


def draw(device: str, picture: Path, rehearse: bool) -> dict[str, Any]:
    """Profile, draw to a .png, and return the lanes as they are stored.

    Raises:
        ImportError: matplotlib is not installed.
        RuntimeError: nobody of `WAYS` takes these steps here.
    """
    require("matplotlib", "plots", "the timeline")
    shape = SMALL["image-128"] if rehearse else (1, 4, 128, 128)
    case = GpuCase("ddim", shape, device=device, steps=STEPS + 1, core=not rehearse)
    absent: dict[str, str] = {}
    with torch.no_grad():
        made = units(case, case.tensors(), absent, WAYS)
        found = {name: profiled(made[name], device) for name in WAYS if name in made}
    if not found:
        raise RuntimeError(f"the timeline: nobody takes the steps here: {absent}")
    picture.parent.mkdir(parents=True, exist_ok=True)
    _plot(found, case, picture, rehearse)
    return {"case": case.name, "steps": STEPS, "absent": absent, "lanes": {n: v._asdict() for n, v in found.items()}}


def profiled(unit: Unit, device: str) -> Lanes:
    """The spans of one unit."""
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device == "cuda" else [])
    for _ in range(2):  # the profiler's own beginnings are in the first
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
    """Spans of what the host called from the steps themselves, of its waits, and of the device's kernels."""
    host = [event for event in events if event.device_type == DeviceType.CPU]
    total = next(event for event in host if event.name == _RANGE)
    zero, end = total.time_range.start, total.time_range.end

    def span(event: Any) -> Span:
        return event.time_range.start - zero, event.time_range.elapsed_us()

    inside = [e for e in host if e is not total and zero <= e.time_range.start <= end]
    called = [e for e in inside if e.cpu_parent is None or e.cpu_parent is total]
    if device == "cuda":
        on_device = [e for e in events if e.device_type == DeviceType.CUDA and e.name != _RANGE]
        stood_for = [span(e) for e in on_device]
    else:
        stood_for = [span(e) for e in inside if not e.cpu_children] or [span(total)]
    # On a GPU a number may be read back from the host's own memory: there the driver's word counts.
    beginnings = WAITS if device == "cuda" else ("aten::_local_scalar_dense",)
    waits = [span(e) for e in inside if e.name.startswith(beginnings)]
    return Lanes(span(total), [span(e) for e in called], waits, stood_for)


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
        # The light bar is the time in which the host is at work on the steps, Python's own share included.
        axis.broken_barh([lanes.total], (top - 0.4, 0.8), color="#dcdde1", zorder=1)
        axis.broken_barh(lanes.host, (top - 0.3, 0.6), facecolor=_HOST, linewidth=0, zorder=2)
        # The edges keep what lasts a microsecond visible.
        axis.broken_barh(lanes.waits, (top - 0.4, 0.8), facecolor=_WAIT, edgecolor=_WAIT, linewidth=0.8, zorder=3)
        axis.broken_barh(lanes.device, (top - 1.3, 0.6), facecolor=_DEVICE, edgecolor=_DEVICE, linewidth=0.3, zorder=2)
        busy = sum(length for _, length in lanes.device)
        said = f"host {_us(lanes.total[1])}" if rehearse else f"host {_us(lanes.total[1])}, device busy {_us(busy)}"
        axis.annotate(said, (_end(lanes), top - 0.5), (6, 0), textcoords="offset points", va="center", fontsize=9)
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
