# SPDX-License-Identifier: MIT
"""What is measured: one whole loop of steps with classifier-free guidance, the model's outputs made beforehand.

A loop rather than a step, since a scheduler's step has state; what is quoted is a loop's time over its steps.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastdiff import create_sampler

STEPS = 20
GUIDANCE = 3.0

SHAPES = {
    "digits": (100, 1, 8, 8),
    "image": (1, 4, 64, 64),
    "images": (8, 4, 128, 128),
    "video": (1, 16, 21, 90, 160),
}

#: Each sampler as fields of SamplingConfig and as a diffusers scheduler with its arguments.
SAMPLERS: dict[str, tuple[dict[str, Any], str, dict[str, Any]]] = {
    "ddim": ({"method": "ddim"}, "DDIMScheduler", {"clip_sample": False}),
    "dpmsolver++2m": ({"method": "dpm_solver", "solver_order": 2}, "DPMSolverMultistepScheduler", {"solver_order": 2}),
    "dpmsolver++3m": ({"method": "dpm_solver", "solver_order": 3}, "DPMSolverMultistepScheduler", {"solver_order": 3}),
    "euler": ({"method": "euler"}, "EulerDiscreteScheduler", {}),
    "heun": ({"method": "heun"}, "HeunDiscreteScheduler", {}),
    "ddpm": ({"method": "ddpm"}, "DDPMScheduler", {"clip_sample": False}),
    "euler-ancestral": ({"method": "euler_ancestral"}, "EulerAncestralDiscreteScheduler", {}),
}

#: Samplers that draw noise at every step: there torch's own randn is most of what is left.
STOCHASTIC = ("ddpm", "euler-ancestral")

PEERS = ("fastdiff", "reference", "diffusers")


@dataclass(frozen=True)
class Case:
    """One sampler at one shape and dtype; `loop(peer)` makes the callable that is timed."""

    sampler: str
    shape: str
    dtype: torch.dtype = torch.float32

    @property
    def name(self) -> str:
        dimensions = "x".join(str(size) for size in SHAPES[self.shape])
        return f"{self.sampler} {dimensions} {str(self.dtype).removeprefix('torch.')}"

    @property
    def calls(self) -> int:
        """Steps in a loop, a model call each."""
        return 2 * STEPS - 1 if self.sampler == "heun" else STEPS

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Sample, conditional and unconditional output."""
        generator = torch.Generator().manual_seed(0)
        return tuple(torch.randn(SHAPES[self.shape], generator=generator).to(self.dtype) for _ in range(3))  # type: ignore[return-value]

    def loop(self, peer: str) -> Callable[[], Tensor]:
        """A callable that takes a loop's steps and returns the last sample."""
        if peer == "diffusers":
            return self._diffusers_loop()
        return self._fastdiff_loop(None if peer == "fastdiff" else peer)

    def _fastdiff_loop(self, backend: str | None) -> Callable[[], Tensor]:
        x, cond, uncond = self.tensors()
        sampler = create_sampler("linear", num_inference_steps=STEPS, **SAMPLERS[self.sampler][0])
        generator = torch.Generator().manual_seed(0)

        def run() -> Tensor:
            stepper = sampler.stepper(backend)
            sample = x.clone()
            while not stepper.done:  # in place, as the samplers' own loop does
                stepper.step(sample, cond, uncond=uncond, guidance=GUIDANCE, generator=generator, out=sample)
            return sample

        return run

    def _diffusers_loop(self) -> Callable[[], Tensor]:
        import diffusers

        x, cond, uncond = self.tensors()
        _, class_name, arguments = SAMPLERS[self.sampler]
        scheduler = getattr(diffusers, class_name)(**arguments)
        scheduler.set_timesteps(STEPS)
        draws = {"generator": torch.Generator().manual_seed(0)} if self.sampler in STOCHASTIC else {}
        state = ("_step_index", "lower_order_nums", "model_outputs", "dt", "prev_derivative", "sample")
        fresh = {name: value for name, value in vars(scheduler).items() if name in state}

        def run() -> Tensor:
            # What set_timesteps would reset, without its cost: it is not part of a step.
            for name, value in fresh.items():
                setattr(scheduler, name, list(value) if isinstance(value, list) else value)
            sample = x
            for timestep in scheduler.timesteps:
                scheduler.scale_model_input(sample, timestep)  # as every pipeline does; most return their argument
                guided = uncond + GUIDANCE * (cond - uncond)
                sample = scheduler.step(guided, timestep, sample, return_dict=False, **draws)[0]
            return sample

        return run


def all_cases() -> list[Case]:
    """Every sampler at every shape."""
    return [Case(sampler, shape) for shape, sampler in itertools.product(SHAPES, SAMPLERS)]
