# SPDX-License-Identifier: MIT
"""Log-likelihoods by the probability-flow ODE: a Gaussian's own, and k-diffusion's."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fastdiff.loops import log_likelihood
from support.loop_cases import k_diffusion
from support.seeds import TEST_SEED

STD = 0.7


def gaussian(x: Tensor, sigma: Tensor) -> Tensor:
    """Return E[x0 | x] of N(0, STD²)."""
    return x * (STD**2 / (STD**2 + sigma.view(-1, 1, 1) ** 2))


def test_log_likelihood_of_a_gaussian_is_its_density() -> None:
    """The divergence of a linear model is the same in every direction, so the estimate is exact."""
    x = STD * torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(TEST_SEED), dtype=torch.float64)
    low, high = 1e-3, 80.0
    found, info = log_likelihood(gaussian, x, low, high, atol=1e-8, rtol=1e-8)
    # The data at σ_min have the variance STD² + σ_min², and the prior stands for STD² + σ_max².
    want = torch.distributions.Normal(0.0, math.hypot(STD, low)).log_prob(x).flatten(1).sum(1)
    end = x * math.hypot(STD, high) / math.hypot(STD, low)
    prior = torch.distributions.Normal(0.0, high).log_prob(end) - torch.distributions.Normal(
        0.0, math.hypot(STD, high)
    ).log_prob(end)
    torch.testing.assert_close(found, want + prior.flatten(1).sum(1), rtol=1e-6, atol=1e-5)
    assert info["fevals"] > 10


def test_log_likelihood_equals_k_diffusion() -> None:
    x = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(TEST_SEED))

    def model(x: Tensor, sigma: Tensor) -> Tensor:
        return gaussian(x, sigma) + 0.05 * torch.tanh(x)

    results = []
    for function in (log_likelihood, k_diffusion().log_likelihood):
        torch.manual_seed(TEST_SEED)
        results.append(function(model, x, 0.05, 10.0, atol=1e-5, rtol=1e-5)[0])
    # Each solves to 1e-5 a step, for a few hundred steps at most.
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-3)


def test_log_likelihood_stops_at_nan() -> None:
    with pytest.raises(RuntimeError, match="one that moves"):
        log_likelihood(lambda x, sigma: x * math.nan, torch.zeros(1, 2, 2), 0.1, 1.0)
    with pytest.raises(ValueError, match="sigma_min"):
        log_likelihood(gaussian, torch.zeros(1, 2, 2), 1.0, 0.1)
