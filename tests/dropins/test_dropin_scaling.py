# SPDX-License-Identifier: MIT
"""`scale_model_input` between the steps: one multiplication once its factor is known, and that factor alone."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor

import fastdiff.diffusers
from fastdiff.diffusers.compiler.plan import Fallback
from support.oracle import assert_same_bits

NAMES = ("EulerDiscrete", "EulerAncestralDiscrete", "HeunDiscrete", "KDPM2Discrete", "KDPM2AncestralDiscrete",
         "LMSDiscrete", "EDMEuler", "EDMDPMSolverMultistep", "CMStochasticIterative")  # fmt: skip


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def loop(scheduler: Any, dtype: torch.dtype, touch: int | None = None) -> list[Tensor]:
    """What a loop's model inputs and samples are; before step `touch` the schedule is written."""
    scheduler.set_timesteps(6)
    x = torch.randn(2, 4, 5, generator=seeded(1)).to(dtype) * 3
    outputs = torch.randn(len(scheduler.timesteps), 2, 4, 5, generator=seeded(2)).to(dtype)
    found = []
    for i, (timestep, output) in enumerate(zip(scheduler.timesteps, outputs, strict=True)):
        if i == touch:
            scheduler.sigmas[scheduler.step_index] *= 1.5
        found.append(scheduler.scale_model_input(x, timestep))
        extra = {"generator": seeded(i)} if "generator" in scheduler.arguments_of_step else {}
        x = scheduler.step(output, timestep, x, return_dict=False, **extra)[0]
        found.append(x)
    return found


def made(cls: Any) -> Any:
    scheduler = cls()
    scheduler.arguments_of_step = tuple(inspect.signature(scheduler.step).parameters)
    return scheduler


@pytest.mark.parametrize("touch", [None, 3], ids=["as it is", "sigmas written"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_model_inputs_are_those_of_diffusers(name: str, dtype: torch.dtype, touch: int | None) -> None:
    cls = fastdiff.diffusers.CLASSES[f"{name}Scheduler"]
    ours = made(cls)
    loop(ours, dtype)  # the second loop knows its factors
    theirs, found = loop(made(cls.original), dtype, touch), loop(ours, dtype, touch)
    # A half sample is rounded once in both, from a factor rounded to float32 or not; the loop carries that on.
    tolerance = 3e-4 if dtype == torch.float32 else 2e-2
    for a, b in zip(theirs, found, strict=True):
        assert a.dtype == b.dtype
        assert float(((a.double() - b.double()).abs() / a.double().abs().clamp(min=1)).max()) < tolerance


@pytest.mark.parametrize("name", ["EulerDiscrete", "HeunDiscrete"])
def test_the_factor_is_known_in_the_second_loop(name: str) -> None:
    scheduler = made(fastdiff.diffusers.CLASSES[f"{name}Scheduler"])
    first = loop(scheduler, torch.float32)
    plans = [plan for plan in scheduler._fused.plan_cache.plans.values() if not isinstance(plan, Fallback)]
    assert sum(plan.next_scale is not None for plan in plans) >= 4
    again = loop(scheduler, torch.float32)
    for a, b in zip(first, again, strict=True):
        torch.testing.assert_close(a, b, rtol=3e-7, atol=0)  # one rounding of the factor more or less


def test_noise_of_seeds_counts_steps_alone() -> None:
    results = []
    for scales in (False, True):
        scheduler = fastdiff.diffusers.EulerAncestralDiscreteScheduler()
        scheduler.set_timesteps(5)
        scheduler.is_scale_input_called = True
        scheduler.use_philox([1, 2])
        x = torch.randn(2, 4, 5, generator=seeded(1))
        for timestep in scheduler.timesteps:
            if scales:
                scheduler.scale_model_input(x, timestep)
            x = scheduler.step(x * 0.1, timestep, x, return_dict=False)[0]
        results.append(x)
    assert_same_bits([results[0]], [results[1]])
