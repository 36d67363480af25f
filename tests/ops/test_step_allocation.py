# SPDX-License-Identifier: MIT
"""What a step allocates: its outputs, and nothing where those are given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fastdiff
from fastdiff.ops import backends
from support import solver_cases

pytestmark = pytest.mark.skipif(backends.extension is None, reason="the C++ extension was not built")

SHAPE = (2, 4, 40, 40)
BYTES = 4 * 2 * 4 * 40 * 40
SAMPLERS: list[tuple[str, dict[str, Any]]] = [
    *((method, {}) for method in solver_cases.METHODS),
    ("dpm_solver", {"solver_order": 3}),
    ("dpm_solver", {"solver_order": 3, "solver_mode": "singlestep"}),
    ("dpm_solver", {"algorithm_type": "sde-dpmsolver++"}),
]


def allocated(action: Callable[[], object]) -> int:
    """Bytes that torch's allocator hands out meanwhile, what is given back again included."""
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        action()
    return sum(max(event.self_cpu_memory_usage, 0) for event in profile.function_events)


def test_allocations_are_seen() -> None:
    # Otherwise the tests below could not fail.
    assert allocated(lambda: torch.empty(SHAPE)) == BYTES


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("method", "config"), SAMPLERS)
def test_a_step_in_place_allocates_nothing(method: str, config: dict[str, Any], layout: torch.memory_format) -> None:
    sampler = fastdiff.create_sampler("linear", method, num_inference_steps=7, **config)

    def like() -> Tensor:
        return torch.randn(SHAPE).contiguous(memory_format=layout)

    x, cond, uncond = like(), like(), like()
    both = torch.empty(2 * SHAPE[0], *SHAPE[1:]).contiguous(memory_format=layout)
    # A first loop allocates the registers; the second must find all there is.
    stepper = sampler.stepper(seeds=[1, 2])
    rows = len(sampler.table)
    for _ in range(rows):
        stepper.step(x, cond, uncond=uncond, guidance_scale=3.0, out=x, model_input=both)
    stepper.index = 0

    def loop() -> None:
        for _ in range(rows):
            stepper.step(x, cond, uncond=uncond, guidance_scale=3.0, out=x, model_input=both)

    assert allocated(loop) == 0


def test_a_step_elsewhere_allocates_its_output() -> None:
    stepper = fastdiff.create_sampler("linear", "ddpm", num_inference_steps=7).stepper(seeds=[1, 2])
    x = torch.randn(SHAPE)
    x = stepper.step(x, x)
    assert allocated(lambda: stepper.step(x, x)) == BYTES
