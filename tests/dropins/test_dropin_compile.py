# SPDX-License-Identifier: MIT
"""Drop-in schedulers inside compiled functions: one graph wherever diffusers' class gives one."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from support.dropin_helpers import CLASSES, quiet

X = torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(0))
#: Their steps take more than an output, a timestep and a sample, or draw from a sampler made by the step.
_LEFT_OUT = ("RePaint", "CogVideoXDPM", "SCM", "ConsistencyDecoder", "DPMSolverSDE", "CosineDPMSolverMultistep")
NAMES = [name for name in CLASSES if name.removesuffix("Scheduler") not in _LEFT_OUT]


def two_steps(scheduler_class: Any, *, step: str = "step", **more: Any) -> Callable[[Tensor], Tensor]:
    scheduler = scheduler_class()
    scheduler.set_timesteps(4)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)
    arguments: dict[str, Any] = more
    if "return_dict" in inspect.signature(scheduler_class.step).parameters:
        arguments["return_dict"] = False
    wuerstchen = "Wuerstchen" in scheduler_class.__name__

    def loop(x: Tensor) -> Tensor:
        for t in scheduler.timesteps[:2]:
            t = t.expand(1) if wuerstchen else t
            if hasattr(scheduler, "scale_model_input"):
                scheduler.scale_model_input(x, t)
            if step == "step":
                x = scheduler.step(x.tanh(), t, x, **arguments)[0]
            else:
                x = scheduler.guided_step(x.sin(), x.tanh(), 2.0, t, x, **arguments)[0]
        return x

    return loop


def compiled(loop: Callable[[Tensor], Tensor], *, fullgraph: bool = True) -> Tensor | str:
    """What a compiled loop gives, or the kind of error that compiling it raises."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    try:
        with quiet():
            return torch.compile(loop, backend="eager", fullgraph=fullgraph)(X)
    except Exception as error:
        return type(error).__name__


@pytest.mark.parametrize("name", NAMES)
def test_a_loop_is_one_graph_where_diffusers_gives_one(name: str) -> None:
    ours, theirs = CLASSES[name], CLASSES[name].original
    wanted = compiled(two_steps(theirs))
    found = compiled(two_steps(ours))
    assert isinstance(found, str) == isinstance(wanted, str), (found, wanted)
    if isinstance(wanted, Tensor) and isinstance(found, Tensor):
        assert torch.equal(found, wanted)
        torch.manual_seed(0)
        with quiet():
            eager = two_steps(ours)(X)
        torch.testing.assert_close(found, eager, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("rescale", [0.0, 0.7])
@pytest.mark.parametrize("name", ["DPMSolverMultistepScheduler", "FlowMatchEulerDiscreteScheduler"])
def test_a_guided_loop_is_one_graph(name: str, rescale: float) -> None:
    found = compiled(two_steps(CLASSES[name], step="guided_step", guidance_rescale=rescale))
    assert isinstance(found, Tensor), found
    eager = two_steps(CLASSES[name], step="guided_step", guidance_rescale=rescale)(X)
    torch.testing.assert_close(found, eager, rtol=1e-4, atol=1e-4)


def test_seeds_are_refused_in_a_compiled_function() -> None:
    scheduler = CLASSES["DDPMScheduler"]()
    scheduler.set_timesteps(4)
    scheduler.use_philox([1])
    step = torch.compile(lambda x, t: scheduler.step(x, t, x, return_dict=False)[0], backend="eager", fullgraph=True)
    with pytest.raises(Exception, match="use_philox"):
        step(X, scheduler.timesteps[0])
    torch._dynamo.reset()


def test_eager_steps_go_on_after_compiled_ones() -> None:
    results = []
    for cls in (CLASSES["EulerDiscreteScheduler"], CLASSES["EulerDiscreteScheduler"].original):
        scheduler = cls()
        scheduler.set_timesteps(6)
        scheduler.set_begin_index(0)
        scheduler.is_scale_input_called = True
        torch._dynamo.reset()
        step = torch.compile(lambda x, t, s=scheduler: s.step(x.tanh(), t, x, return_dict=False)[0], backend="eager")
        x = X
        for i, t in enumerate(scheduler.timesteps):
            x = step(x, t) if i % 2 else scheduler.step(x.tanh(), t, x, return_dict=False)[0]
        results.append(x)
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)
