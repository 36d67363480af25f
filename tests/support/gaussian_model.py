# SPDX-License-Identifier: MIT
"""A model with a known score, element by element: ε of data that are normal with a mean and a deviation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import fastdiff
from fastdiff.schedules.levels import Level, VariancePreservingPath

MEAN, STD = 0.3, 0.5


def sampler_of(method: str, steps: int, **fields: Any) -> fastdiff.samplers.BaseSampler:
    """Return an unclipped sampler over the linear schedule."""
    return fastdiff.create_sampler("linear", method, num_inference_steps=steps, clip_sample=False, **fields)


class GaussianModel:
    """ε = σ·(x − α·mean)/(α²·std² + σ²) at timesteps ``[B]`` or ``[B, T]``; `calls` counts."""

    def __init__(self, sampler: fastdiff.samplers.BaseSampler) -> None:
        self.path = VariancePreservingPath(sampler.scheduler.alphas_cumprod)
        self.calls = 0

    def level(self, timestep: float) -> Level:
        return self.path.at_timestep(timestep)

    def __call__(self, x: Tensor, timesteps: Tensor) -> Tensor:
        self.calls += 1
        levels = [self.level(t) for t in timesteps.reshape(-1).tolist()]
        shape = (*timesteps.shape, *[1] * (x.dim() - timesteps.dim()))
        alpha = torch.tensor([level.alpha for level in levels], dtype=torch.float64).reshape(shape)
        sigma = torch.tensor([level.sigma for level in levels], dtype=torch.float64).reshape(shape)
        epsilon = sigma * (x.double() - alpha * MEAN) / ((alpha * STD) ** 2 + sigma**2)
        return epsilon.to(x.dtype)
