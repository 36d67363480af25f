# SPDX-License-Identifier: MIT
"""Wrappers for models: x0 from each prediction type, folded into the step and called alone."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdiff import loops
from support.loop_cases import SIGMAS, mixture, start
from support.seeds import TEST_SEED

ALPHAS = (1.0 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)


class Predicts(torch.nn.Module):
    """A model with the mixture's answer, in one prediction type; it lists its time arguments."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.times: list[float] = []

    def level(self, t: float) -> float:
        if self.kind == "continuous v":
            return math.tan(t * math.pi / 2)
        if self.kind == "flow":
            return (t / 1000) / (1 - t / 1000)
        logs = ((1 - ALPHAS) / ALPHAS).sqrt().log().tolist()
        low = min(int(t), 998)
        return math.exp(logs[low] + (t - low) * (logs[low + 1] - logs[low]))

    def forward(self, x: Tensor, t: Tensor, gain: float = 1.0) -> Tensor:
        self.times.append(float(t[0]))
        sigma = self.level(float(t[0]))
        scale = 1 + sigma if self.kind == "flow" else math.hypot(1, sigma)
        x0 = gain * mixture(x * scale, torch.full((len(x),), sigma, dtype=x.dtype))
        noise = (x * scale - x0) / sigma
        alpha = 1 / scale
        return {
            "epsilon": noise,
            "sample": x0,
            "v": alpha * noise - alpha * sigma * x0,
            "continuous v": alpha * noise - alpha * sigma * x0,
            "flow": noise - x0,
        }[self.kind]


MAKE: dict[str, Any] = {
    "epsilon": lambda inner: loops.EpsilonDenoiser(inner, ALPHAS),
    "v": lambda inner: loops.VDenoiser(inner, ALPHAS),
    "sample": lambda inner: loops.SampleDenoiser(inner, ALPHAS),
    "continuous v": loops.ContinuousVDenoiser,
    "flow": loops.FlowDenoiser,
}


@pytest.mark.parametrize("kind", MAKE)
def test_denoiser_is_the_models_x0(kind: str) -> None:
    """Alone and folded into loops of one and of several calls a step, with noise, callbacks and arguments."""
    x = start(TEST_SEED, (2, 2, 3, 3), torch.float64)
    sigmas = SIGMAS.double().clone()
    sigmas[0] = 14.0
    denoiser = MAKE[kind](Predicts(kind))
    for sigma in (0.05, 1.3, 13.0):
        level = torch.tensor([sigma, sigma], dtype=torch.float64)
        torch.testing.assert_close(denoiser(x, level), mixture(x, level), rtol=1e-9, atol=1e-9)
        assert denoiser.t_to_sigma(denoiser.sigma_to_t(sigma)) == pytest.approx(sigma, rel=1e-12)
    for name, options in (("euler", {"s_churn": 2.0}), ("dpmpp_2m", {}), ("res_3s", {}), ("dpmpp_2m_sde", {})):
        noise = {"seeds": [1, 2]} if "sde" in name or options else {}
        function = getattr(loops, f"sample_{name}")
        want = function(mixture, x, sigmas, disable=True, **noise, **options)
        folded = function(denoiser, x, sigmas, disable=True, **noise, **options)
        torch.testing.assert_close(folded, want, rtol=1e-8, atol=1e-8)
        called = function(denoiser, x, sigmas, callback=lambda info: None, disable=True, **noise, **options)
        torch.testing.assert_close(called, want, rtol=1e-8, atol=1e-8)
    scaled = loops.sample_dpmpp_2m(denoiser, x, sigmas, {"gain": 0.9}, disable=True)
    gained = loops.sample_dpmpp_2m(lambda x, sigma: 0.9 * mixture(x, sigma), x, sigmas, disable=True)
    torch.testing.assert_close(scaled, gained, rtol=1e-8, atol=1e-8)


def test_folded_model_keeps_its_input() -> None:
    """An input that the model keeps is not written over."""
    kept: list[tuple[Tensor, Tensor]] = []

    class Hoarder(Predicts):
        def forward(self, x: Tensor, t: Tensor, gain: float = 1.0) -> Tensor:
            kept.append((x, x.clone()))
            return super().forward(x, t, gain)

    x = start(TEST_SEED, (2, 2, 3, 3), torch.float64)
    end = loops.sample_euler(loops.EpsilonDenoiser(Hoarder("epsilon"), ALPHAS), x, SIGMAS[1:], disable=True)
    assert all(torch.equal(tensor, copy) for tensor, copy in kept)
    torch.testing.assert_close(end, loops.sample_euler(mixture, x, SIGMAS[1:], disable=True), rtol=1e-8, atol=1e-8)


def test_quantized_times_are_the_nearest() -> None:
    denoiser = loops.EpsilonDenoiser(Predicts("epsilon"), ALPHAS, quantize=True)
    logs = denoiser.sigmas.log()
    for sigma in torch.exp(torch.empty(50, dtype=torch.float64).uniform_(-6, 4)).tolist():
        assert denoiser.sigma_to_t(sigma) == float((logs - math.log(sigma)).abs().argmin())


def test_denoiser_refuses_what_it_cannot_invert() -> None:
    with pytest.raises(ValueError, match="alphas_cumprod"):
        loops.EpsilonDenoiser(Predicts("epsilon"), ALPHAS.flip(0))
    with pytest.raises(ValueError, match="sigma has shape"):
        loops.ContinuousVDenoiser(Predicts("continuous v"))(torch.zeros(3, 1), torch.ones(2))
