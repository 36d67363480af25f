# SPDX-License-Identifier: MIT
"""Wrong forms of common teaching code (docs/pitfalls.md): each fails a property that ours has.

A step is x' = a·x + b·ε + s·z.  For data that is one point the model's ε is known exactly, so the mean and the
deviation of the samples at each level follow from (a, b, s): they have to be those of the forward process.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import fastdiff
from fastdiff.classroom import DDPMSampler, compute_sample_variance
from fastdiff.sampling import ddim_step
from fastdiff.schedules.timesteps import timestep_schedule

T = 1000
BETAS = torch.linspace(1e-4, 0.02, T, dtype=torch.float64)
SIGNAL = (1 - BETAS).cumprod(0).tolist()
ZERO, ONE = (torch.full((1,), value, dtype=torch.float64) for value in (0.0, 1.0))
#: x, ε and z of three calls that give the coefficients of a linear step.
Step = tuple[float, float, float]


def signal_after(timesteps: Sequence[int], index: int) -> float:
    """ᾱ of the next visited timestep, 1 for the clean sample."""
    return SIGNAL[timesteps[index + 1]] if index + 1 < len(timesteps) else 1.0


def worst_deviation(steps: Sequence[Step], timesteps: Sequence[int], point: float = 1.0) -> float:
    """How far the mean and the deviation of the samples are from √ᾱ·x0 and √(1 − ᾱ), at the worst step."""
    mean, std = math.sqrt(SIGNAL[timesteps[0]]) * point, math.sqrt(1 - SIGNAL[timesteps[0]])
    worst = 0.0
    for index, (a, b, s) in enumerate(steps):
        now, after = SIGNAL[timesteps[index]], signal_after(timesteps, index)
        slope = a + b / math.sqrt(1 - now)  # ε = (x − √ᾱ·x0)/√(1 − ᾱ)
        mean, std = slope * mean - b * math.sqrt(now / (1 - now)) * point, math.hypot(slope * std, s)
        worst = max(worst, abs(mean - math.sqrt(after) * point), abs(std - math.sqrt(1 - after)))
    return worst


def our_steps(count: int) -> tuple[list[Step], list[int]]:
    """The coefficients of our steps, measured, and the timesteps that they start from."""
    sampler = DDPMSampler(lambda x, t: x, T)
    sampler.set_timesteps(count)
    drawn = float(torch.randn(1, dtype=torch.float64, generator=torch.Generator().manual_seed(3)))

    def measured(x: Tensor, epsilon: Tensor, t: Tensor) -> float:
        return float(sampler.step(epsilon, t, x, generator=torch.Generator().manual_seed(3)))

    steps = []
    for t in sampler.timesteps:
        noise = measured(ZERO, ZERO, t)
        steps.append((measured(ONE, ZERO, t) - noise, measured(ZERO, ONE, t) - noise, noise / drawn))
    return steps, sampler.timesteps.tolist()


def posterior(now: float, after: float, x_factor: float | None = None) -> Step:
    """Eq. 6, 7 and 11 of arXiv 2006.11239 from ᾱ to ᾱ', or with another coefficient of x_t."""
    alpha = now / after
    x0 = math.sqrt(after) * (1 - alpha) / (1 - now)
    x = math.sqrt(alpha) * (1 - after) / (1 - now) if x_factor is None else x_factor
    std = math.sqrt((1 - after) / (1 - now) * (1 - alpha))
    return x + x0 / math.sqrt(now), -x0 * math.sqrt((1 - now) / now), std


def test_posterior_coefficient_has_the_root_of_alpha() -> None:
    steps, timesteps = our_steps(50)
    assert worst_deviation(steps, timesteps) < 1e-9  # float64 rounding, over 50 steps
    levels = [(SIGNAL[t], signal_after(timesteps, i)) for i, t in enumerate(timesteps)]
    for wrong in (
        [posterior(now, after, (1 - after) / (1 - now)) for now, after in levels],
        [posterior(now, after, now / after * (1 - after) / (1 - now)) for now, after in levels],
        [posterior(now, after, math.sqrt(now) * (1 - after) / (1 - now)) for now, after in levels],
    ):
        assert worst_deviation(wrong, timesteps) > 0.05


def test_strided_step_goes_to_the_next_visited_level() -> None:
    steps, timesteps = our_steps(10)
    assert worst_deviation(steps, timesteps) < 1e-9
    one_level_down = [posterior(SIGNAL[t], SIGNAL[t - 1] if t else 1.0) for t in timesteps]
    assert worst_deviation(one_level_down, timesteps) > 0.3


def ddim(now: float, after: float, eta: float) -> Step:
    def measured(x: Tensor, epsilon: Tensor, z: Tensor) -> float:
        return float(ddim_step(x, epsilon, alpha_cumprod=now, alpha_cumprod_prev=after, eta=eta, noise=z))

    return measured(ONE, ZERO, ZERO), measured(ZERO, ONE, ZERO), measured(ZERO, ZERO, ONE)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_takes_its_noise_out_of_the_direction(eta: float) -> None:
    timesteps = list(range(T - 1, -1, -111))
    levels = [(SIGNAL[t], signal_after(timesteps, i)) for i, t in enumerate(timesteps)]
    assert worst_deviation([ddim(*level, eta) for level in levels], timesteps) < 1e-9

    def without_sigma(now: float, after: float) -> Step:
        a, _, s = ddim(now, after, eta)
        return a, math.sqrt(1 - after) - math.sqrt(after * (1 - now) / now), s

    wrong = worst_deviation([without_sigma(*level) for level in levels], timesteps)
    assert wrong < 1e-9 if eta == 0 else wrong > 0.02


def test_ddim_at_eta_one_is_ddpm() -> None:
    timesteps = list(range(T - 1, -1, -111))
    for i, t in enumerate(timesteps):
        now, after = SIGNAL[t], signal_after(timesteps, i)
        assert ddim(now, after, 1.0) == pytest.approx(posterior(now, after), rel=1e-9, abs=1e-12)
        if after == 1.0:
            continue
        root = math.sqrt((1 - after) / (1 - now))
        assert ddim(now, after, 1.0)[2] == pytest.approx(root * math.sqrt(1 - now / after))
        assert 1 - after / now < 0  # the other way round the root is of a negative number
        assert root * math.sqrt(float(BETAS[t])) < 0.5 * posterior(now, after)[2]  # β_t is that of one training step


def test_last_step_adds_no_noise() -> None:
    steps, timesteps = our_steps(10)
    assert timesteps[-1] == 0
    assert steps[-1][2] == 0.0
    assert worst_deviation(steps[-1:], timesteps[-1:]) < 1e-9
    a, b, _ = steps[-1]
    assert worst_deviation([(a, b, math.sqrt(float(BETAS[0])))], [0]) == pytest.approx(0.01)  # √β_0 stays in the data


def test_karras_sigma_grows_with_the_timestep() -> None:
    scheduler = fastdiff.create_noise_scheduler("karras", num_train_timesteps=50)
    assert bool((scheduler.sigmas.diff() > 0).all())
    assert bool(((scheduler.betas > 0) & (scheduler.betas < 1)).all())
    ramp = torch.linspace(0, 1, 50, dtype=torch.float64)
    descending = (80 ** (1 / 7) + ramp * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7  # the order in which a sampler goes
    signal = 1 / (1 + descending**2)
    assert bool((1 - signal[1:] / signal[:-1] < 0).all())  # every β is negative
    torch.testing.assert_close(scheduler.sigmas, descending.flip(0))


def test_cosine_betas_are_clipped() -> None:
    scheduler = fastdiff.create_noise_scheduler("cosine")
    u = torch.arange(T + 1, dtype=torch.float64) / T
    cosine = torch.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
    unclipped = 1 - cosine[1:] / cosine[:-1]
    assert float(unclipped[-1]) == 1.0
    assert float((1 - unclipped).cumprod(0)[-1].rsqrt()) > 1e6  # the factor of x0 = (x − √(1 − ᾱ)·ε)/√ᾱ
    torch.testing.assert_close(scheduler.betas, unclipped.clamp(max=0.999), rtol=1e-12, atol=0)
    images = DDPMSampler(scheduler, 5)(lambda x, t: x, 2, sample_shape=(3,))
    assert bool(torch.isfinite(images).all())


def test_variance_of_the_mean_image_measures_no_diversity() -> None:
    different = torch.randn(64, 3, 8, 8)
    copies = different[:1].expand(64, 3, 8, 8)
    assert compute_sample_variance(copies) == pytest.approx(0, abs=1e-12)
    assert compute_sample_variance(different) == pytest.approx(1, abs=0.1)  # 12288 draws: a deviation of 0.013
    assert copies.mean(0).var() > 20 * different.mean(0).var()  # most "diverse" where all are the same


@pytest.mark.parametrize("total", [10, 97, 1000])
def test_timesteps_are_rounded_flipped_and_inside(total: int) -> None:
    sampler = DDPMSampler(lambda x, t: x, total)
    for count in {1, 2, 3, 7, total // 3, total - 1, total}:
        sampler.set_timesteps(count)
        steps = sampler.timesteps.tolist()
        ideal = [(total - 1) * (1 - i / max(count - 1, 1)) for i in range(count)]
        assert steps == sorted(set(steps), reverse=True)
        assert steps[0] == total - 1
        assert all(abs(step - exact) <= 0.5 + 1e-9 for step, exact in zip(steps, ideal, strict=True))
    upto = torch.linspace(0, total, 7).long()
    assert int(upto[-1]) == total  # no such timestep: the model never saw it
    strided = list(range(0, total, total // 7))
    assert len(strided) > 7 or strided[-1] < total - 1  # too many, or never pure noise
    truncated = torch.linspace(0, total - 1, 8).long()
    ours = timestep_schedule("linspace", 8, total).flip(0)
    assert int((ours - truncated).max()) == 1  # truncation falls below the nearest one


@pytest.mark.parametrize(("variance_type", "low"), [("learned_range", -1.0), ("learned_unit_range", 0.0)])
def test_learned_variance_spans_the_two_fixed_ones(variance_type: str, low: float) -> None:
    def noise_of(v: float, kind: str, t: int) -> float:
        scheduler: Any = SimpleNamespace(
            alphas_cumprod=torch.tensor(SIGNAL, dtype=torch.float64),
            betas=BETAS,
            add_noise=None,
            config=SimpleNamespace(variance_type=kind),
        )
        sampler = DDPMSampler(scheduler, 10)
        output = torch.tensor([[0.0, v]], dtype=torch.float64)  # ε and v, along the channels
        drawn = torch.randn(1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
        x = torch.zeros(1, 1, dtype=torch.float64)
        return float(sampler.step(output, t, x, generator=torch.Generator().manual_seed(4)) / drawn)

    now, after = SIGNAL[222], SIGNAL[111]
    small, large = posterior(now, after)[2], math.sqrt(1 - now / after)
    assert noise_of(low, variance_type, 222) == pytest.approx(small)
    assert noise_of(1.0, variance_type, 222) == pytest.approx(large)
    middle = (low + 1) / 2
    assert noise_of(middle, variance_type, 222) == pytest.approx(math.sqrt(small * large))
    other = "learned_range" if variance_type == "learned_unit_range" else "learned_unit_range"
    assert abs(noise_of(low, other, 222) / small - 1) > 0.15  # the same number, read in the other range


def test_each_pitfall_is_described_with_its_test() -> None:
    document = Path(__file__).resolve().parents[2] / "docs" / "pitfalls.md"
    named = set(re.findall(r"`(test_\w+)`", document.read_text()))
    here = {name for name in globals() if name.startswith("test_")} - {"test_each_pitfall_is_described_with_its_test"}
    assert here <= named
