# SPDX-License-Identifier: MIT
"""A step in the middle of a loop: in C++ from the method on, and no torch operator beside a draw of torch's noise."""

from __future__ import annotations

import collections
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import fastdiff
import fastdiff.diffusers
from fastdiff.diffusers import CLASSES
from fastdiff.ops import backends
from support.dropin_helpers import LAST_IS_NO_STEP, quiet

pytestmark = pytest.mark.skipif(backends.extension is None, reason="the steps are C++ with the extension alone")

STEPS = 7
#: The first calls of a loop, which may read seeds or be looked up; CogVideoXDPM's second call has other arguments.
WARM_UP = {"CogVideoXDPM": 2}
#: (class, method): why calls in the middle of a loop run Python.
EXCEPTIONS = {
    ("CosineDPMSolverMultistep", "step"): "its noise is an increment of a Brownian tree",
    ("DPMSolverSDE", "step"): "its noise is an increment of a Brownian tree",
    ("RePaint", "step"): "two parts are blended by a mask",
    ("ConsistencyDecoder", "scale_model_input"): "it multiplies by an array's entry at the timestep's value",
}
#: Operators of torch that launch nothing.
ALLOCATIONS = ("aten::empty", "aten::empty_strided")
#: A draw of torch's noise, where the extension does not draw torch's numbers itself.
DRAW = ("aten::randn", "aten::normal_")
PACKAGE = str(Path(fastdiff.__file__).parent)
METHODS = ("scale_model_input", "step")


class Loop:
    """Loops of one scheduler on fixed tensors.

    Args:
        name: of the class.
        guided: by `guided_step`.
        seeded: noise from the samples' seeds.
        options: of the scheduler.
    """

    def __init__(self, name: str, guided: bool, seeded: bool, **options: Any) -> None:
        self.name, self.guided = name, guided
        with quiet():
            options |= {"noise_sampler_seed": 0} if name == "DPMSolverSDE" else {}
            self.scheduler = CLASSES[f"{name}Scheduler"](**options)
        if seeded:
            self.scheduler.use_philox([5, 6])
        random = torch.Generator().manual_seed(0)
        self.sample, self.output, self.uncond, self.other = torch.randn(4, 2, 3, 8, 8, generator=random)
        self.mask = (self.other > 0).float()
        self.generator = torch.Generator().manual_seed(1)
        self.samples: list[Tensor] = []

    def run(self, call: Callable[[str, int, Callable[[], Any]], Any]) -> None:
        """Run a loop; `call` is given each method, the step's index and the call to make."""
        scheduler = self.scheduler
        with quiet():
            scheduler.set_timesteps(2 if self.name in ("SCM", "ConsistencyDecoder") else STEPS)
            timesteps = list(scheduler.timesteps)
            if self.name in LAST_IS_NO_STEP:
                timesteps = timesteps[:-1]
            if self.name == "DDPMWuerstchen":
                timesteps = [t[None] for t in timesteps]
            self.samples = [self.sample]
            for i, timestep in enumerate(timesteps):
                sample = self.samples[-1]
                if hasattr(scheduler, "scale_model_input"):
                    call("scale_model_input", i, lambda s=sample, t=timestep: scheduler.scale_model_input(s, t))
                back = timesteps[i - 1] if i else None
                self.samples.append(call("step", i, lambda s=sample, t=timestep, b=back: self._step(s, t, b))[0])

    def _step(self, sample: Tensor, timestep: Any, back: Any) -> Any:
        scheduler, output = self.scheduler, self.output
        extra: dict[str, Any] = {"return_dict": False}
        if "generator" in scheduler.arguments["step"]:
            extra["generator"] = self.generator
        if self.name == "RePaint":
            extra |= {"original_image": self.other, "mask": self.mask}
        if self.name == "CogVideoXDPM":
            return scheduler.step(output, None if back is None else self.other, timestep, back, sample, **extra)
        if self.guided:
            return scheduler.guided_step(self.uncond, output, 3.0, timestep, sample, **extra)
        return scheduler.step(output, timestep, sample, **extra)

    def is_mid_loop(self, i: int) -> bool:
        return i >= WARM_UP.get(self.name, 1)


def frames_of(call: Callable[[], Any]) -> tuple[Any, list[str]]:
    """Return a call's result and the Python functions of the package that it entered."""
    entered: list[str] = []

    def note(frame: Any, event: str, argument: Any) -> None:
        path = frame.f_code.co_filename
        # A method that takes a step is made from a string, with the signature of diffusers' own.
        if event == "call" and (path.startswith(PACKAGE) or path == "<string>"):
            entered.append(f"{Path(path).name}:{frame.f_code.co_name}")

    sys.setprofile(note)
    try:
        return call(), entered
    finally:
        sys.setprofile(None)


CASES = [
    pytest.param(name, guided, seeded, id=f"{name}-{'guided' if guided else 'plain'}-{'philox' if seeded else 'torch'}")
    for name in sorted(each.removesuffix("Scheduler") for each in CLASSES)
    for guided in (False, True)
    for seeded in (False, True)
    if not (guided and name == "CogVideoXDPM")
]


@pytest.mark.parametrize(("name", "guided", "seeded"), CASES)
def test_mid_loop_calls_enter_no_python(name: str, guided: bool, seeded: bool) -> None:
    loop = Loop(name, guided, seeded)
    for _ in range(3):  # plans, what follows them, and what scales after them
        loop.run(lambda method, i, call: call())
    entered: dict[str, list[list[str]]] = collections.defaultdict(list)

    def count(method: str, i: int, call: Callable[[], Any]) -> Any:
        result, frames = frames_of(call)
        if loop.is_mid_loop(i):
            entered[method].append(frames)
        return result

    loop.run(count)
    assert entered["step"] or name in ("SCM",)
    for method, calls in entered.items():
        if (name, method) in EXCEPTIONS:
            assert any(len(frames) > 1 for frames in calls), f"{method} is no exception any more"
            continue
        for frames in calls:
            # A class whose `scale_model_input` returns its argument has diffusers' own method.
            assert len(frames) == (method in loop.scheduler.stepping), (method, frames)


@pytest.mark.parametrize(("name", "guided", "seeded"), CASES)
def test_mid_loop_calls_dispatch_no_operator(name: str, guided: bool, seeded: bool) -> None:
    """On a GPU each operator on a sample is a launch more, and each upload of a number a copy."""
    loop = Loop(name, guided, seeded)
    for _ in range(3):
        loop.run(lambda method, i, call: call())
    calls: list[tuple[str, Callable[[], Any]]] = []

    def count(method: str, i: int, call: Callable[[], Any]) -> Any:
        if not loop.is_mid_loop(i) or (name, method) in EXCEPTIONS:
            return call()
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            result = call()
        names = [event.name for event in profiler.events() or []]
        operators = [each for each in names if each.startswith(("aten::", "fastdiff::")) and each not in ALLOCATIONS]
        drawn = method == "step" and not seeded
        assert [each for each in operators if not (drawn and each in DRAW)] == [], (method, i)
        assert operators.count("aten::randn") <= 1 + (name == "CogVideoXDPM"), (method, i)
        calls.append((method, call))
        return result

    loop.run(count)
    expected = {method for method in METHODS if (name, method) not in EXCEPTIONS and name != "SCM"}
    if not hasattr(loop.scheduler, "scale_model_input"):
        expected.discard("scale_model_input")
    assert expected <= {method for method, _ in calls}


@pytest.mark.parametrize("seeded", [False, True], ids=["torch", "philox"])
def test_sa_solver_keeps_its_noise_in_cpp(seeded: bool) -> None:
    """SASolver keeps a step's noise, so that it has to be a tensor: the numbers are those of the Python executor."""
    loop, twin = Loop("SASolver", False, seeded), Loop("SASolver", False, seeded)
    for _ in range(2):
        for each in (loop, twin):
            each.generator.manual_seed(1)
        loop.run(lambda method, i, call: call())
        with fastdiff.ops.use_backend("cpu"):  # a forced backend is for the Python executor
            twin.run(lambda method, i, call: call())
        assert all(torch.equal(a, b) for a, b in zip(loop.samples, twin.samples, strict=True))


@pytest.mark.parametrize("seeded", [False, True], ids=["torch", "philox"])
@pytest.mark.parametrize("guided", [False, True], ids=["plain", "guided"])
@pytest.mark.parametrize(
    ("name", "kind"),
    [("DDPM", "learned"), ("DDPM", "learned_range"), ("UnCLIP", "learned_range"), ("DPMSolverMultistep", "learned")],
)
def test_learned_variance_stays_in_cpp(name: str, kind: str, guided: bool, seeded: bool) -> None:
    """The model's output has twice the channels, whose second half is the variance; DPM-Solver drops it."""
    loop, twin = (Loop(name, guided, seeded, variance_type=kind) for _ in range(2))
    for each in (loop, twin):
        second = each.output.abs().tanh() if kind == "learned" else each.output.tanh()
        each.output, each.uncond = (torch.cat([half, second], 1) for half in (each.output, each.uncond))
    for _ in range(2):
        loop.run(lambda method, i, call: call())
    for each in (loop, twin):
        each.generator.manual_seed(1)
    with fastdiff.ops.use_backend("cpu"):  # a forced backend is for the Python executor
        twin.run(lambda method, i, call: call())

    def count(method: str, i: int, call: Callable[[], Any]) -> Any:
        result, frames = frames_of(call)
        assert method != "step" or i == 0 or len(frames) == 1, frames
        return result

    loop.run(count)
    assert all(torch.equal(a, b) for a, b in zip(loop.samples, twin.samples, strict=True))
