# SPDX-License-Identifier: MIT
"""Drop-in schedulers beside diffusers' own on the device: whole loops of 20 steps, with a wait at the end of each.

The time of a step includes the first ones of a loop, the host and the device; `set_timesteps` and the model are left
out. Loops of diffusers and fastdiff alternate, plain and with guidance, which diffusers' users combine before the step.
Noise is torch's, drawn on the device. Results are stored after each class; classes beyond the time limit are listed.
"""

from __future__ import annotations

import math
import statistics
import time
import warnings
from pathlib import Path
from typing import Any

import torch

from ..dropins import Loop
from ..timing import quantiles, ratios
from . import results
from .clock import Unit, clock_for
from .counting import count
from .machine import machine

#: Classes in the order of measurement.
CLASSES = tuple(
    f"{name}Scheduler"
    for name in (
        "DDIM", "DPMSolverMultistep", "EulerDiscrete", "FlowMatchEulerDiscrete", "DDPM", "EulerAncestralDiscrete",
        "UniPCMultistep", "HeunDiscrete", "LCM", "PNDM", "DEISMultistep", "KDPM2Discrete", "DPMSolverSinglestep",
        "FlowMatchHeunDiscrete", "TCD", "SASolver",
    )
)  # fmt: skip
SHAPE, SMALL = (1, 4, 128, 128), (1, 2, 4, 4)
STEPS, SMALL_STEPS = 20, 4
KINDS = ("plain", "guided")


class Run:
    """One run over the classes, with its report."""

    def __init__(self, device: str, path: Path, *, rehearse: bool, rounds: int, seconds: float) -> None:
        self.device, self.path, self.rehearse, self.rounds = device, path, rehearse, rounds
        self.clock = clock_for(device)
        self.steps = SMALL_STEPS if rehearse else STEPS
        self.shape = SMALL if rehearse else SHAPE
        self._deadline = time.monotonic() + seconds
        self.section: dict[str, Any] = {
            "shape": list(self.shape),
            "steps": self.steps,
            "classes": {},
            "failed": {},
            "not_measured": list(CLASSES),
            "machine": machine(device),
        }

    def measure_all(self) -> dict[str, Any]:
        """Measure and store all classes, then count their waits; return the section of the report.

        Raises:
            ImportError: diffusers is not installed.
        """
        from fastdiff.diffusers import CLASSES as ours

        self.store()
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for name in CLASSES:
                if time.monotonic() > self._deadline:
                    break
                try:
                    self.section["classes"][name] = self._class(name, ours[name])
                except Exception as error:  # one failing class must not end the run
                    self.section["failed"][name] = f"{type(error).__name__}: {error}".splitlines()[0][:300]
                self.section["not_measured"].remove(name)
                self.store()
            for name in list(self.section["classes"]):  # last, because the profiler may slow down launches
                if time.monotonic() > self._deadline:
                    break
                self._count(name, ours[name])
                self.store()
        return self.section

    def store(self) -> None:
        """Write the section, with the geometric means so far."""
        for kind in KINDS:
            times = [line[kind]["times"]["median"] for line in self.section["classes"].values()]
            mean = math.exp(statistics.fmean(map(math.log, times))) if times else None
            self.section[f"geometric_mean_{kind}"] = mean
        results.store(self.path, self.rehearse, dropins=self.section)

    def _loops(self, name: str, cls: Any, guided: bool) -> dict[str, Loop]:
        made = {"diffusers": cls.original, "fastdiff": cls}
        return {who: Loop(name, c, self.shape, torch.float32, guided, self.device) for who, c in made.items()}

    def _class(self, name: str, cls: Any) -> dict[str, Any]:
        loops = {(kind, who): loop for kind in KINDS for who, loop in self._loops(name, cls, kind == "guided").items()}
        taken: dict[tuple[str, str], list[float]] = {key: [] for key in loops}
        for _ in range(2):  # trace, compile, allocate
            for loop in loops.values():
                self._time(loop)
        for turn in range(self.rounds):
            for key in loops if turn % 2 == 0 else reversed(loops):
                taken[key].append(self._time(loops[key]))
        return {
            kind: {
                "diffusers": quantiles(taken[kind, "diffusers"]),
                "fastdiff": quantiles(taken[kind, "fastdiff"]),
                "times": quantiles(ratios(taken[kind, "diffusers"], taken[kind, "fastdiff"])),
            }
            for kind in KINDS
        }

    def _time(self, loop: Loop) -> float:
        """Return microseconds per step of a whole loop."""
        timesteps = loop.start(self.steps)
        self.clock.synchronize()
        started = time.perf_counter()
        loop.time_steps(loop.sample, timesteps)
        self.clock.synchronize()
        return (time.perf_counter() - started) / len(timesteps) * 1e6

    def _count(self, name: str, cls: Any) -> None:
        """Count kernels, copies and waits of a plain step; on the CPU operators and numbers read back."""
        counts = {}
        for who, loop in self._loops(name, cls, False).items():
            timesteps: list[Any] = []

            def prepare(loop: Loop = loop, timesteps: list[Any] = timesteps) -> None:
                timesteps[:] = loop.start(self.steps)

            def run(loop: Loop = loop, timesteps: list[Any] = timesteps) -> None:
                loop.time_steps(loop.sample, timesteps)

            for _ in range(2):
                prepare()
                run()
            try:
                counts[who] = count(Unit(prepare, run, len(timesteps)), self.device)
            except RuntimeError as error:
                counts[who] = {"absent": str(error).splitlines()[0][:300]}
        self.section["classes"][name]["counts"] = counts


def show(section: dict[str, Any]) -> str:
    """Return the classes as a Markdown table, with the geometric means."""
    text = [
        "| | diffusers | fastdiff | | guided: diffusers | fastdiff | | waits a step |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for name, line in section["classes"].items():
        cells = [f"{line[kind][who]['median']:.1f}" for kind in KINDS for who in ("diffusers", "fastdiff")]
        times = [f"{line[kind]['times']['median']:.1f}×" for kind in KINDS]
        waits = [line.get("counts", {}).get(who, {}).get("waits") for who in ("diffusers", "fastdiff")]
        counted = "–" if None in waits else " → ".join(f"{value:.1f}" for value in waits)
        row = [name.removesuffix("Scheduler"), *cells[:2], times[0], *cells[2:], times[1], counted]
        text.append(f"| {' | '.join(row)} |")
    means = [section[f"geometric_mean_{kind}"] for kind in KINDS]
    if None not in means:
        text.append(f"\nGeometric mean: {means[0]:.1f}× plain, {means[1]:.1f}× guided, over {len(section['classes'])}.")
    text += [f"- failed: {name}: {reason}" for name, reason in section["failed"].items()]
    if section["not_measured"]:
        text.append(f"- not measured, for want of time: {', '.join(section['not_measured'])}")
    return "\n".join(text)
