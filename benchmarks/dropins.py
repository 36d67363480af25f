# SPDX-License-Identifier: MIT
"""What a step of each drop-in scheduler costs beside diffusers' own, whole loops in turn in one run.

    python -m benchmarks.dropins                                  # every class at 1x4x64x64, one thread
    python -m benchmarks.dropins --only DDIM,UniPCMultistep --shape 1x16x21x90x160 --json FILE
    python -m benchmarks.dropins --bandwidth --shape 1x16x21x90x160
    python -m benchmarks.dropins --beginnings

A loop is `set_timesteps` and 20 steps on an output that was made beforehand; steps alone are timed, and a class's first
loop, in which its steps are traced, is not.  "guided" has the combination of two outputs before diffusers' step and
within ours.  Where a step draws noise it is torch's, and the time of the draw is told as well.

`--bandwidth` adds what share of a copy's bandwidth our steps reach: a copy of as many bytes as their plans must move,
inputs read once and outputs written once, takes its turn with them (see copying.py; the better of both stores).  That
says something where a step moves more than the caches hold.  A draw of torch's is in the step's time, not in its bytes.

`--beginnings` adds what is left out otherwise: the first step after `set_timesteps`, and a whole loop of 4 steps with
it, as a model of few steps has them.  diffusers' loops and ours take turns, and `set_timesteps` itself is not timed.
And the first loop of a process, in which all plans are made.
"""

from __future__ import annotations

import argparse
import inspect
import json
import math
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdiff.command import CommandParser, run_command
from fastdiff.files import check_writable, write_whole

from .conditions import conditions
from .copying import STORES, copy_walk, why_absent
from .measure import quantiles, ratios
from .traffic import tensors_of_plan

STEPS = 20
#: Steps of a loop whose beginning is timed, and such loops in a round.
FEW, LOOPS = 4, 10
#: What a class needs to be made, and to be given timesteps, where the defaults do not do.
OPTIONS: dict[str, dict[str, Any]] = {
    "DDIMScheduler": {"clip_sample": False},
    "DDPMScheduler": {"clip_sample": False},
    "DPMSolverSDEScheduler": {"noise_sampler_seed": 0},
}
TIMESTEPS: dict[str, tuple[Any, ...]] = {"SCMScheduler": (2,), "ConsistencyDecoderScheduler": (2,)}


class Loop:
    """Loops of one scheduler on one set of tensors."""

    def __init__(self, name: str, cls: Any, shape: tuple[int, ...], dtype: torch.dtype, guided: bool) -> None:
        self.name, self.guided = name, guided
        self.scheduler = cls(**OPTIONS.get(name, {}))
        made = torch.Generator().manual_seed(0)
        self.sample, self.output, self.uncond, self.other = (
            torch.randn(shape, generator=made).to(dtype) * 0.1 for _ in range(4)
        )
        self.mask = (self.other > 0).to(dtype)
        self.fused = hasattr(cls, "guided_step")
        self.extra: dict[str, Any] = {"return_dict": False}
        if "generator" in inspect.signature(cls.step).parameters:
            self.extra["generator"] = torch.Generator().manual_seed(0)
        if name == "RePaintScheduler":
            self.extra |= {"original_image": self.other, "mask": self.mask}
        #: For the one class that is told the timestep before.
        self.before: Any = None

    def step(self, timestep: Any, sample: Tensor) -> Tensor:
        """One step, with the guidance that is asked for."""
        if self.guided and self.fused and self.name != "CogVideoXDPMScheduler":
            return self.scheduler.guided_step(self.uncond, self.output, 3.0, timestep, sample, **self.extra)[0]
        output = self.uncond + 3.0 * (self.output - self.uncond) if self.guided else self.output
        if self.name == "CogVideoXDPMScheduler":
            before, self.before = self.before, timestep
            old = None if before is None else self.other
            return self.scheduler.step(output, old, timestep, before, sample, **self.extra)[0]
        return self.scheduler.step(output, timestep, sample, **self.extra)[0]

    def plans(self) -> list[Any]:
        """The plans of our steps in the order in which they were taken; of those that are timed, where there are."""
        from fastdiff.diffusers.compiler.plan import Plan

        plans = [plan for plan in vars(self.scheduler)["_fused"].plan_cache.plans.values() if isinstance(plan, Plan)]
        return plans[2:] or plans

    def bytes_a_step(self) -> float | None:
        """Bytes that our step must move, the mean of the plans; None where one is more than a pass."""
        moved = [tensors_of_plan(plan, guided=self.guided) for plan in self.plans()]
        known = [tensors for tensors in moved if tensors is not None]
        return statistics.fmean(known) * self.sample.nbytes if known and len(known) == len(moved) else None

    def begin(self, steps: int) -> list[Any]:
        """The timesteps of a new loop."""
        self.scheduler.set_timesteps(*TIMESTEPS.get(self.name, (steps,)))
        timesteps = list(self.scheduler.timesteps)
        self.before = None
        if self.name in ("DDPMWuerstchenScheduler", "SCMScheduler"):
            timesteps = timesteps[:-1]  # the last one is where a loop ends
        if self.name == "DDPMWuerstchenScheduler":
            timesteps = [t[None] for t in timesteps]
        if hasattr(self.scheduler, "is_scale_input_called"):
            self.scheduler.is_scale_input_called = True
        return timesteps

    def time_beginning(self) -> tuple[float, float]:
        """Microseconds of the first step of a loop of few, and of the whole loop."""
        timesteps = self.begin(FEW)
        started = time.perf_counter()
        sample = self.step(timesteps[0], self.sample)
        first = time.perf_counter()
        for timestep in timesteps[1:FEW]:
            sample = self.step(timestep, sample)
        return (first - started) * 1e6, (time.perf_counter() - started) * 1e6

    def time_first(self) -> float:
        """Milliseconds of the steps of a process' first loop: all plans are forgotten, and made in it."""
        from fastdiff.diffusers.runtime.lookup import forget_plans
        from fastdiff.diffusers.runtime.scheduler_cache import forget_first_steps

        forget_plans()
        forget_first_steps()
        self.scheduler = type(self.scheduler)(**OPTIONS.get(self.name, {}))
        timesteps, sample = self.begin(STEPS), self.sample
        started = time.perf_counter()
        for timestep in timesteps:
            sample = self.step(timestep, sample)
        return (time.perf_counter() - started) * 1e3

    def time(self) -> float:
        """Microseconds a step, over one loop; what begins a loop is left out."""
        timesteps = self.begin(STEPS)
        sample = self.sample
        first = min(2, len(timesteps) - 1)
        for timestep in timesteps[:first]:
            sample = self.step(timestep, sample)
        seconds = self._walk(sample, timesteps[first:])
        return seconds / (len(timesteps) - first) * 1e6

    def _walk(self, sample: Tensor, timesteps: list[Any]) -> float:
        """Seconds of steps, with as little around them as a user's loop has."""
        output, uncond, extra = self.output, self.uncond, self.extra
        if self.name == "CogVideoXDPMScheduler":
            started = time.perf_counter()
            for timestep in timesteps:
                sample = self.step(timestep, sample)
        elif not self.guided:
            step = self.scheduler.step
            started = time.perf_counter()
            for timestep in timesteps:
                sample = step(output, timestep, sample, **extra)[0]
        elif self.fused:
            step = self.scheduler.guided_step
            started = time.perf_counter()
            for timestep in timesteps:
                sample = step(uncond, output, 3.0, timestep, sample, **extra)[0]
        else:
            step = self.scheduler.step
            started = time.perf_counter()
            for timestep in timesteps:
                sample = step(uncond + 3.0 * (output - uncond), timestep, sample, **extra)[0]
        return time.perf_counter() - started


def draw_time(shape: tuple[int, ...], dtype: torch.dtype) -> Callable[[], float]:
    """Microseconds of a draw of noise, as diffusers draws it."""
    from diffusers.utils.torch_utils import randn_tensor

    generator = torch.Generator().manual_seed(0)

    def timed() -> float:
        started = time.perf_counter()
        for _ in range(STEPS):
            randn_tensor(shape, generator, torch.device("cpu"), dtype)
        return (time.perf_counter() - started) / STEPS * 1e6

    return timed


class Copies:
    """A copy of as many bytes as a loop's step moves, with both kinds of stores."""

    def __init__(self, loop: Loop) -> None:
        self.bytes = loop.bytes_a_step()
        self.walks = {} if self.bytes is None else {name: copy_walk(self.bytes, "warm", name) for name in STORES}
        self.times: dict[str, list[float]] = {name: [] for name in self.walks}

    def time(self) -> None:
        """Take a turn: as many copies as a loop times steps."""
        for name, walk in self.walks.items():
            started = time.perf_counter()
            for _ in range(STEPS - 2):
                walk.advance()
            self.times[name].append((time.perf_counter() - started) / ((STEPS - 2) * walk.steps) * 1e6)

    def share(self, ours: list[float]) -> dict[str, Any] | None:
        """The better copy, and its time over the step's."""
        if self.bytes is None:
            return None
        best = min(self.times, key=lambda name: statistics.median(self.times[name]))
        found = quantiles(ratios(self.times[best], ours))
        return {"bytes": self.bytes, "copy": best, "microseconds": quantiles(self.times[best]), "share": found}


def beginnings(theirs: Loop, ours: Loop, rounds: int) -> dict[str, Any]:
    """Microseconds of the first step of a loop, and of the loop, of both; and how many times longer diffusers takes.

    And milliseconds of a longer loop in which our plans are made.
    """
    times: list[list[tuple[float, float]]] = [[], []]
    for loop in (theirs, ours):
        for _ in range(3):  # traces, and learns what follows what
            loop.time_beginning()
    for _ in range(rounds * LOOPS):
        for found, loop in zip(times, (theirs, ours), strict=True):
            found.append(loop.time_beginning())
    line = {}
    for k, what in enumerate(("first", "loop")):
        of_theirs, of_ours = ([each[k] for each in found] for found in times)
        line[what] = {
            "diffusers": quantiles(of_theirs),
            "fastdiff": quantiles(of_ours),
            "times": quantiles(ratios(of_theirs, of_ours)),
        }
    pairs = [(theirs.time_first(), ours.time_first()) for _ in range(max(3, rounds // 3))]
    line["planning"] = {who: quantiles([pair[k] for pair in pairs]) for k, who in enumerate(("diffusers", "fastdiff"))}
    return line


def measure(
    names: list[str], shape: tuple[int, ...], dtype: torch.dtype, rounds: int, *, bandwidth: bool = False,
    begins: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """By class: microseconds a step of both, plain and guided, and how many times longer diffusers takes.

    Args:
        bandwidth: measure the copies too.
        begins: measure the beginnings of loops too.
    """
    from fastdiff.diffusers import CLASSES

    lines: dict[str, Any] = {}
    draw = [draw_time(shape, dtype)() for _ in range(max(3, rounds))]
    for name in names:
        cls = CLASSES[name]
        loops = {
            (who, guided): Loop(name, made, shape, dtype, guided)
            for guided in (False, True)
            for who, made in (("diffusers", cls.original), ("fastdiff", cls))
        }
        times: dict[tuple[str, bool], list[float]] = {key: [] for key in loops}
        for loop in loops.values():  # traces, and allocates
            loop.time()
        copies = {guided: Copies(loops["fastdiff", guided]) for guided in (False, True) if bandwidth}
        for _ in range(rounds):
            for key, loop in loops.items():
                times[key].append(loop.time())
            for copy in copies.values():
                copy.time()
        line: dict[str, Any] = {}
        for guided in (False, True):
            theirs, ours = times["diffusers", guided], times["fastdiff", guided]
            line["guided" if guided else "plain"] = {
                "diffusers": quantiles(theirs),
                "fastdiff": quantiles(ours),
                "times": quantiles(ratios(theirs, ours)),
            }
            if bandwidth:
                line["guided" if guided else "plain"]["bandwidth"] = copies[guided].share(ours)
        if begins:
            line["beginnings"] = beginnings(loops["diffusers", False], loops["fastdiff", False], rounds)
        line["draws"] = any(plan.draws for plan in loops["fastdiff", False].plans())
        lines[name] = line
        print(_row(name, line), flush=True)
    return {"draw_microseconds": quantiles(draw), "classes": lines}


def _row(name: str, line: dict[str, Any]) -> str:
    figures = [
        f"{line[kind][what]['median']:.1f}"
        for kind in ("plain", "guided")
        for what in ("diffusers", "fastdiff", "times")
    ]
    shares = [_share(line[kind]["bandwidth"]) for kind in ("plain", "guided") if "bandwidth" in line[kind]]
    begun = [
        f"{line['beginnings'][what][of]['median']:.1f}"
        for what in ("first", "loop")
        for of in ("diffusers", "fastdiff", "times")
        if "beginnings" in line
    ]
    if "beginnings" in line:
        begun += [f"{line['beginnings']['planning'][who]['median']:.1f}" for who in ("diffusers", "fastdiff")]
    cells = [name.removesuffix("Scheduler"), *figures, "yes" if line["draws"] else "", *shares, *begun]
    return f"| {' | '.join(cells)} |"


def _share(found: dict[str, Any] | None) -> str:
    if found is None:
        return "not one pass"
    low, middle, high = (100 * found["share"][name] for name in ("p20", "median", "p80"))
    return (
        f"{middle:.0f} % ({low:.0f} to {high:.0f}) of {found['bytes'] / found['microseconds']['median'] / 1e3:.0f} GB/s"
    )


def main(arguments: list[str] | None = None) -> None:
    """Print the table, and store it where asked."""
    parser = CommandParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="classes, without Scheduler, with commas between; else all")
    parser.add_argument("--shape", default="1x4x64x64")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--bandwidth", action="store_true", help="the share of a copy's bandwidth too")
    parser.add_argument("--beginnings", action="store_true", help=f"the first step of a loop, and loops of {FEW}, too")
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args(arguments)
    if chosen.json is not None:
        check_writable(chosen.json, operation="dropins", argument="--json")
    torch.set_num_threads(chosen.threads)
    from fastdiff.diffusers import CLASSES

    names = [f"{name}Scheduler" for name in chosen.only.split(",")] if chosen.only else sorted(CLASSES)
    shape, dtype = tuple(int(size) for size in chosen.shape.split("x")), getattr(torch, chosen.dtype)
    if chosen.bandwidth and why_absent():
        parser.error(f"--bandwidth needs the extension's copy: {why_absent()}")
    more = ["share of a copy", "guided: share"] if chosen.bandwidth else []
    if chosen.beginnings:
        more += ["first step: diffusers", "ours", "times", f"{FEW} steps: diffusers", "ours", "times"]
        more += ["first loop, ms: diffusers", "ours"]
    heads = ["class", "diffusers µs", "ours µs", "times", "guided: diffusers", "ours", "times", "draws", *more]
    print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = measure(names, shape, dtype, chosen.rounds, bandwidth=chosen.bandwidth, begins=chosen.beginnings)
    for kind in ("plain", "guided"):
        times = [line[kind]["times"]["median"] for line in found["classes"].values()]
        found[f"geometric_mean_{kind}"] = math.exp(statistics.fmean(map(math.log, times)))
        print(f"geometric mean, {kind}: {found[f'geometric_mean_{kind}']:.1f}")
    print(f"a draw of noise: {found['draw_microseconds']['median']:.1f} µs")
    if chosen.json is not None:
        settings = {"shape": list(shape), "dtype": chosen.dtype, "threads": chosen.threads, "steps": STEPS}
        text = json.dumps({"conditions": conditions(), **settings, **found}, indent=1) + "\n"
        write_whole(chosen.json, text.encode(), operation="dropins", argument="--json")


if __name__ == "__main__":
    sys.exit(run_command("dropins", main))
