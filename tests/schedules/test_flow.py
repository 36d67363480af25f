# SPDX-License-Identifier: MIT
"""Flow schedules: the straight path, its shift, and every solver on it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fastdiff import FlowNoiseScheduler, NoiseSchedulerConfig, create_noise_scheduler, create_sampler
from fastdiff.schedules import flow_mu
from support.solver_cases import DETERMINISTIC, METHODS

#: EDM networks have coordinates and times of their own, and no level without signal.
ON_FLOWS = [method for method in METHODS if method != "edm_euler"]
#: Consistency models jump to the end at each step: with another model these do not carry a distribution.
CONSISTENCY = ("lcm", "tcd")
shifts = st.floats(0.2, 12.0)


@given(shift=shifts, total=st.integers(2, 300))
def test_times_follow_the_shift(shift: float, total: int) -> None:
    scheduler = create_noise_scheduler("flow", num_train_timesteps=total, shift=shift)
    base = [(k + 1) / total for k in range(total)]
    expected = torch.tensor([shift * t / (1 + (shift - 1) * t) for t in base], dtype=torch.float64)
    torch.testing.assert_close(scheduler.times, expected, rtol=1e-12, atol=0)
    bars = (1 - expected) ** 2 / ((1 - expected) ** 2 + expected**2)
    torch.testing.assert_close(scheduler.alphas_cumprod, bars, rtol=1e-9, atol=1e-15)
    dynamic = create_noise_scheduler("flow", num_train_timesteps=total, shift_mu=math.log(shift))
    torch.testing.assert_close(dynamic.times, scheduler.times, rtol=1e-12, atol=0)


@given(shift=shifts, steps=st.integers(1, 40), spacing=st.sampled_from(["trailing", "linspace"]))
def test_loop_visits_shifted_times(shift: float, steps: int, spacing: str) -> None:
    sampler = create_sampler("flow", "euler", shift=shift, num_inference_steps=steps, timestep_spacing=spacing)
    ends = 1 / steps if spacing == "trailing" else 1 / 1000
    base = torch.linspace(1.0, ends, steps, dtype=torch.float64)
    times = shift * base / (1 + (shift - 1) * base)
    torch.testing.assert_close(sampler.sigmas[:-1], times, rtol=1e-12, atol=0)
    assert float(sampler.sigmas[-1]) == 0.0
    torch.testing.assert_close(sampler.timesteps.double(), times * 1000, rtol=1e-6, atol=0)
    assert sampler.init_noise_sigma == 1.0


def test_forward_process_is_the_straight_line() -> None:
    scheduler = create_noise_scheduler("flow", num_train_timesteps=10, shift=2.0)
    x0, noise = torch.randn(3, 4), torch.randn(3, 4)
    at = torch.tensor([0, 5, 9])
    times = scheduler.times[at][:, None].float()
    torch.testing.assert_close(scheduler.add_noise(x0, noise, at), (1 - times) * x0 + times * noise)
    torch.testing.assert_close(scheduler.get_velocity(x0, noise, at), noise - x0)
    assert torch.equal(scheduler.add_noise(x0, noise, 9), noise)


@pytest.mark.parametrize("method", [method for method in ON_FLOWS if method in DETERMINISTIC])
def test_euler_on_a_flow_is_the_line_and_others_agree_with_it(method: str) -> None:
    """The velocity to one clean sample is constant along the path: any solver ends there."""
    clean, noise = torch.randn(2, 5, dtype=torch.float64), torch.randn(2, 5, dtype=torch.float64)
    sampler = create_sampler("flow", method, shift=3.0, num_inference_steps=7)
    assert sampler.config.prediction_type == "flow_prediction"
    for info in sampler.stream(lambda x, t: noise - clean, noise):
        if method == "euler":
            t = float(sampler.sigmas[info.index + 1])
            torch.testing.assert_close(info.sample, (1 - t) * clean + t * noise, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(info.sample, clean, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("method", [method for method in ON_FLOWS if method not in CONSISTENCY])
@pytest.mark.parametrize("spacing", [None, "karras"])
def test_every_solver_runs_on_a_flow(method: str, spacing: str | None) -> None:
    """A Gaussian's exact flow: v = (σ − α·s²)/(α²s² + σ²)·x carries N(0, 1) to N(0, s²)."""
    s, sampler = 0.5, create_sampler("flow", method, num_inference_steps=200, sigma_spacing=spacing)

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        time = (t.double() / 1000)[:, None]
        return (time - (1 - time) * s * s) / ((1 - time) ** 2 * s * s + time**2) * x

    x = torch.randn(1, 20_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    end = sampler.sample(velocity, x, seeds=[3], progress=False).samples
    # 20000 draws: the standard error of a deviation is .5 %. In 200 steps, the first-order ancestral solvers on Karras'
    # levels are off by 4.4 %, all others by less.
    assert float(end.std()) == pytest.approx(s, rel=0.06)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"schedule_type": "flow", "shift": 0.0}, "shift is 0.0"),
        ({"schedule_type": "flow", "shift": 2.0, "shift_mu": 1.0}, "shift_mu is given beside shift"),
        ({"schedule_type": "flow", "shift_mu": math.inf}, "shift_mu is inf"),
        ({"schedule_type": "flow", "timestep_spacing": "leading"}, "one of linspace, trailing"),
        ({"shift": 2.0}, "shift is given with schedule_type 'linear', expected a flow schedule"),
        ({"shift_mu": 2.0}, "shift_mu is given with schedule_type 'linear'"),
    ],
    ids=str,
)
def test_unsuitable_shift_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NoiseSchedulerConfig(**fields)


def test_class_decides_the_kind_and_its_spacing() -> None:
    for scheduler in (FlowNoiseScheduler(), FlowNoiseScheduler(NoiseSchedulerConfig(num_train_timesteps=1000))):
        assert (scheduler.config.schedule_type, scheduler.config.timestep_spacing) == ("flow", "trailing")
    assert FlowNoiseScheduler(timestep_spacing="linspace").config.timestep_spacing == "linspace"
    assert NoiseSchedulerConfig().timestep_spacing == "leading"


def test_sigmas_of_a_flow_are_its_times() -> None:
    sampler = create_sampler("flow", "ddim")
    sampler.set_timesteps(sigmas=[1.0, 0.5, 0.25])
    assert sampler.timesteps.tolist() == [1000, 500, 250]
    with pytest.raises(ValueError, match=r"sigmas holds 1\.5, expected values from 0 to 1"):
        sampler.set_timesteps(sigmas=[1.5, 0.5])
    scheduler = create_noise_scheduler("flow")
    scheduler.set_timesteps(4)
    assert scheduler.timesteps.tolist() == [1000, 750, 500, 250]


@given(tokens=st.integers(1, 20_000))
def test_mu_is_on_the_line_through_both_points(tokens: int) -> None:
    assert flow_mu(256) == 0.5
    assert flow_mu(4096) == pytest.approx(1.15)
    assert flow_mu(tokens) == pytest.approx(0.5 + (tokens - 256) / 3840 * 0.65)
