# SPDX-License-Identifier: MIT
"""Rescaled guidance beside its formula in float64, where the mean is large beside the standard deviation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastdiff import create_noise_scheduler, create_sampler
from fastdiff.guidance import Guidance, PlainGuidance, ResidualGuidance, ZeroStarGuidance
from fastdiff.sampling import GuidedStepper, Stepper

SHARE, SCALE = 0.7, 3.0


def rescaled(guided: Tensor, cond: Tensor) -> Tensor:
    """arXiv 2305.08891, eq. 15 and 16, with torch's standard deviation over each sample."""
    axes = tuple(range(1, cond.dim()))
    ratio = cond.std(dim=axes, keepdim=True) / guided.std(dim=axes, keepdim=True)
    return SHARE * guided * ratio + (1 - SHARE) * guided


def zero_star(cond: Tensor, uncond: Tensor) -> Tensor:
    """arXiv 2503.18886, eq. 7."""
    axes = tuple(range(1, cond.dim()))
    uncond = uncond * (cond * uncond).sum(axes, keepdim=True) / (uncond.square().sum(axes, keepdim=True) + 1e-8)
    return uncond + SCALE * (cond - uncond)


@pytest.mark.parametrize("batch", [1, 3, 20])  # scalars are floats, and tensors beyond 16 samples
@pytest.mark.parametrize("name", ["stepper", "guided stepper", "zero star"])
def test_large_mean_does_not_cancel(name: str, batch: int) -> None:
    table = create_sampler(
        create_noise_scheduler("cosine", clip_sample=False), "ddim", num_inference_steps=4, guidance_scale=1.0
    ).table
    cond, uncond = (1e3 + torch.randn(batch, 3, 24, 32) for _ in range(2))
    sample = torch.zeros_like(cond)
    c, u = cond.double(), uncond.double()
    guided = zero_star(c, u) if name == "zero star" else u + SCALE * (c - u)
    expected = Stepper(table).step(sample.double(), rescaled(guided, c))
    methods: dict[str, Any] = {
        "guided stepper": PlainGuidance(SCALE, rescale=SHARE),
        "zero star": ZeroStarGuidance(SCALE, rescale=SHARE, zero_init_steps=0),
    }
    if name == "stepper":
        found = Stepper(table, guidance_rescale=SHARE).step(sample, cond, uncond=uncond, guidance_scale=SCALE)
    else:
        found = GuidedStepper(table, methods[name]).step(sample, {"cond": cond, "uncond": uncond})
    # The guided output rounds numbers of 1e3 at most three times, by 2⁻²⁴·(2·g − 1)·1e3 = 3e-4 each, beside a deviation
    # of 1: the factor is off by less than the squares of that, and each element by a few roundings.
    error = (found.double() - expected).abs().max() / expected.abs().max()
    assert float(error) < 3e-6


@pytest.mark.parametrize("kind", [PlainGuidance, ResidualGuidance])
def test_scale_a_sample_equals_smaller_batches(kind: Any) -> None:
    table = create_sampler("cosine", "dpm_solver", num_inference_steps=3, guidance_scale=1.0).table
    scales, shape = torch.linspace(1.0, 6.0, 20), (20, 4, 6)
    steps = [{name: torch.randn(shape, dtype=torch.float64) for name in ("cond", "uncond")} for _ in table]
    start = torch.randn(shape, dtype=torch.float64)

    def loop(chosen: slice) -> Tensor:
        options = {"negative": "onetime"} if kind is ResidualGuidance else {}
        method: Guidance = kind(scales[chosen], rescale=SHARE, **options)
        guided, x = GuidedStepper(table, method), start[chosen]
        for outputs in steps:
            x = guided.step(x, {name: tensor[chosen] for name, tensor in outputs.items()})
        return x

    # Rounding of float64 in rows and factors, through steps that multiply an error by up to 100.
    torch.testing.assert_close(
        loop(slice(20)), torch.cat([loop(slice(10)), loop(slice(10, 20))]), rtol=1e-11, atol=1e-11
    )
