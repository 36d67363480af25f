# SPDX-License-Identifier: MIT
"""Guidance by gradients of a classifier and of a loss, beside the papers' steps; clipping and thresholds kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastdiff import create_noise_scheduler, create_sampler, ops
from fastdiff.guidance import ClassifierGuidance, LossGuidance, PlainGuidance, ZeroStarGuidance
from fastdiff.sampling import GuidedStepper, Stepper

SHAPE = (3, 4, 5, 6)
STEPS = 4


def sampler_of(method: str, **options: Any) -> Any:
    clip = options.pop("clip", False)
    scheduler = create_noise_scheduler("linear", clip_sample=clip)
    return create_sampler(scheduler, method, num_inference_steps=STEPS, guidance_scale=1.0, **options)


def score(x: Tensor, t: Tensor) -> Tensor:
    """A quadratic log density, whose gradient is −(x − t/1000)."""
    return -0.5 * (x - t.reshape(-1, 1, 1, 1) / 1000.0).square().flatten(1).sum(1)


def gradient(x: Tensor, timestep: float) -> Tensor:
    return -(x - timestep / 1000.0)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample", "flow_prediction"])
@pytest.mark.parametrize("options", [{"method": "ddim"}, {"method": "ddim", "clip": True}, {"method": "dpm_solver"}])
def test_classifier_shifts_the_noise(options: dict[str, Any], prediction_type: str) -> None:
    sampler = sampler_of(**options, prediction_type=prediction_type)
    levels, scale = sampler.levels(STEPS), torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    guided = GuidedStepper(sampler.table, PlainGuidance(1.0), terms=[ClassifierGuidance(score, scale)], levels=levels)
    plain = Stepper(sampler.table)
    x = y = torch.randn(SHAPE, dtype=torch.float64)
    for i in range(STEPS):
        m = torch.randn_like(x)
        a, s = levels[i].alpha, levels[i].sigma
        # Read x0 and the noise from m, shift the noise, and give the output that belongs to both.
        x0 = {
            "epsilon": (y - s * m) / a,
            "v_prediction": (a * y - s * m) / (a * a + s * s),
            "sample": m,
            "flow_prediction": (y - s * m) / (a + s),
        }[prediction_type]
        eps = (y - a * x0) / s - s * scale.reshape(-1, 1, 1, 1) * gradient(y, sampler.table.timesteps[i])
        x0 = (y - s * eps) / a
        shifted = {
            "epsilon": eps,
            "v_prediction": a * eps - s * x0,
            "sample": x0,
            "flow_prediction": eps - x0,
        }[prediction_type]
        x, y = guided.step(x, {"cond": m}), plain.step(y, shifted)
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-9)


def test_classifier_shifts_the_mean_by_the_variance(monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = sampler_of("ddpm", clip=True)
    term = ClassifierGuidance(score, 3.0, form="mean")
    guided = GuidedStepper(sampler.table, PlainGuidance(4.0), terms=[term], seeds=[1, 2, 3], backend="reference")
    plain = Stepper(sampler.table, seeds=[1, 2, 3], backend="reference")
    x = y = torch.randn(SHAPE, dtype=torch.float64)
    passes = []
    step = ops.step
    monkeypatch.setattr(ops, "step", lambda *a, **k: (passes.append(1), step(*a, **k))[1])
    for row in sampler.table:
        c, u = torch.randn_like(x), torch.randn_like(x)
        passes.clear()
        assert guided.passes() == 1
        x = guided.step(x, {"cond": c, "uncond": u})
        assert len(passes) == 1
        std = row.prev_sample.coefficients[-1]
        y = plain.step(y, c, uncond=u, guidance_scale=4.0) + 3.0 * std**2 * gradient(y, row.timestep)
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("through_model", [True, False])
@pytest.mark.parametrize("options", [{"method": "ddim", "clip": True}, {"method": "dpm_solver"}])
def test_loss_moves_the_result(options: dict[str, Any], through_model: bool) -> None:
    sampler = sampler_of(**options)
    target = torch.randn(SHAPE, dtype=torch.float64)
    term = LossGuidance(lambda x0: (x0 - target).flatten(1).norm(dim=1), 0.7, through_model=through_model)
    guided, plain = GuidedStepper(sampler.table, PlainGuidance(2.0), terms=[term]), Stepper(sampler.table)

    def model(x: Tensor) -> tuple[Tensor, Tensor]:
        return torch.sin(x), 0.5 * torch.cos(2 * x)

    x = y = torch.randn(SHAPE, dtype=torch.float64)
    for row in sampler.table:
        x = x.detach().requires_grad_(through_model)
        with torch.set_grad_enabled(through_model):
            c, u = model(x)
            x = guided.step(x, {"cond": c, "uncond": u})
        p, q = row.prediction
        c, u = model(y)
        m = u + 2.0 * (c - u)
        residual = p * y + q * m - target
        slope = -torch.sin(2 * y) + 2.0 * (torch.cos(y) + torch.sin(2 * y))
        through = p + q * slope if through_model else p
        grad = residual / residual.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1) * through
        y = plain.step(y, m) - 0.7 * grad
        torch.testing.assert_close(x.detach(), y, rtol=1e-8, atol=1e-8)


def test_thresholds_are_of_the_shifted_output() -> None:
    sampler = sampler_of("ddim", thresholding=True)
    levels = sampler.levels(STEPS)
    term = ClassifierGuidance(score, 0.5)
    guided = GuidedStepper(sampler.table, PlainGuidance(1.0), terms=[term], levels=levels, sample_max_value=1.5)
    plain = Stepper(sampler.table, sample_max_value=1.5)
    x = y = torch.randn(SHAPE, dtype=torch.float64)
    for i in range(STEPS):
        m = torch.randn_like(x)
        shifted = m - 0.5 * levels[i].sigma * gradient(y, sampler.table.timesteps[i])
        x, y = guided.step(x, {"cond": m}), plain.step(y, shifted)
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-9)


def test_malformed_gradients_are_named() -> None:
    sampler = sampler_of("ddim")
    levels = sampler.levels(STEPS)
    x = torch.randn(SHAPE)
    for function, words in (
        (lambda x, t: x.sum(), "guidance_fn"),
        (lambda x, t: torch.ones(3), "without a gradient"),
        (lambda x, t: 3.0, "guidance_fn"),
    ):
        guided = GuidedStepper(sampler.table, PlainGuidance(1.0), terms=[ClassifierGuidance(function)], levels=levels)
        with pytest.raises(ValueError, match=words):
            guided.step(x, {"cond": x})
        assert guided.index == 0
    with pytest.raises(ValueError, match="levels"):
        GuidedStepper(sampler.table, PlainGuidance(1.0), terms=[ClassifierGuidance(score)])
    with pytest.raises(ValueError, match="form"):
        ClassifierGuidance(score, form="other")
    guided = GuidedStepper(sampler.table, PlainGuidance(1.0), terms=[LossGuidance(lambda x0: x0.flatten(1).sum(1))])
    with pytest.raises(ValueError, match="autograd"):
        guided.step(x, {"cond": x})
    guided = GuidedStepper(sampler.table, ZeroStarGuidance(3.0, zero_init_steps=0), terms=guided.terms)
    leaf = x.clone().requires_grad_()
    with pytest.raises(RuntimeError, match="gradients"):
        guided.step(leaf, {"cond": leaf * 2, "uncond": leaf * 3})
