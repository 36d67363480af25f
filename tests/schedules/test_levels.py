# SPDX-License-Identifier: MIT
"""Noise levels: the path of a schedule, there and back, and the lists of levels that are refused."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastdiff.schedules import create_noise_scheduler
from fastdiff.schedules.levels import (
    Level,
    Levels,
    VariancePreservingPath,
    levels_from_flow_times,
    levels_from_half_log_snr,
    levels_from_sigmas,
    levels_from_timesteps,
    variance_preserving,
    with_intermediate_levels,
)

LINEAR = create_noise_scheduler("linear").alphas_cumprod
ZERO_SNR = create_noise_scheduler("scaled_linear", rescale_betas_zero_snr=True).alphas_cumprod


def _refuse(ratio: float) -> Level:
    raise AssertionError(f"nobody asked for the level of {ratio}")


@given(ratio=st.floats(1e-3, 1e3))
def test_level_knows_its_ratio_and_half_log_snr(ratio: float) -> None:
    level = variance_preserving(ratio, 3.0)
    # hypot, a quotient and a logarithm: a few roundings.
    assert level.alpha**2 + level.sigma**2 == pytest.approx(1.0, rel=1e-15)
    assert level.noise_ratio == pytest.approx(ratio, rel=1e-15)
    assert level.half_log_snr == pytest.approx(-math.log(ratio), rel=1e-14, abs=1e-15)


def test_level_at_the_ends() -> None:
    clean, noise = Level(0.0, 1.0, 0.0), Level(9.0, 0.0, 1.0)
    assert (clean.noise_ratio, clean.half_log_snr) == (0.0, math.inf)
    assert (noise.noise_ratio, noise.half_log_snr) == (math.inf, -math.inf)


# ------------------------------------------------------------------------------------------------------------ the path


@pytest.mark.parametrize("timestep", [0, 1, 500, 999])
def test_path_at_whole_timesteps_is_the_schedule(timestep: int) -> None:
    level = VariancePreservingPath(LINEAR).at_timestep(float(timestep))
    alpha_cumprod = float(LINEAR[timestep])
    assert (level.alpha, level.sigma) == (math.sqrt(alpha_cumprod), math.sqrt(1.0 - alpha_cumprod))
    assert level.timestep == timestep


@given(timestep=st.floats(0.0, 999.0))
def test_path_goes_there_and_back(timestep: float) -> None:
    path = VariancePreservingPath(LINEAR)
    level = path.at_timestep(timestep)
    again = path.at_ratio(level.noise_ratio)
    # log σ̂ has a slope of 0.002 a timestep at least on this schedule: 2⁻⁵² of log σ̂ ≤ 5 is 1e-12 of a timestep.
    assert again.timestep == pytest.approx(timestep, abs=1e-10)
    assert again.alpha == pytest.approx(level.alpha, rel=1e-14)
    assert again.sigma == pytest.approx(level.sigma, rel=1e-14)


@given(timestep=st.floats(0.0, 998.99))
def test_path_between_timesteps_interpolates_log_sigma(timestep: float) -> None:
    path = VariancePreservingPath(LINEAR)
    low = math.floor(timestep)
    ends = [math.log(path.at_timestep(float(t)).noise_ratio) for t in (low, low + 1)]
    weight = timestep - low
    expected = ends[0] * (1.0 - weight) + ends[1] * weight
    assert math.log(path.at_timestep(timestep).noise_ratio) == pytest.approx(expected, abs=1e-13)


def test_path_at_timesteps_agrees_with_numpy() -> None:
    path = VariancePreservingPath(LINEAR)
    sigmas = np.sqrt((1.0 - LINEAR.numpy()) / LINEAR.numpy())
    asked = np.linspace(0.0, 999.0, 77)
    expected = np.exp(np.interp(asked, np.arange(1000), np.log(sigmas)))
    np.testing.assert_allclose([path.at_timestep(t).noise_ratio for t in asked], expected, rtol=1e-12)
    back = [path.at_ratio(r).timestep for r in expected]
    np.testing.assert_allclose(back, np.interp(np.log(expected), np.log(sigmas), np.arange(1000)), atol=1e-9)


def test_path_holds_timesteps_inside_the_schedule() -> None:
    path = VariancePreservingPath(LINEAR)
    low, high = path.ratio_range
    assert path.at_ratio(low / 10).timestep == 0.0
    assert path.at_ratio(high * 10).timestep == 999.0
    # The level itself is what was asked for, beyond the schedule too.
    assert path.at_ratio(high * 10).noise_ratio == pytest.approx(10 * high, rel=1e-14)
    assert path.at_ratio(0.0) == Level(0.0, 1.0, 0.0)
    for timestep in (-0.5, 999.5, math.nan):
        with pytest.raises(ValueError, match=r"Levels: timesteps holds .*, expected values from 0 to 999; stay on the"):
            path.at_timestep(timestep)


def test_path_of_zero_terminal_snr_ends_in_pure_noise() -> None:
    path = VariancePreservingPath(ZERO_SNR)
    assert path.at_timestep(999.0) == Level(999.0, 0.0, 1.0)
    assert path.at_ratio(math.inf) == Level(999.0, 0.0, 1.0)
    assert path.ratio_range[1] == pytest.approx(path.at_timestep(998.0).noise_ratio, rel=1e-14)
    # There is no logarithm to interpolate to: the last finite level stands for what lies between.
    assert path.at_timestep(998.5).noise_ratio == pytest.approx(path.ratio_range[1], rel=1e-14)
    assert path.at_ratio(1e9).timestep == 998.0
    levels = levels_from_timesteps(ZERO_SNR, [999, 500, 0])
    assert levels.initial_scale == 1.0
    assert levels[0].noise_ratio == math.inf


# ----------------------------------------------------------------------------------------------------- lists of levels


def test_levels_from_timesteps_end_where_asked() -> None:
    levels = levels_from_timesteps(LINEAR, [900, 400, 10])
    assert len(levels) == 3
    assert levels.timesteps == [900.0, 400.0, 10.0]
    assert levels[3] == Level(0.0, 1.0, 0.0)
    held = levels_from_timesteps(LINEAR, [900, 400, 10], final_alpha_cumprod=float(LINEAR[0]))
    assert held[3].sigma == math.sqrt(1.0 - float(LINEAR[0]))


@pytest.mark.parametrize("timesteps", [[10, 400, 900], [900, 900, 10], [900, 10, 400]])
def test_levels_refuse_noise_that_does_not_fall(timesteps: list[int]) -> None:
    with pytest.raises(
        ValueError, match=r"Levels: points\[\d\] has the noise level .* after .*, expected a smaller one"
    ):
        levels_from_timesteps(LINEAR, timesteps)


def test_levels_refuse_too_few_and_what_is_not_finite() -> None:
    good, clean = Level(9.0, 0.6, 0.8), Level(0.0, 1.0, 0.0)
    for points in ((), (good,)):
        with pytest.raises(ValueError, match=r"Levels: points has \d levels, expected 2 or more; ask for at least one"):
            Levels(points, _refuse)
    for bad in (Level(1.0, math.nan, 0.5), Level(1.0, 0.5, math.inf), Level(1.0, -0.5, 0.5), Level(1.0, 0.5, -0.1)):
        with pytest.raises(ValueError, match=r"Levels: points\[1\] has alpha .* and sigma .*check the noise schedule"):
            Levels((good, bad, clean), _refuse)
    with pytest.raises(ValueError, match="in descending order without repeats"):
        levels_from_timesteps(torch.tensor([0.9, 0.9], dtype=torch.float64), [1, 0])


@given(sigmas=st.lists(st.floats(0.02, 100.0), min_size=2, max_size=8, unique_by=lambda s: round(math.log(s), 3)))
def test_levels_from_sigmas_are_those_sigmas(sigmas: list[float]) -> None:
    ordered = sorted(sigmas, reverse=True)
    levels = levels_from_sigmas(LINEAR, ordered)
    np.testing.assert_allclose([p.noise_ratio for p in levels.points[:-1]], ordered, rtol=1e-14)
    assert levels[len(levels)].sigma == 0.0
    assert levels.timesteps == sorted(levels.timesteps, reverse=True)
    assert levels.initial_scale == pytest.approx(1.0, rel=1e-15)


@given(value=st.floats(-8.0, 8.0), step=st.floats(0.01, 5.0))
def test_levels_from_half_log_snr_are_told_lambda(value: float, step: float) -> None:
    levels = levels_from_half_log_snr([value, value + step, math.inf])
    assert levels[0].half_log_snr == pytest.approx(value, abs=1e-14)
    assert levels.timesteps == pytest.approx([value, value + step], abs=1e-14)
    assert levels.locate(math.exp(-value)).noise_ratio == levels[0].noise_ratio


@given(time=st.floats(0.001, 0.999))
def test_levels_from_flow_times_lie_on_the_straight_path(time: float) -> None:
    levels = levels_from_flow_times([1.0, time, 0.0], num_train_timesteps=500)
    assert levels[1] == Level(time * 500, 1.0 - time, time)
    assert levels.timesteps == [500.0, time * 500]
    found = levels.locate(levels[1].noise_ratio)
    assert found.alpha == pytest.approx(1.0 - time, rel=1e-13)
    assert found.sigma == pytest.approx(time, rel=1e-13)
    assert levels.locate(math.inf) == Level(500.0, 0.0, 1.0)
    assert levels.initial_scale == 1.0
    # Not variance preserving: a loop that starts inside the path starts at its own standard deviation.
    inside = levels_from_flow_times([time, 0.0])
    assert inside.initial_scale == pytest.approx(math.sqrt(time**2 + (1.0 - time) ** 2), rel=1e-15)


@given(fraction=st.floats(0.05, 0.95))
def test_intermediate_levels_divide_lambda(fraction: float) -> None:
    coarse = levels_from_timesteps(LINEAR, [900, 300])
    fine = with_intermediate_levels(coarse, [fraction])
    # The last step goes to the clean sample, where λ is infinite: it stays whole.
    assert len(fine) == 3
    assert (fine[0], fine[2], fine[3]) == (coarse[0], coarse[1], coarse[2])
    expected = (1.0 - fraction) * coarse[0].half_log_snr + fraction * coarse[1].half_log_snr
    assert fine[1].half_log_snr == pytest.approx(expected, abs=1e-14)
    assert 300.0 < fine[1].timestep < 900.0


def test_intermediate_levels_leave_a_step_from_pure_noise_whole() -> None:
    fine = with_intermediate_levels(levels_from_timesteps(ZERO_SNR, [999, 600, 200]), [1 / 3, 2 / 3])
    assert len(fine) == 5
    assert [p.timestep for p in fine.points[:2]] == [999.0, 600.0]
