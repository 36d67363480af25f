# SPDX-License-Identifier: MIT
"""Losses against their formulas in float64, and against the fused `fastdiff.ops.diffusion_loss`."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastdiff
from fastdiff.ops import diffusion_loss, noise_and_target
from fastdiff.training import (
    AdvancedLossFunctions,
    debiased_loss,
    huber_loss,
    l1_loss,
    l2_loss,
    p2_loss,
    snr_loss,
    v_prediction_loss,
)

#: float32: some tens of roundings of 6e-8 in the sum of at most 48 elements.
CLOSE = {"rtol": 2e-6, "atol": 1e-7}
#: The target of the fused loss is computed from scalars that were rounded to float32.
FUSED = {"rtol": 1e-5, "atol": 1e-6}
T = 1000


def linear_alphas_cumprod() -> Tensor:
    return (1 - torch.linspace(1e-4, 0.02, T, dtype=torch.float64)).cumprod(0)


def rho(residual: Tensor, loss: str, c: float) -> Tensor:
    if loss == "l2":
        return residual * residual
    return residual.abs() if loss == "l1" else torch.sqrt(residual**2 + c**2) - c


PLAIN = {"l2": l2_loss, "l1": l1_loss, "huber": lambda *a, **k: huber_loss(*a, 0.3, **k)}


@settings(max_examples=15, deadline=None)
@given(
    shape=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
    loss=st.sampled_from(sorted(PLAIN)),
    weighted=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_loss_is_the_weighted_mean(shape: list[int], dtype: torch.dtype, loss: str, weighted: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    pred, target = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))
    weights = torch.rand(shape[0], generator=generator, dtype=torch.float64) if weighted else None
    each = rho(pred.double() - target.double(), loss, 0.3).reshape(shape[0], -1).mean(1)
    each = each if weights is None else each * weights
    found = {name: PLAIN[loss](pred, target, weights=weights, reduction=name) for name in ("none", "mean", "sum")}
    assert {one.dtype for one in found.values()} == {torch.float64 if dtype == torch.float64 else torch.float32}
    torch.testing.assert_close(found["none"].double(), each, **CLOSE)
    torch.testing.assert_close(found["mean"].double(), each.mean(), **CLOSE)
    torch.testing.assert_close(found["sum"].double(), each.sum() * math.prod(shape[1:]), **CLOSE)


def test_huber_keeps_its_digits_for_small_residuals() -> None:
    residual = torch.tensor([[1e-7, 0.0, 3.0]])
    found = huber_loss(residual, torch.zeros(1, 3), 0.001, reduction="sum")
    expected = rho(residual.double(), "huber", 0.001).sum()
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=0)
    small = huber_loss(residual[:, :1], torch.zeros(1, 1), 0.001)
    assert float(small) == pytest.approx((1e-7) ** 2 / (2 * 0.001), rel=1e-5)  # √(r² + c²) − c is 0 in float32


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("kind", ["min_snr", "p2", "debiased"])
def test_weighted_losses(kind: str, prediction_type: str) -> None:
    pred, target = torch.randn(5, 2, 3), torch.randn(5, 2, 3)
    t = torch.tensor([0, 10, 300, 700, 999])
    signal = linear_alphas_cumprod()[t]
    snr = signal / (1 - signal)
    # Weights of ε, and what they are for the error of another prediction of the same x_t.
    epsilon = {"min_snr": snr.clamp(max=4.0) / snr, "p2": (0.5 + snr) ** -0.7, "debiased": snr**-0.5}[kind]
    factor = {"epsilon": 1.0, "sample": snr, "v_prediction": snr / (snr + 1)}[prediction_type]
    expected = epsilon * factor * ((pred - target).double() ** 2).flatten(1).mean(1)
    call: dict[str, Any] = {
        "min_snr": lambda **k: snr_loss(pred, target, torch.randn_like(pred), t, 4.0, **k),
        "p2": lambda **k: p2_loss(pred, target, t, 0.7, 0.5, **k),
        "debiased": lambda **k: debiased_loss(pred, target, t, **k),
    }
    for schedule in (
        {"scheduler": fastdiff.create_noise_scheduler("linear")},
        {"alphas_cumprod": linear_alphas_cumprod()},
    ):
        found = call[kind](prediction_type=prediction_type, reduction="none", **schedule)
        torch.testing.assert_close(found.double(), expected, **CLOSE)
        found = call[kind](prediction_type=prediction_type, **schedule)
        torch.testing.assert_close(found.double(), expected.mean(), **CLOSE)


def test_snr_loss_says_what_it_assumes() -> None:
    pred, target, noise = torch.randn(3, 3, 4).unbind()
    t = torch.tensor([5, 500, 999])
    with pytest.warns(UserWarning, match=r"snr_loss: scheduler .* DDPM's is assumed"):
        found = AdvancedLossFunctions.snr_loss(pred, target, noise, t, gamma=5.0)
    expected = snr_loss(pred, target, noise, t, alphas_cumprod=linear_alphas_cumprod(), prediction_type="epsilon")
    torch.testing.assert_close(found, expected)
    scheduler = pytest.importorskip("diffusers").DDPMScheduler(prediction_type="v_prediction")
    own = snr_loss(pred, target, noise, t, scheduler=scheduler)  # its config says which prediction
    named = snr_loss(pred, target, noise, t, alphas_cumprod=scheduler.alphas_cumprod, prediction_type="v_prediction")
    assert torch.equal(own, named)
    with pytest.raises(ValueError, match="alphas_cumprod is given beside scheduler"):
        snr_loss(pred, target, noise, t, scheduler=scheduler, alphas_cumprod=scheduler.alphas_cumprod)


@pytest.mark.parametrize("form", ["number", "flat", "broadcast"])
def test_velocity_is_made_of_alpha_bar_and_noise(form: str) -> None:
    pred, x0, noise = (torch.randn(3, 2, 4) for _ in range(3))
    signal = torch.tensor([0.9, 0.5, 0.0], dtype=torch.float64)
    given: Any = {"number": 0.3, "flat": signal, "broadcast": signal.reshape(3, 1, 1)}[form]
    wide = torch.full((3, 1, 1), 0.3, dtype=torch.float64) if form == "number" else signal.reshape(3, 1, 1)
    v = wide.sqrt() * noise.double() - (1 - wide).sqrt() * x0.double()
    expected = ((pred.double() - v) ** 2).mean()
    torch.testing.assert_close(v_prediction_loss(pred, x0, given, noise).double(), expected, **CLOSE)
    assert torch.equal(v_prediction_loss(pred, x0, given), l2_loss(pred, x0))  # a target that is v already


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("loss", sorted(PLAIN))
def test_fused_loss_gives_the_same(loss: str, prediction_type: str) -> None:
    schedule = fastdiff.create_noise_scheduler("cosine")
    x0, output = torch.randn(4, 2, 3, 3), torch.randn(4, 2, 3, 3, requires_grad=True)
    t, seeds = torch.tensor([0, 17, 500, 999]), torch.arange(4)
    weights = torch.rand(4)
    _, target = noise_and_target(x0, t, schedule, prediction_type, seeds=seeds)
    plain = PLAIN[loss](output, target, weights=weights)
    (wanted,) = torch.autograd.grad(plain, output)
    fused = diffusion_loss(
        output, x0, t, schedule, prediction_type, seeds=seeds, loss=loss, huber_c=0.3, weights=weights
    )
    (found,) = torch.autograd.grad(fused, output)
    torch.testing.assert_close(fused, plain, **FUSED)
    torch.testing.assert_close(found, wanted, **FUSED)


def test_gradients() -> None:
    pred = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    target = torch.randn(3, 4, dtype=torch.float64)
    for name in ("l2_loss", "huber_loss"):
        assert torch.autograd.gradcheck(getattr(AdvancedLossFunctions, name), (pred, target))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: l2_loss(x, x[:, :1]), r"l2_loss: target is \[3, 1\] on cpu, expected \[3, 2\]"),
        (lambda x: l2_loss(x.long(), x), "l2_loss: pred has dtype torch.int64"),
        (lambda x: l2_loss(x, x, reduction="batch"), "l2_loss: reduction is 'batch'"),
        (lambda x: l2_loss(x, x, weights=torch.ones(2)), r"l2_loss: weights has shape \[2\], expected \[3\]"),
        (lambda x: l2_loss(x, x, weights=[1.0] * 3), "l2_loss: weights is a list"),
        (lambda x: l2_loss(x[:0], x[:0]), r"l2_loss: pred has shape \[0, 2\]"),
        (lambda x: huber_loss(x, x, 0.0), "huber_loss: c is 0.0"),
        (lambda x: huber_loss(x, x, 1e-25), "huber_loss: c is 1e-25"),  # its square is 0, and the gradient NaN
        (lambda x: snr_loss(x, x, x, torch.arange(2), scheduler=fastdiff.create_noise_scheduler("linear")), "weights"),
        (lambda x: snr_loss(x, x, x, torch.arange(3), scheduler=object()), "without alphas_cumprod"),
        (lambda x: v_prediction_loss(x, x, 1.5), r"v_prediction_loss: alpha_bar spans 1.5"),
        (lambda x: v_prediction_loss(x, x, torch.ones(2)), r"alpha_bar has shape \[2, 1\]"),
        (lambda x: v_prediction_loss(x, x, 0.5, x[:1]), r"noise has shape \[1, 2\]"),
    ],
)
def test_bad_arguments_are_refused(call: Any, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        call(torch.randn(3, 2))
