# SPDX-License-Identifier: MIT
"""What a drop-in brings to a device: each row once, without a wait, and nothing in the loops after the first.

Without a device here: copies are recorded on their way, to a device without memory.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fastdiff.diffusers
from fastdiff import device_copy
from fastdiff.diffusers.compiler.plan import Plan
from fastdiff.diffusers.runtime import guards, plan_cache, scheduler_cache
from fastdiff.noise import torch_normals
from fastdiff.ops import backends
from support.dropin_helpers import forget_plans, quiet

META = torch.device("meta")


@pytest.fixture
def uploads(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """Record the shape of each tensor that is copied from the host to a device."""
    shapes: list[torch.Size] = []
    to_device = device_copy.to_device

    def record(tensor: Tensor, device: torch.device | str) -> Tensor:
        if torch.device(device).type != "cpu":
            shapes.append(tensor.shape)
        return to_device(tensor, device)

    for module in (device_copy, torch_normals):
        monkeypatch.setattr(module, "to_device", record)
    return shapes


def plans_of_loop() -> list[Plan]:
    forget_plans()
    scheduler = fastdiff.diffusers.EulerDiscreteScheduler()
    for _ in range(2):
        scheduler.set_timesteps(4)
        sample = torch.ones(2, 3, 4)
        for timestep in scheduler.timesteps:
            scheduler.scale_model_input(sample, timestep)
            sample = scheduler.step(sample, timestep, sample, return_dict=False)[0]
    return [plan for plan in scheduler._fused.plan_cache.plans.values() if isinstance(plan, Plan)]


def test_row_is_uploaded_once(uploads: list[torch.Size]) -> None:
    plans = plans_of_loop()
    assert len(plans) >= 4
    assert not uploads
    for _ in range(3):  # the first loop on the device, and two after it
        for plan in plans:
            assert plan.table(META).device == META
    assert uploads == [torch.Size([1, 32])] * len(plans)


@pytest.mark.skipif(backends.extension is None, reason="the native executor's tables")
def test_row_of_native_executor_is_uploaded_once(uploads: list[torch.Size]) -> None:
    plans = plans_of_loop()
    for _ in range(3):
        for plan in plans:
            assert plan.native.table("meta").device == META
            assert torch.equal(plan.native.table("cpu"), plan.host_table)
    assert uploads == [torch.Size([1, 32])] * len(plans)


def test_noise_of_cpu_generator_is_uploaded_once(uploads: list[torch.Size], monkeypatch: pytest.MonkeyPatch) -> None:
    for generator in (torch.Generator(), [torch.Generator(), torch.Generator()]):
        uploads.clear()
        drawn = torch_normals.randn_like_diffusers((2, 3, 4), generator, META, torch.float32)
        assert drawn.device == META
        assert uploads == [torch.Size([2, 3, 4])]


class OnDevice:
    """Stands for reads of arrays on a device: it counts the waits for them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reads = 0
        of = guards.HostCopy.of
        monkeypatch.setattr(guards.HostCopy, "of", classmethod(lambda cls, tensor: self._read(of, tensor)))
        monkeypatch.setattr(plan_cache, "_HOST", ("meta",))  # arrays on the CPU are taken for arrays on a device

    def _read(self, of: Any, tensor: Tensor) -> Any:
        self.reads += 1
        return of(tensor)


@pytest.mark.parametrize("name", ["DDIM", "EulerDiscrete", "UniPCMultistep"])
def test_arrays_on_device_are_read_when_timesteps_are_set(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model is at work on the device before the first step, so that a read there would wait for it."""
    device = OnDevice(monkeypatch)
    scheduler = fastdiff.diffusers.CLASSES[f"{name}Scheduler"]()
    scheduler_cache.cache_of(scheduler)
    for loop in range(3):
        with quiet():
            scheduler.set_timesteps(4)
        read, device.reads = device.reads, 0
        assert read >= 1
        assert loop == 0 or read <= 2  # the others are as they were
        sample = torch.ones(2, 3, 4)
        for timestep in scheduler.timesteps:
            sample = scheduler.step(sample, timestep, sample, return_dict=False)[0]
        assert device.reads == 0
        copies = scheduler._fused._copies
        assert scheduler._fused.plan_cache.host["timesteps"] is copies["timesteps"].host or loop > 0


def test_invalidate_drops_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    OnDevice(monkeypatch)
    scheduler = fastdiff.diffusers.DDIMScheduler()
    scheduler_cache.cache_of(scheduler)
    scheduler.set_timesteps(4)
    assert scheduler._fused._copies
    assert scheduler.stepper()._fused._copies == scheduler._fused._copies
    scheduler.invalidate()
    assert not scheduler._fused._copies
