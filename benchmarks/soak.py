# SPDX-License-Identifier: MIT
"""Whether memory stays flat over many steps, and what a step costs then beside diffusers' own.

    python -m benchmarks.soak                              # every kind of use, 100000 steps each
    python -m benchmarks.soak --steps 5000 --only eta,churn

Each kind of use runs in a process of its own, on samples 1x4x8x8 and one thread.  After a tenth of the steps, and after
all of them, garbage is collected, free memory is returned to the system, and the resident set and the number of objects
that the collector tracks are read.  The command fails where a resident set grows by more than 5 MiB between the two.
"us/step" is the mean over the last nine tenths, with all that a loop does between steps; diffusers' own classes then go
through the same steps, at most 2000 of them.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import random
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch

import fastdiff
from fastdiff.errors import error_message

STEPS = 100_000
#: How far a resident set may grow after the first tenth of the steps, in MiB.
LIMIT = 5.0
SHAPE = (1, 4, 8, 8)
#: Steps of a loop, and the most steps of diffusers' classes.
LOOP, MOST_OF_DIFFUSERS = 20, 2000

#: Take steps with the classes of a module, `diffusers` or `fastdiff.diffusers`; each value yielded is one step.
Use = Callable[[Any], Iterator[None]]


def own_sampler(module: Any) -> Iterator[None]:
    """fastdiff's samplers, in whole loops of `sample` and step by step."""
    samplers = [
        fastdiff.create_sampler("scaled_linear", method, num_inference_steps=LOOP)
        for method in ("ddim", "dpm_solver", "ddpm")
    ]
    latents, output = torch.randn(SHAPE), torch.randn(SHAPE)
    calls = 0

    def model(x: Any, t: Any) -> Any:
        nonlocal calls
        calls += 1
        return x / 2

    while True:
        for sampler in samplers:
            calls = 0
            sampler.sample(model, latents, progress=False)
            yield from (None for _ in range(calls))
            stepper, x = sampler.stepper(), latents
            for _ in sampler.timesteps:
                x = stepper.step(x, output)
                yield


def loops(module: Any) -> Iterator[None]:
    """Loops of schedulers that are kept."""
    names = ("DDIM", "DPMSolverMultistep", "UniPCMultistep", "EulerDiscrete", "DDPM", "HeunDiscrete")
    schedulers = [getattr(module, f"{name}Scheduler")() for name in names]
    output = torch.randn(SHAPE)
    while True:
        for scheduler in schedulers:
            scheduler.set_timesteps(LOOP)
            sample = torch.randn(SHAPE)
            for t in scheduler.timesteps:
                sample = scheduler.step(output, t, scheduler.scale_model_input(sample, t), return_dict=False)[0]
                yield


def guided(module: Any) -> Iterator[None]:
    """`guided_step`, with a scale that is another at each step; diffusers' `step` of the guided output."""
    schedulers = [getattr(module, f"{name}Scheduler")() for name in ("DDIM", "DPMSolverMultistep")]
    uncond, cond = torch.randn(SHAPE), torch.randn(SHAPE)
    while True:
        for scheduler in schedulers:
            scheduler.set_timesteps(LOOP)
            sample = torch.randn(SHAPE)
            for t in scheduler.timesteps:
                scale = random.uniform(1.0, 9.0)
                if hasattr(scheduler, "guided_step"):
                    sample = scheduler.guided_step(uncond, cond, scale, t, sample, return_dict=False)[0]
                else:
                    sample = scheduler.step(uncond + scale * (cond - uncond), t, sample, return_dict=False)[0]
                yield


def per_token(module: Any) -> Iterator[None]:
    """A timestep for each token, others at each step."""
    schedulers = [module.FlowMatchEulerDiscreteScheduler(stochastic_sampling=drawn) for drawn in (False, True)]
    sample, output = torch.randn(1, 256, 16), torch.randn(1, 256, 16)
    while True:
        for scheduler in schedulers:
            scheduler.set_timesteps(LOOP)
            for t in scheduler.timesteps:
                levels = t * torch.rand(1, 256)
                scheduler.step(output, t, sample, per_token_timesteps=levels, return_dict=False)
                yield


def eta(module: Any) -> Iterator[None]:
    """DDIM with an eta that is drawn anew for each step."""
    yield from _with_arguments(module.DDIMScheduler(), lambda: {"eta": random.random()})


def churn(module: Any) -> Iterator[None]:
    """Euler steps with a churn that is drawn anew for each step."""
    yield from _with_arguments(module.EulerDiscreteScheduler(), lambda: {"s_churn": random.uniform(0.0, 20.0)})


def _with_arguments(scheduler: Any, arguments: Callable[[], dict[str, Any]]) -> Iterator[None]:
    output = torch.randn(SHAPE)
    while True:
        scheduler.set_timesteps(LOOP)
        sample = torch.randn(SHAPE)
        for t in scheduler.timesteps:
            scaled = scheduler.scale_model_input(sample, t)
            sample = scheduler.step(output, t, scaled, **arguments(), return_dict=False)[0]
            yield


def patching(module: Any) -> Iterator[None]:
    """A scheduler of diffusers that is patched for half a loop, and unpatched for the other."""
    import diffusers

    scheduler = diffusers.DPMSolverMultistepScheduler()
    output = torch.randn(SHAPE)
    while True:
        scheduler.set_timesteps(LOOP)
        sample = torch.randn(SHAPE)
        for i, t in enumerate(scheduler.timesteps):
            if i == 0:
                fastdiff.patch(scheduler)
            if i == LOOP // 2:
                fastdiff.unpatch(scheduler)
            sample = scheduler.step(output, t, sample, return_dict=False)[0]
            yield


def configurations(module: Any) -> Iterator[None]:
    """A new scheduler for each loop, with another number of steps and other betas."""
    output = torch.randn(SHAPE)
    while True:
        name = random.choice(("DDIM", "EulerDiscrete", "DPMSolverMultistep"))
        scheduler = getattr(module, f"{name}Scheduler")(beta_end=random.uniform(0.01, 0.03))
        scheduler.set_timesteps(random.randint(2, 40))
        sample = torch.randn(SHAPE)
        for t in scheduler.timesteps:
            sample = scheduler.step(output, t, scheduler.scale_model_input(sample, t), return_dict=False)[0]
            yield


def order(module: Any) -> Iterator[None]:
    """Timesteps of the schedule in a random order."""
    schedulers = module.DDIMScheduler(), module.EulerDiscreteScheduler()
    sample, output = torch.randn(SHAPE), torch.randn(SHAPE)
    while True:
        for scheduler in schedulers:
            scheduler.set_timesteps(100)
            for t in random.sample(list(scheduler.timesteps), LOOP):
                if hasattr(scheduler, "_step_index"):
                    scheduler._step_index = None  # else Euler counts on from the step before
                scheduler.step(output, t, scheduler.scale_model_input(sample, t), return_dict=False)
                yield


#: By name: the use, and whether diffusers' own classes can be put through it.
USES: dict[str, tuple[Use, bool]] = {
    "sampler": (own_sampler, False),
    "loops": (loops, True),
    "guided": (guided, True),
    "per_token": (per_token, True),
    "eta": (eta, True),
    "churn": (churn, True),
    "patching": (patching, False),
    "configurations": (configurations, True),
    "order": (order, True),
}


class Memory(NamedTuple):
    """The resident set in MiB, and the objects that the garbage collector tracks."""

    resident: float
    objects: int


class Soak(NamedTuple):
    """What a use came to: memory after a tenth of the steps and after all, and microseconds a step."""

    early: Memory
    late: Memory
    microseconds: float
    diffusers: float | None

    @property
    def growth(self) -> float:
        """MiB by which the resident set has grown."""
        return self.late.resident - self.early.resident


def memory() -> Memory:
    """Read what a process holds once garbage is collected and free memory is returned to the system.

    Raises:
        RuntimeError: the system is not Linux with glibc.
    """
    try:
        trim, statm = ctypes.CDLL(None).malloc_trim, Path("/proc/self/statm").read_text()
    except (OSError, AttributeError) as error:
        remedy = "run it on Linux with glibc, which returns free memory when it is asked to"
        raise RuntimeError(
            error_message("soak", "system", f"has no {error}", "malloc_trim and /proc", remedy)
        ) from error
    for _ in range(3):  # what one collection frees may hold what the next one does
        gc.collect()
    trim(0)
    statm = Path("/proc/self/statm").read_text()
    page = ctypes.CDLL(None).getpagesize()
    return Memory(int(statm.split()[1]) * page / 2**20, len(gc.get_objects()))


def soak(use: Use, steps: int, beside_diffusers: bool) -> Soak:
    """Take `steps` steps.

    Args:
        use: which steps.
        steps: how many, 10 or more.
        beside_diffusers: take the same steps with diffusers' own classes afterwards, at most `MOST_OF_DIFFUSERS`.

    Raises:
        RuntimeError: memory cannot be read here.
    """
    import diffusers

    import fastdiff.diffusers

    _seed()
    taken = use(fastdiff.diffusers)
    _take(taken, steps // 10)
    early = memory()
    microseconds = _take(taken, steps - steps // 10)
    late = memory()
    theirs = None
    if beside_diffusers:
        _seed()
        taken = use(diffusers)
        _take(taken, LOOP)
        theirs = _take(taken, min(steps, MOST_OF_DIFFUSERS))
    return Soak(early, late, microseconds, theirs)


def _seed() -> None:
    random.seed(0)
    torch.manual_seed(0)


def _take(taken: Iterator[None], count: int) -> float:
    """Take steps, and return microseconds a step."""
    start = time.perf_counter()
    for _ in islice(taken, count):
        pass
    return (time.perf_counter() - start) / count * 1e6


def main(arguments: Sequence[str] | None = None) -> int:
    """Print what each use came to; 1 where memory has grown."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description=str(__doc__).partition("\n")[0])
    parser.add_argument("--steps", type=int, default=STEPS, help=f"of each use, 10 or more; {STEPS} if not given")
    parser.add_argument("--only", default=",".join(USES), help="which uses, separated by commas; all if not given")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)  # in this process, without a heading
    options = parser.parse_args(arguments)
    names = options.only.split(",")
    if options.steps < 10 or not USES.keys() >= set(names):
        parser.error(f"--steps takes 10 or more, --only takes some of {','.join(USES)}")
    if options.here:
        return max(_report(name, options.steps) for name in names)
    head = ("use", "MiB at 10 %", "at 100 %", "growth", "objects at 10 %", "at 100 %", "us/step", "diffusers")
    print("{:<15}{:>12}{:>10}{:>8}{:>17}{:>10}{:>9}{:>11}".format(*head), flush=True)
    command = [sys.executable, "-m", "benchmarks.soak", "--here", "--steps", str(options.steps), "--only"]
    root = Path(__file__).parent.parent
    failed = [name for name in names if subprocess.run([*command, name], cwd=root).returncode != 0]
    if failed:
        print(f"failed: {', '.join(failed)} (more than {LIMIT:g} MiB after the first tenth, or an error above)")
    return int(bool(failed))


def _report(name: str, steps: int) -> int:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    use, beside_diffusers = USES[name]
    found = soak(use, steps, beside_diffusers)
    theirs = "" if found.diffusers is None else f"{found.diffusers:.1f}"
    print(
        f"{name:<15}{found.early.resident:>12.1f}{found.late.resident:>10.1f}{found.growth:>8.1f}"
        f"{found.early.objects:>17}{found.late.objects:>10}{found.microseconds:>9.1f}{theirs:>11}",
        flush=True,
    )
    return int(found.growth > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
