# SPDX-License-Identifier: MIT
"""`scale_model_input` between the steps: the tensor that the step before wrote beside its sample, or one pass."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

import fastdiff.diffusers
from fastdiff.diffusers.compiler.plan import Fallback
from fastdiff.ops import backends
from support.oracle import assert_same_bits
from support.recorded_operators import RecordedOperators

NAMES = ("EulerDiscrete", "EulerAncestralDiscrete", "HeunDiscrete", "KDPM2Discrete", "KDPM2AncestralDiscrete",
         "LMSDiscrete", "EDMEuler", "EDMDPMSolverMultistep", "CMStochasticIterative")  # fmt: skip


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def loop(scheduler: Any, dtype: torch.dtype, touch: int | None = None) -> list[Tensor]:
    """Return a loop's model inputs and samples; the schedule is written before step `touch`."""
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
def test_model_inputs_equal_diffusers(name: str, dtype: torch.dtype, touch: int | None) -> None:
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
def test_factor_is_cached_for_second_loop(name: str) -> None:
    scheduler = made(fastdiff.diffusers.CLASSES[f"{name}Scheduler"])
    first = loop(scheduler, torch.float32)
    plans = [plan for plan in scheduler._fused.plan_cache.plans.values() if not isinstance(plan, Fallback)]
    assert sum(bool(plan.scalings) for plan in plans) >= 4
    again = loop(scheduler, torch.float32)
    for a, b in zip(first, again, strict=True):
        torch.testing.assert_close(a, b, rtol=3e-7, atol=0)  # one rounding of the factor more or less


def written_unnoticed(sample: Tensor) -> None:
    """Write to a tensor in a way that torch does not count: what was computed from it before shows."""
    sample.data.mul_(2)


def is_handed_out(scheduler: Any, sample: Tensor, timestep: Tensor) -> bool:
    """Return whether `scale_model_input` gives what the step before wrote, rather than take a pass of its own."""
    written_unnoticed(sample)
    result = scheduler.scale_model_input(sample, timestep)
    sample.data.mul_(0.5)
    fresh = scheduler.scale_model_input(sample, timestep)
    assert torch.equal(result, fresh) or torch.equal(result, 2 * fresh)
    return torch.equal(result, fresh)


class Walk:
    """A loop, call by call, of a scheduler that has run the same loop before.

    Args:
        name: of the class.
        shape, dtype: of the samples.
        scaled: loops before this one scale each sample.
    """

    def __init__(
        self, name: str, shape: tuple[int, ...] = (2, 4, 5), dtype: torch.dtype = torch.float32, *, scaled: bool = True
    ) -> None:
        self.scheduler = made(fastdiff.diffusers.CLASSES[f"{name}Scheduler"])
        self.outputs = torch.randn(20, *shape, generator=seeded(2)).to(dtype)
        self.start = torch.randn(shape, generator=seeded(1)).to(dtype) * 3
        for _ in range(3):
            self.begin()
            for _ in self.scheduler.timesteps:
                if scaled:
                    self.scheduler.scale_model_input(self.sample, self.timestep)
                self.step()
        self.begin()

    def begin(self) -> None:
        self.scheduler.set_timesteps(6)
        self.place, self.sample = 0, self.start

    @property
    def timestep(self) -> Tensor:
        timestep: Tensor = self.scheduler.timesteps[min(self.place, len(self.scheduler.timesteps) - 1)]
        return timestep

    def step(self, count: int = 1) -> Tensor:
        """Take steps, each with its sample scaled before, except the first."""
        for i in range(count):
            if i:
                self.scheduler.scale_model_input(self.sample, self.timestep)
            extra = {"generator": seeded(self.place)} if "generator" in self.scheduler.arguments_of_step else {}
            self.scheduler.is_scale_input_called = True
            output = self.outputs[self.place]
            self.sample = self.scheduler.step(output, self.timestep, self.sample, return_dict=False, **extra)[0]
            self.place += 1
        return self.sample

    def scaled(self, sample: Tensor | None = None) -> Tensor:
        result: Tensor = self.scheduler.scale_model_input(self.sample if sample is None else sample, self.timestep)
        return result


in_cpp = pytest.mark.skipif(backends.extension is None, reason="the Python twin is tested beside the C++ cache")


@in_cpp
@pytest.mark.parametrize("name", NAMES)
def test_step_writes_next_model_input(name: str) -> None:
    walk = Walk(name)
    walk.scaled()
    for _ in range(4):
        walk.step()
        assert is_handed_out(walk.scheduler, walk.sample, walk.timestep)


@in_cpp
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_model_input_has_bits_of_own_pass(name: str, dtype: torch.dtype) -> None:
    walk = Walk(name, dtype=dtype)
    walk.step()
    handed, alone = walk.scaled(), walk.scaled(walk.sample.clone())
    assert torch.equal(handed, alone)
    assert handed.dtype == alone.dtype == dtype
    again = walk.scaled()
    assert torch.equal(handed, again)
    assert handed.data_ptr() != again.data_ptr() != walk.sample.data_ptr()
    # Written to, it changes nothing else.
    sample = walk.sample.clone()
    handed.fill_(7)
    assert torch.equal(walk.scaled(), again)
    assert torch.equal(walk.sample, sample)
    twin = Walk(name, dtype=dtype)
    twin.step(2)
    assert torch.equal(walk.step(), twin.sample)


@in_cpp
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_model_input_is_as_near_to_float64_as_diffusers(name: str, dtype: torch.dtype) -> None:
    """The project's rule: the error to float64 is at most diffusers' plus a unit in the last place."""
    walk, theirs = Walk(name, dtype=dtype), made(fastdiff.diffusers.CLASSES[f"{name}Scheduler"].original)
    theirs.set_timesteps(6)
    for place in range(5):
        walk.step()
        extra = {"generator": seeded(place)} if "generator" in walk.scheduler.arguments_of_step else {}
        if place == 0:
            theirs.scale_model_input(walk.start, theirs.timesteps[0])
        theirs.step(walk.outputs[place], theirs.timesteps[place], walk.start, return_dict=False, **extra)
        peer = theirs.scale_model_input(walk.sample, theirs.timesteps[place + 1])
        exact_scheduler = copy.copy(theirs)
        for array in ("sigmas", "sigmas_interpol"):
            if hasattr(theirs, array):
                setattr(exact_scheduler, array, getattr(theirs, array).double())
        exact = exact_scheduler.scale_model_input(walk.sample.double(), theirs.timesteps[place + 1])
        ulp = torch.finfo(dtype).eps * 2.0 ** torch.floor(torch.log2(exact.abs()))
        error = (walk.scaled().double() - exact).abs()
        assert bool((error <= (peer.double() - exact).abs() + ulp).all())


def _written(walk: Walk) -> None:
    walk.sample.mul_(1.5)


def _sigmas_written(walk: Walk) -> None:
    walk.scheduler.sigmas.mul_(1.25)
    if hasattr(walk.scheduler, "sigmas_interpol"):
        walk.scheduler.sigmas_interpol.mul_(1.25)


@in_cpp
@pytest.mark.parametrize("change", [_written, _sigmas_written], ids=["sample written", "sigmas written"])
@pytest.mark.parametrize("name", NAMES)
def test_model_input_follows_change_between(name: str, change: Callable[[Walk], None]) -> None:
    walk, twin = Walk(name), Walk(name)
    for each in (walk, twin):
        each.step(3)
    before = twin.scaled()
    for each in (walk, twin):
        change(each)
    wanted = twin.scheduler.original.scale_model_input(twin.scheduler, twin.sample, twin.timestep)
    assert not torch.allclose(before, wanted, rtol=1e-3)
    torch.testing.assert_close(walk.scaled(), wanted, rtol=3e-7, atol=0)  # one rounding of the factor more or less


@in_cpp
def test_model_input_is_recorded_by_autograd_and_seen_by_modes() -> None:
    walk = Walk("EulerDiscrete")
    walk.step()
    walk.sample.requires_grad_()
    walk.scaled().sum().backward()
    assert walk.sample.grad is not None
    assert bool((walk.sample.grad > 0).all())
    walk.sample.requires_grad_(False)
    walk.sample = walk.sample.detach()
    walk.step()
    with RecordedOperators() as seen:
        walk.scaled()
    assert seen.names, "the mode has seen no operator"


@in_cpp
def test_only_own_sample_and_timestep_are_handed_out() -> None:
    walk = Walk("EulerDiscrete")
    walk.step()
    before = walk.scheduler.timesteps[0]  # the factor is that of the step index, as in diffusers
    assert not is_handed_out(walk.scheduler, walk.sample, before)
    assert is_handed_out(walk.scheduler, walk.sample, walk.timestep)
    walk.step()
    assert not is_handed_out(walk.scheduler, walk.sample.clone(), walk.timestep)
    assert not is_handed_out(walk.scheduler, walk.sample.view_as(walk.sample), walk.timestep)
    walk.step()
    with torch.inference_mode():
        walk.step()
        assert not is_handed_out(walk.scheduler, walk.sample, walk.timestep)


@in_cpp
def test_model_input_is_written_only_where_it_is_asked_for() -> None:
    """One that is not asked for is the last one that is written, until a step's own sample is scaled again."""
    walk = Walk("EulerDiscrete", scaled=True)
    walk.step()
    assert is_handed_out(walk.scheduler, walk.sample, walk.timestep)
    walk.step()  # writes one that is not asked for
    walk.step()
    assert not is_handed_out(walk.scheduler, walk.sample, walk.timestep)
    walk.step()
    assert is_handed_out(walk.scheduler, walk.sample, walk.timestep)
    never = Walk("EulerDiscrete", scaled=False)
    never.step()
    assert not is_handed_out(never.scheduler, never.sample, never.timestep)


@in_cpp
@pytest.mark.parametrize("layout", ["channels_last", "transposed", "one sample", "one number"])
def test_model_input_in_other_layouts(layout: str) -> None:
    """Memory that is no run of elements a sample has no model input beside it: one pass gives it."""
    shape = {"one sample": (1, 4, 6, 8), "one number": (1,)}.get(layout, (2, 4, 6, 8))
    walk, twin = Walk("EulerDiscrete", shape), Walk("EulerDiscrete", shape)
    if layout == "channels_last":
        walk.start = walk.start.to(memory_format=torch.channels_last)
    if layout == "transposed":
        walk.start = walk.start.transpose(0, 1).contiguous().transpose(0, 1)
    for each in (walk, twin):
        each.begin()
        each.step(3)
    assert is_handed_out(walk.scheduler, walk.sample, walk.timestep) == (layout != "transposed")
    assert torch.equal(walk.scaled(), twin.scaled())
    assert torch.equal(walk.step(), twin.step())


@in_cpp
def test_dropped_sample_frees_its_memory() -> None:
    """The cache compares the sample by identity and keeps no reference to its memory."""
    walk = Walk("EulerDiscrete")
    walk.step()
    storage = StorageWeakRef(walk.sample.untyped_storage())
    assert not storage.expired()
    walk.sample = walk.start
    assert storage.expired()


def test_seeded_noise_counts_only_steps() -> None:
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
