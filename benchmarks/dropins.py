# SPDX-License-Identifier: MIT
"""Time of a step of each drop-in scheduler and of diffusers' own, in alternating loops of one run.

    python -m benchmarks.dropins                                  # every class at 1x4x64x64, one thread
    python -m benchmarks.dropins --only DDIM,UniPCMultistep --shape 1x16x21x90x160 --json FILE
    python -m benchmarks.dropins --bandwidth --shape 1x16x21x90x160
    python -m benchmarks.dropins --beginnings

A loop is `set_timesteps` and 20 steps on a precomputed model output; only the steps are timed, and not those of a
class's first loop, which traces them.  "guided" combines two outputs before diffusers' step and within fastdiff's.
Noise is drawn by torch; the time of a draw is reported too.

`--bandwidth` adds the share of a copy's bandwidth that fastdiff's steps reach: a copy of as many bytes as their plans
must move, inputs read once and outputs written once, alternates with them (see copy_bandwidth.py; the faster of both
kinds of stores).  It is meaningful if a step moves more than the caches hold.  The time of a step includes a draw by
torch, its bytes do not.

`--beginnings` adds the first step after `set_timesteps`, and a whole loop of 4 steps, like that of a few-step model.
Loops of diffusers and fastdiff alternate, and `set_timesteps` itself is not timed.  It also adds the first loop of a
process, in which all plans are made.
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
from .copy_bandwidth import STORES, copy_loop, why_absent
from .timing import quantiles, ratios
from .traffic import tensors_of_plan

STEPS = 20
#: Steps of a short loop, and short loops per round.
SHORT_STEPS, SHORT_LOOPS = 4, 10
#: Arguments of constructors, and of set_timesteps, for classes that cannot use the defaults.
OPTIONS: dict[str, dict[str, Any]] = {
    "DDIMScheduler": {"clip_sample": False},
    "DDPMScheduler": {"clip_sample": False},
    "DPMSolverSDEScheduler": {"noise_sampler_seed": 0},
}
TIMESTEPS: dict[str, tuple[Any, ...]] = {"SCMScheduler": (2,), "ConsistencyDecoderScheduler": (2,)}


class Loop:
    """Timed loops of one scheduler on one set of tensors."""

    def __init__(
        self, name: str, cls: Any, shape: tuple[int, ...], dtype: torch.dtype, guided: bool, device: str = "cpu"
    ) -> None:
        self.name, self.guided = name, guided
        #: Where the timesteps go, as pipelines say it.
        self.placed: dict[str, Any] = {} if device == "cpu" else {"device": device}
        self.scheduler = cls(**OPTIONS.get(name, {}))
        generator = torch.Generator().manual_seed(0)
        self.sample, self.output, self.uncond, self.other = (
            torch.randn(shape, generator=generator).to(device, dtype) * 0.1 for _ in range(4)
        )
        self.mask = (self.other > 0).to(dtype)
        self.fused = hasattr(cls, "guided_step")
        self.extra: dict[str, Any] = {"return_dict": False}
        if "generator" in inspect.signature(cls.step).parameters:
            self.extra["generator"] = torch.Generator(device).manual_seed(0)
        if name == "RePaintScheduler":
            self.extra |= {"original_image": self.other, "mask": self.mask}
        #: The previous timestep, which CogVideoXDPMScheduler.step takes.
        self.before: Any = None

    def step(self, timestep: Any, sample: Tensor) -> Tensor:
        """Take one step, with guidance if the loop is guided."""
        if self.guided and self.fused and self.name != "CogVideoXDPMScheduler":
            return self.scheduler.guided_step(self.uncond, self.output, 3.0, timestep, sample, **self.extra)[0]
        output = self.uncond + 3.0 * (self.output - self.uncond) if self.guided else self.output
        if self.name == "CogVideoXDPMScheduler":
            before, self.before = self.before, timestep
            old = None if before is None else self.other
            return self.scheduler.step(output, old, timestep, before, sample, **self.extra)[0]
        return self.scheduler.step(output, timestep, sample, **self.extra)[0]

    def plans(self) -> list[Any]:
        """Return the plans of fastdiff's steps in the order of use, without those of the untimed first two steps."""
        from fastdiff.diffusers.compiler.plan import Plan

        plans = [plan for plan in vars(self.scheduler)["_fused"].plan_cache.plans.values() if isinstance(plan, Plan)]
        return plans[2:] or plans

    def bytes_a_step(self) -> float | None:
        """Return the bytes that a fastdiff step must move, the mean of its plans; None if a plan is not one pass."""
        moved = [tensors_of_plan(plan, guided=self.guided) for plan in self.plans()]
        known = [tensors for tensors in moved if tensors is not None]
        return statistics.fmean(known) * self.sample.nbytes if known and len(known) == len(moved) else None

    def start(self, steps: int) -> list[Any]:
        """Set the timesteps of a new loop and return them."""
        self.scheduler.set_timesteps(*TIMESTEPS.get(self.name, (steps,)), **self.placed)
        timesteps = list(self.scheduler.timesteps)
        self.before = None
        if self.name in ("DDPMWuerstchenScheduler", "SCMScheduler"):
            timesteps = timesteps[:-1]  # the last one is the end of the loop
        if self.name == "DDPMWuerstchenScheduler":
            timesteps = [t[None] for t in timesteps]
        if hasattr(self.scheduler, "is_scale_input_called"):
            self.scheduler.is_scale_input_called = True
        return timesteps

    def time_short_loop(self) -> tuple[float, float]:
        """Return microseconds of the first step of a short loop, and of the whole loop."""
        timesteps = self.start(SHORT_STEPS)
        started = time.perf_counter()
        sample = self.step(timesteps[0], self.sample)
        first = time.perf_counter()
        for timestep in timesteps[1:SHORT_STEPS]:
            sample = self.step(timestep, sample)
        return (first - started) * 1e6, (time.perf_counter() - started) * 1e6

    def time_planning(self) -> float:
        """Return milliseconds of the steps of a process' first loop: all plans are discarded before it."""
        from fastdiff.diffusers.runtime.lookup import forget_plans
        from fastdiff.diffusers.runtime.scheduler_cache import forget_first_steps

        forget_plans()
        forget_first_steps()
        self.scheduler = type(self.scheduler)(**OPTIONS.get(self.name, {}))
        timesteps, sample = self.start(STEPS), self.sample
        started = time.perf_counter()
        for timestep in timesteps:
            sample = self.step(timestep, sample)
        return (time.perf_counter() - started) * 1e3

    def time(self) -> float:
        """Return microseconds per step over one loop without its first two steps."""
        timesteps = self.start(STEPS)
        sample = self.sample
        first = min(2, len(timesteps) - 1)
        for timestep in timesteps[:first]:
            sample = self.step(timestep, sample)
        seconds = self.time_steps(sample, timesteps[first:])
        return seconds / (len(timesteps) - first) * 1e6

    def time_steps(self, sample: Tensor, timesteps: list[Any]) -> float:
        """Return seconds for the steps in a loop with as little overhead as a user's loop."""
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
    """Return a function that times a draw of noise by diffusers, in microseconds."""
    from diffusers.utils.torch_utils import randn_tensor

    generator = torch.Generator().manual_seed(0)

    def time_draws() -> float:
        started = time.perf_counter()
        for _ in range(STEPS):
            randn_tensor(shape, generator, torch.device("cpu"), dtype)
        return (time.perf_counter() - started) / STEPS * 1e6

    return time_draws


class Copies:
    """Timed copies of as many bytes as a loop's step moves, with both kinds of stores."""

    def __init__(self, loop: Loop) -> None:
        self.bytes = loop.bytes_a_step()
        self.loops = {} if self.bytes is None else {name: copy_loop(self.bytes, "warm", name) for name in STORES}
        self.times: dict[str, list[float]] = {name: [] for name in self.loops}

    def time(self) -> None:
        """Time as many copies as a loop times steps."""
        for name, loop in self.loops.items():
            started = time.perf_counter()
            for _ in range(STEPS - 2):
                loop.advance()
            self.times[name].append((time.perf_counter() - started) / ((STEPS - 2) * loop.steps) * 1e6)

    def share(self, ours: list[float]) -> dict[str, Any] | None:
        """Return the faster copy and the ratio of its time to the step's; None if the step is not one pass."""
        if self.bytes is None:
            return None
        best = min(self.times, key=lambda name: statistics.median(self.times[name]))
        found = quantiles(ratios(self.times[best], ours))
        return {"bytes": self.bytes, "copy": best, "microseconds": quantiles(self.times[best]), "share": found}


def measure_beginnings(theirs: Loop, ours: Loop, rounds: int) -> dict[str, Any]:
    """Time the first step of short loops and the whole loops, in microseconds, and the ratio of diffusers to fastdiff.

    Also time a longer loop in which fastdiff's plans are made, in milliseconds.
    """
    times: list[list[tuple[float, float]]] = [[], []]
    for loop in (theirs, ours):
        for _ in range(3):  # trace the steps and record their order
            loop.time_short_loop()
    for _ in range(rounds * SHORT_LOOPS):
        for found, loop in zip(times, (theirs, ours), strict=True):
            found.append(loop.time_short_loop())
    line = {}
    for k, what in enumerate(("first", "loop")):
        of_theirs, count_fastdiff = ([each[k] for each in found] for found in times)
        line[what] = {
            "diffusers": quantiles(of_theirs),
            "fastdiff": quantiles(count_fastdiff),
            "times": quantiles(ratios(of_theirs, count_fastdiff)),
        }
    pairs = [(theirs.time_planning(), ours.time_planning()) for _ in range(max(3, rounds // 3))]
    line["planning"] = {who: quantiles([pair[k] for pair in pairs]) for k, who in enumerate(("diffusers", "fastdiff"))}
    return line


def measure(
    names: list[str], shape: tuple[int, ...], dtype: torch.dtype, rounds: int, *, bandwidth: bool = False,
    begins: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """For each class, time a step of both, plain and guided, in microseconds, and the ratio of diffusers to fastdiff.

    Args:
        bandwidth: measure the copies too.
        begins: measure first steps, short loops and planning too.
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
        for loop in loops.values():  # trace and allocate
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
            line["beginnings"] = measure_beginnings(loops["diffusers", False], loops["fastdiff", False], rounds)
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
    """Print the table, and store it if requested."""
    parser = CommandParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="classes, without Scheduler, separated by commas; default: all")
    parser.add_argument("--shape", default="1x4x64x64")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--bandwidth", action="store_true", help="add the share of a copy's bandwidth")
    parser.add_argument(
        "--beginnings", action="store_true", help=f"add the first step of a loop and loops of {SHORT_STEPS} steps"
    )
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
        more += ["first step: diffusers", "ours", "times", f"{SHORT_STEPS} steps: diffusers", "ours", "times"]
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
