# SPDX-License-Identifier: MIT
"""Loops of drop-in schedulers on a real GPU: launches a step, no wait for the device, and the bits of the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fastdiff.diffusers
from support.gpu_helpers import kernels_of
from support.oracle import assert_same_bits

pytestmark = pytest.mark.gpu

STEPS = 8
SCALING = ("EulerDiscrete", "HeunDiscrete", "KDPM2Discrete", "LMSDiscrete", "EDMEuler")
NAMES = ("DDIM", "DPMSolverMultistep", "UniPCMultistep", "DEISMultistep", "PNDM", *SCALING)


def loop(scheduler: Any, device: str, outputs: Tensor) -> Tensor:
    scheduler.set_timesteps(STEPS, device=device)
    return walk(scheduler, outputs)


def walk(scheduler: Any, outputs: Tensor) -> Tensor:
    """Run the steps of a loop whose timesteps are set, each with its model input scaled before it."""
    sample = outputs[-1]
    for timestep, output in zip(scheduler.timesteps, outputs, strict=False):
        scheduler.scale_model_input(sample, timestep)
        sample = scheduler.step(output, timestep, sample, return_dict=False)[0]
    return sample


def outputs_on(device: str) -> Tensor:
    return torch.randn(2 * STEPS + 1, 2, 4, 16, 16, generator=torch.Generator().manual_seed(0)).to(device)


@pytest.mark.parametrize("name", NAMES)
def test_dropin_loop_waits_for_device_nowhere(name: str) -> None:
    scheduler = fastdiff.diffusers.CLASSES[f"{name}Scheduler"]()
    on_device = outputs_on("cuda")
    for _ in range(3):  # plans, kernels and tables
        loop(scheduler, "cuda", on_device)
    scheduler.set_timesteps(STEPS, device="cuda")
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        sample = walk(scheduler, on_device)
    finally:
        torch.cuda.set_sync_debug_mode(before)
    twin = fastdiff.diffusers.CLASSES[f"{name}Scheduler"]()
    assert_same_bits([sample.cpu()], [loop(twin, "cpu", outputs_on("cpu"))])


@pytest.mark.parametrize("name", SCALING)
def test_dropin_step_and_its_model_input_are_one_kernel(name: str) -> None:
    scheduler = fastdiff.diffusers.CLASSES[f"{name}Scheduler"]()
    outputs = outputs_on("cuda")
    for _ in range(4):
        loop(scheduler, "cuda", outputs)
    scheduler.set_timesteps(STEPS, device="cuda")
    kernels = kernels_of(lambda: walk(scheduler, outputs))
    # One more for the model input before the first step.
    assert len(kernels) == len(scheduler.timesteps) + 1, kernels


def test_dropin_loops_on_two_streams_share_tables() -> None:
    """A row is copied to the device on one stream without a wait; a step on another stream comes after the copy."""
    outputs = outputs_on("cuda")
    wanted = loop(fastdiff.diffusers.EulerDiscreteScheduler(timestep_spacing="trailing"), "cpu", outputs_on("cpu"))
    first, second = torch.cuda.Stream(), torch.cuda.Stream()
    torch.cuda.synchronize()
    found = []
    for stream in (first, second):
        with torch.cuda.stream(stream):
            torch.cuda._sleep(100_000_000)
            scheduler = fastdiff.diffusers.EulerDiscreteScheduler(timestep_spacing="trailing")
            found.append(loop(scheduler, "cuda", outputs))
    torch.cuda.synchronize()
    assert_same_bits([each.cpu() for each in found], [wanted, wanted])
