# SPDX-License-Identifier: MIT
"""What each cache of the drop-ins buys: the time of a loop with it, and with it emptied before each use.

    python -m benchmarks.cache_levels [--steps 20] [--size 8] [--loops 200]

Prints the mean time of a step, in µs, over a loop from its first step on; medians over loops, the cases in turn.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

import fastdiff.diffusers
from fastdiff.diffusers.runtime.lookup import forget_plans
from fastdiff.diffusers.runtime.plan_cache import PLANS
from fastdiff.diffusers.runtime.scheduler_cache import cache_of, forget_first_steps

CLASSES = ("DDIM", "DPMSolverMultistep", "EulerDiscrete", "UniPCMultistep")


def _nothing(scheduler: Any) -> None:
    return None


def _drop_next_step(scheduler: Any) -> None:
    cache_of(scheduler).forget()


def _drop_first_steps(scheduler: Any) -> None:
    forget_first_steps()


def _drop_plans(scheduler: Any) -> None:
    """Drop plans and keep traces: the scheduler's numbers are computed again."""
    _drop_next_step(scheduler)
    forget_first_steps()
    PLANS.schedules.clear()
    cache_of(scheduler).plan_cache = None


def _drop_everything(scheduler: Any) -> None:
    _drop_plans(scheduler)
    forget_plans()


#: By case: what is dropped before the loop, and before each step of it.
CASES: dict[str, tuple[Callable[[Any], None], Callable[[Any], None]]] = {
    "all caches": (_nothing, _nothing),
    "no first steps": (_drop_first_steps, _nothing),
    "no first and next steps": (_drop_first_steps, _drop_next_step),
    "no plans either": (_drop_plans, _drop_plans),
    "no traces either": (_drop_everything, _drop_everything),
}


def time_loop(scheduler: Any, steps: int, sample: torch.Tensor, output: torch.Tensor, case: str) -> float:
    """Return the mean time of a step in µs; what is dropped is dropped outside of the time."""
    before_loop, before_step = CASES[case]
    scheduler.set_timesteps(steps)
    scheduler.is_scale_input_called = True
    before_loop(scheduler)
    total = 0.0
    for timestep in scheduler.timesteps:
        before_step(scheduler)
        started = time.perf_counter()
        sample = scheduler.step(output, timestep, sample, return_dict=False)[0]
        total += time.perf_counter() - started
    return total / len(scheduler.timesteps) * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.cache_levels", description=__doc__)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--size", type=int, default=8, help="height and width of a sample of 4 channels")
    parser.add_argument("--loops", type=int, default=200)
    options = parser.parse_args()
    torch.set_num_threads(1)
    sample, output = torch.randn(2, 1, 4, options.size, options.size)
    shape = f"1×4×{options.size}×{options.size}"
    print(f"µs a step, {options.steps} steps, {shape} float32, one thread, torch {torch.__version__}")
    print(f"{'':24}" + "".join(f"{name:>20}" for name in CLASSES))
    found: dict[str, list[float]] = {case: [] for case in CASES}
    for name in CLASSES:
        scheduler = fastdiff.diffusers.CLASSES[f"{name}Scheduler"]()
        times: dict[str, list[float]] = {case: [] for case in CASES}
        for loop in range(options.loops):
            for case in CASES:
                if case.startswith("no traces") and loop % 20:
                    continue  # some milliseconds a step
                for again in range(2):  # the first one fills the caches that the case before has emptied
                    figure = time_loop(scheduler, options.steps, sample, output, "all caches" if not again else case)
                times[case].append(figure)
        for case in CASES:
            found[case].append(statistics.median(times[case][1:]))
    for case, figures in found.items():
        print(f"{case:24}" + "".join(f"{figure:20.1f}" for figure in figures))


if __name__ == "__main__":
    main()
