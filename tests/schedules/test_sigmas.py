# SPDX-License-Identifier: MIT
"""Levels for own loops: against k-diffusion, and against formulas written here in numpy."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from fastdiff.schedules import sigmas as module
from fastdiff.schedules.sigmas import ALIGN_YOUR_STEPS, flow_mu, flow_shift, flow_shift_dynamic
from support.loop_cases import k_diffusion

RANDOM = random.Random()
LOW, HIGH = RANDOM.uniform(0.01, 0.05), RANDOM.uniform(5.0, 80.0)
ALPHAS = np.cumprod(1.0 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
TRAINING = np.sqrt((1 - ALPHAS) / ALPHAS)


def _at(t: np.ndarray) -> np.ndarray:
    return np.exp(np.interp(t, np.arange(1000), np.log(TRAINING)))


def _quantiles(n: int) -> np.ndarray:
    stats = pytest.importorskip("scipy.stats")
    times = np.rint(stats.beta.ppf(1 - np.arange(n) / n, 0.6, 0.6) * 999).astype(int)
    return TRAINING[sorted(set(times.tolist()), reverse=True)]


def _linear_quadratic(n: int) -> np.ndarray:
    """Mochi's: σ = 1 − fall; the quadratic part starts with the linear one's value and slope, and ends at 0."""
    linear, threshold = n // 2, 0.025
    matrix = [[linear**2, linear, 1], [2 * linear, 1, 0], [n**2, n, 1]]
    a, b, c = np.linalg.solve(matrix, [threshold, threshold / linear, 1.0])
    return np.array([1 - (threshold * i / linear if i < linear else a * i * i + b * i + c) for i in range(n)])


def _bong(n: int) -> np.ndarray:
    total = n + 2
    pivot = int(0.6 * total)
    join = int((total * 0.6 + total * 0.6) / 2)
    slope = 0.2 / (total / 40)

    def curve(count: int, center: int, start: float, end: float) -> np.ndarray:
        height = (2 / np.pi * np.arctan(-slope * (np.arange(count) - center)) + 1) / 2
        return (height - height[-1]) / (height[0] - height[-1]) * (start - end) + end

    whole = np.concatenate([curve(join, pivot, 1.0, 0.5)[:-1], curve(total - join, pivot - join, 0.5, 0.0)])
    return whole[:-1]


#: Name: (the function, its levels without the last 0).
CASES: dict[str, tuple[Callable[[int], Tensor], Callable[[int], np.ndarray]]] = {
    "karras": (
        lambda n: module.get_sigmas_karras(n, LOW, HIGH, 5.0),
        lambda n: (HIGH**0.2 + np.linspace(0, 1, n) * (LOW**0.2 - HIGH**0.2)) ** 5,
    ),
    "exponential": (lambda n: module.get_sigmas_exponential(n, LOW, HIGH), lambda n: np.geomspace(HIGH, LOW, n)),
    "lu": (lambda n: module.get_sigmas_lu(n, LOW, HIGH), lambda n: np.geomspace(HIGH, LOW, n)),
    "polyexponential": (
        lambda n: module.get_sigmas_polyexponential(n, LOW, HIGH, 1.7),
        lambda n: LOW * (HIGH / LOW) ** (np.linspace(1, 0, n) ** 1.7),
    ),
    "vp": (
        module.get_sigmas_vp,
        lambda n: np.sqrt(np.exp(19.9 * np.linspace(1, 1e-3, n) ** 2 / 2 + 0.1 * np.linspace(1, 1e-3, n)) - 1),
    ),
    "laplace": (
        lambda n: module.get_sigmas_laplace(n, LOW, HIGH, 0.1, 0.6),
        lambda n: np.clip(
            [
                math.exp(0.1 - 0.6 * np.sign(0.5 - x) * math.log(1 - 2 * abs(0.5 - x) + 1e-5))
                for x in np.linspace(0, 1, n)
            ],
            LOW,
            HIGH,
        ),
    ),
    "kl_optimal": (
        lambda n: module.get_sigmas_kl_optimal(n, LOW, HIGH),
        lambda n: np.tan([i / (n - 1) * math.atan(LOW) + (1 - i / (n - 1)) * math.atan(HIGH) for i in range(n)]),
    ),
    "normal": (lambda n: module.get_sigmas_normal(n, TRAINING), lambda n: _at(np.linspace(999, 0, n))),
    "sgm_uniform": (
        lambda n: module.get_sigmas_sgm_uniform(n, TRAINING),
        lambda n: _at(np.linspace(999, 0, n + 1)[:-1]),
    ),
    "simple": (
        lambda n: module.get_sigmas_simple(n, TRAINING),
        lambda n: np.array([TRAINING[-(1 + int(i * (1000 / n)))] for i in range(n)]),
    ),
    "ddim_uniform": (
        lambda n: module.get_sigmas_ddim_uniform(n, TRAINING),
        lambda n: TRAINING[np.arange(1, 1000, 1000 // n)][::-1],
    ),
    "beta": (lambda n: module.get_sigmas_beta(n, TRAINING), _quantiles),
    "linear_quadratic": (module.get_sigmas_linear_quadratic, _linear_quadratic),
    "bong_tangent": (module.get_sigmas_bong_tangent, _bong),
    "logit_normal": (
        lambda n: module.get_sigmas_logit_normal(n, 0.3, 1.2),
        lambda n: np.array(
            [1.0]
            + [
                1 / (1 + math.exp(-0.3 - 1.2 * pytest.importorskip("scipy.stats").norm.ppf(1 - i / n)))
                for i in range(1, n)
            ]
        ),
    ),
    "flow": (lambda n: module.get_sigmas_flow(n), lambda n: np.linspace(1, 0, n + 1)[:-1]),
    "flow shifted": (
        lambda n: module.get_sigmas_flow(n, 3.0),
        lambda n: 3 * np.linspace(1, 0, n + 1)[:-1] / (1 + 2 * np.linspace(1, 0, n + 1)[:-1]),
    ),
    "flow shifted by mu": (
        lambda n: module.get_sigmas_flow(n, mu=0.8),
        lambda n: math.exp(0.8) / (math.exp(0.8) + (1 / np.linspace(1, 0, n + 1)[:-1] - 1)),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_levels_equal_formula(name: str) -> None:
    function, formula = CASES[name]
    for n in (2, 5, 20, RANDOM.randrange(6, 40)):
        if name == "laplace" and n > 20:
            n = 20  # more quantiles than the range has room for
        got = function(n)
        assert got.dtype == torch.float64
        assert float(got[-1]) == 0.0
        assert bool((got.diff() < 0).all())
        np.testing.assert_allclose(got[:-1].numpy(), formula(n), rtol=1e-11)


@pytest.mark.parametrize("name", ["karras", "exponential", "polyexponential"])
def test_levels_equal_k_diffusion(name: str) -> None:
    n = RANDOM.randrange(2, 40)
    want = getattr(k_diffusion(), f"get_sigmas_{name}")(n, LOW, HIGH)
    # k-diffusion computes in float32.
    torch.testing.assert_close(getattr(module, f"get_sigmas_{name}")(n, LOW, HIGH), want.double(), rtol=1e-5, atol=0.0)


def test_vp_equals_k_diffusion() -> None:
    # exp − 1 cancels in float32 at the low end.
    torch.testing.assert_close(module.get_sigmas_vp(12), k_diffusion().get_sigmas_vp(12).double(), rtol=1e-3, atol=0.0)


@pytest.mark.parametrize("model", ALIGN_YOUR_STEPS)
def test_align_your_steps(model: str) -> None:
    """Ten steps are the published table; others interpolate its logarithm."""
    published = np.array(ALIGN_YOUR_STEPS[model])
    np.testing.assert_allclose(module.get_sigmas_align_your_steps(10, model)[:-1].numpy(), published[:-1], rtol=1e-12)
    for n in (4, 15, 20):
        want = np.exp(np.interp(np.linspace(0, 10, n + 1), np.arange(11), np.log(published)))
        np.testing.assert_allclose(module.get_sigmas_align_your_steps(n, model)[:-1].numpy(), want[:-1], rtol=1e-12)


def test_align_your_steps_tables_lie_on_the_training_schedule() -> None:
    """SD's table is σ of the published timesteps 999, 850, 736, … of its schedule, to the table's rounding."""
    times = [999, 850, 736, 645, 545, 455, 343, 233, 124, 24]
    np.testing.assert_allclose(np.array(ALIGN_YOUR_STEPS["sd1"])[:-1], TRAINING[times], rtol=5e-3)


def test_shifts() -> None:
    sigmas = torch.rand(20, dtype=torch.float64).sort(descending=True).values
    mu = RANDOM.uniform(0.2, 1.5)
    torch.testing.assert_close(flow_shift_dynamic(sigmas, mu), flow_shift(sigmas, math.exp(mu)), rtol=1e-12, atol=0.0)
    torch.testing.assert_close(flow_shift(sigmas, 1.0), sigmas, rtol=1e-15, atol=0.0)
    # The shift multiplies the odds σ/(1 − σ).
    torch.testing.assert_close(
        torch.logit(flow_shift(sigmas, 3.0)), torch.logit(sigmas) + math.log(3.0), rtol=1e-9, atol=1e-9
    )
    assert (flow_mu(256), flow_mu(4096)) == pytest.approx((0.5, 1.15))
    assert flow_mu((768 // 16) ** 2) == pytest.approx(0.5 + 0.65 * (2304 - 256) / (4096 - 256))


def test_errors_name_the_argument() -> None:
    for message, call in (
        ("sigma_min", lambda: module.get_sigmas_karras(5, 2.0, 1.0)),
        ("sigma_max", lambda: module.get_sigmas_kl_optimal(5, 2.0, 1.0)),
        ("n is 0", lambda: module.get_sigmas_flow(0)),
        ("training_sigmas", lambda: module.get_sigmas_normal(5, TRAINING[::-1].copy())),
        ("at most the 1000", lambda: module.get_sigmas_simple(1001, TRAINING)),
        ("model is 'sd9'", lambda: module.get_sigmas_align_your_steps(5, "sd9")),
        ("do not descend", lambda: module.get_sigmas_laplace(400, 0.9, 1.1)),
        ("shift", lambda: flow_shift(torch.ones(1), 0.0)),
    ):
        with pytest.raises(ValueError, match=message):
            call()  # type: ignore[no-untyped-call]


def test_device_and_dtype() -> None:
    for function in (
        lambda **k: module.get_sigmas_karras(3, 0.1, 1.0, **k),
        lambda **k: module.get_sigmas_flow(3, **k),
    ):
        assert function(dtype=torch.float32).dtype == torch.float32
        assert function(device="meta").is_meta
