# SPDX-License-Identifier: MIT
"""Drop-in steps whose tensors have different dtypes: one call of the fused step, without a conversion."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

diffusers = pytest.importorskip("diffusers")

from fastdiff.diffusers import CLASSES  # noqa: E402
from fastdiff.diffusers.compiler.inputs import HISTORY  # noqa: E402
from support.dropin_cases import Case  # noqa: E402
from support.dropin_helpers import make_loop, quiet  # noqa: E402

HALVES = (torch.float16, torch.bfloat16)
#: Float32 results or history beside half samples; and float32 latents with a half model, which any scheduler may get.
HALF_SAMPLES = ("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "EDMEulerScheduler",
                "FlowMatchHeunDiscreteScheduler", "FlowMatchLCMScheduler", "LTXEulerAncestralRFScheduler")  # fmt: skip
HALF_MODEL = ("DDIMScheduler", "DPMSolverMultistepScheduler", "EulerDiscreteScheduler", "UniPCMultistepScheduler",
              "FlowMatchEulerDiscreteScheduler", "HeunDiscreteScheduler", "LMSDiscreteScheduler")  # fmt: skip


class Operators(TorchDispatchMode):
    """Dispatch mode that records the names of operators."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def loop(scheduler, sample: Tensor, output_dtype: torch.dtype, counted: bool = False) -> list[tuple[Tensor, ...]]:
    """Return the results of all steps of a loop."""
    generator = torch.Generator().manual_seed(3)
    scheduler.set_timesteps(6)
    results = []
    for t in scheduler.timesteps:
        gen = torch.Generator().manual_seed(len(results))
        output = torch.randn(sample.shape, generator=gen).to(output_dtype)
        if hasattr(scheduler, "scale_model_input"):
            scheduler.scale_model_input(sample, t)
        keywords = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
        if counted:
            with Operators() as seen:
                result = scheduler.step(output, t, sample, return_dict=False, **keywords)
            assert not {"_to_copy", "copy_", "add", "mul"} & set(seen.names), seen.names
        else:
            result = scheduler.step(output, t, sample, return_dict=False, **keywords)
        results.append(tuple(value for value in result if isinstance(value, Tensor)))
        sample = result[0]
    return results


def assert_close(ours: list[tuple[Tensor, ...]], theirs: list[tuple[Tensor, ...]], dtype: torch.dtype) -> None:
    # Errors of a half sample's own rounding, which both make and carry on from step to step.
    tolerance = 64 * torch.finfo(dtype).eps
    for mine, other in zip(ours, theirs, strict=True):
        assert [t.dtype for t in mine] == [t.dtype for t in other]
        for a, b in zip(mine, other, strict=True):
            torch.testing.assert_close(
                a.double(), b.double(), rtol=tolerance, atol=tolerance * float(b.double().abs().max())
            )


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("name", HALF_SAMPLES)
def test_half_samples_with_float32_results_and_history(name, dtype):
    sample = torch.randn(2, 4, 8, 8).to(dtype)
    ours = loop(CLASSES[name](), sample, dtype)
    assert_close(ours, loop(getattr(diffusers, name)(), sample, dtype), dtype)
    again = loop(CLASSES[name](), sample, dtype, counted=True)
    assert all(torch.equal(a, b) for x, y in zip(ours, again, strict=True) for a, b in zip(x, y, strict=True))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("name", HALF_MODEL)
def test_half_model_with_float32_samples(name, dtype):
    sample = torch.randn(2, 4, 8, 8)
    ours = loop(CLASSES[name](), sample, dtype)
    assert_close(ours, loop(getattr(diffusers, name)(), sample, dtype), dtype)
    again = loop(CLASSES[name](), sample, dtype, counted=True)
    assert all(torch.equal(a, b) for x, y in zip(ours, again, strict=True) for a, b in zip(x, y, strict=True))


@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"])
def test_mixed_dtype_plans_run_in_cpp(name):
    scheduler = CLASSES[name]()
    sample = torch.randn(2, 4, 8, 8).half()
    for _ in range(3):
        loop(scheduler, sample, torch.float16)
    assert scheduler._fused.plan.native_eligible
    assert not scheduler._fused.plan.uniform


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
def test_guided_step_accepts_unconditional_output_of_other_dtype(dtype):
    sample, cond = torch.randn(2, 1, 4, 8, 8).unbind(0)
    uncond = torch.randn(1, 4, 8, 8).to(dtype)

    def taken(uncond: Tensor) -> list[Tensor]:
        scheduler = CLASSES["DDIMScheduler"]()
        results = []
        for _ in range(3):  # the first loop by way of Python, later ones in C++
            scheduler.set_timesteps(4)
            x = sample
            for t in scheduler.timesteps:
                x = scheduler.guided_step(uncond, cond, 3.0, t, x, return_dict=False)[0]
            results.append(x)
        return results

    assert all(torch.equal(a, b) for a, b in zip(taken(uncond), taken(uncond.float()), strict=True))


@pytest.mark.parametrize("name", sorted(CLASSES))
def test_history_of_float64_samples_has_diffusers_dtypes(name: str) -> None:
    """Each tensor that a scheduler keeps, after every step of a loop."""
    config = {"noise_sampler_seed": 3} if name == "DPMSolverSDEScheduler" else {}
    case = Case(name.removesuffix("Scheduler"), config, 5, {}).of(dtype=torch.float64)
    loops = [make_loop(case, cls) for cls in (CLASSES[name].original, CLASSES[name])]
    for each in loops:
        each.start()

    def dtypes(scheduler: Any) -> dict[str, list[torch.dtype]]:
        found = {}
        for attribute in HISTORY & vars(scheduler).keys():
            value = vars(scheduler)[attribute]
            items = value if isinstance(value, list) else [value]
            found[attribute] = [item.dtype for item in items if isinstance(item, Tensor)]
        return found

    for i, t in enumerate(loops[0].timesteps):
        for each in loops:
            if each.undo(t):
                continue
            args, kwargs = each.call(i, t)
            with quiet():
                each.take(each.scheduler.step(*args, **kwargs))
        assert dtypes(loops[0].scheduler) == dtypes(loops[1].scheduler), i
