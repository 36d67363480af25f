# SPDX-License-Identifier: MIT
"""A denoiser with a known answer, noise by level, and k-diffusion's functions, for the tests of fastdiff.loops."""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for benchmarks/

#: A mixture of three Gaussians in each element.
MEANS, STDS, WEIGHTS = torch.tensor([(-1.5, 0.3, 1.2), (0.3, 0.5, 0.2), (0.3, 0.45, 0.25)], dtype=torch.float64)
VARIANCES, LOG_WEIGHTS = STDS**2, WEIGHTS.log()

#: Levels of a whole run: uneven, from k-diffusion's usual range, ending at 0.
SIGMAS = torch.tensor([14.6, 8.1, 4.9, 2.7, 1.6, 0.93, 0.41, 0.17, 0.05, 0.0])


def mixture(x: Tensor, sigma: Tensor) -> Tensor:
    """Return the mean of x0 given x = x0 + σ·ε, elementwise, computed in float64."""
    wide = x.double()[..., None] - MEANS
    variance = VARIANCES + sigma.double().view(-1, *[1] * x.dim()) ** 2
    shrunk = wide / variance
    share = torch.softmax(LOG_WEIGHTS - 0.5 * (variance.log() + wide * shrunk), dim=-1)
    return (share * (MEANS + VARIANCES * shrunk)).sum(-1).to(x.dtype)


def uncond_mixture(x: Tensor, sigma: Tensor) -> Tensor:
    """Return another denoised tensor, for guidance."""
    return 0.7 * mixture(x, sigma) + 0.1 * torch.sin(x.double()).to(x.dtype)


def start(seed: int, shape: tuple[int, ...] = (2, 3, 4, 5), dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 14.6).to(dtype)


class LevelNoise:
    """A noise sampler whose numbers depend on the interval alone, to about 1e-4 of its ends; it lists its calls."""

    def __init__(self, seed: int, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.seed, self.shape, self.dtype = seed, shape, dtype
        self.calls: list[tuple[float, float]] = []

    def __call__(self, sigma: Any, sigma_next: Any) -> Tensor:
        ends = float(sigma), float(sigma_next)
        self.calls.append(ends)
        key = [0 if end == 0.0 else round(1e3 * math.log(end)) for end in ends]
        generator = torch.Generator().manual_seed(hash((self.seed, *key)) % 2**40)
        return torch.randn(self.shape, generator=generator, dtype=torch.float64).to(self.dtype)


@functools.cache
def k_diffusion(module: str = "sampling") -> ModuleType:
    """Return a module of k-diffusion without the rest of the package; skip the test where it is not installed."""
    from benchmarks import k_diffusion_peer

    try:
        return k_diffusion_peer.load(module)
    except ImportError as error:
        pytest.skip(f"k-diffusion: {error}")


Loop = Callable[..., Tensor]
