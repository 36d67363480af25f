# SPDX-License-Identifier: MIT
"""TCD against its formula on numbers."""

from __future__ import annotations

import numpy as np
import pytest

from fastdiff.schedules import create_noise_scheduler
from fastdiff.schedules.levels import levels_from_half_log_snr, levels_from_timesteps
from fastdiff.solvers import Prediction, ddim, tcd
from support.formulas import CLEAN, NOISE, START, assert_close, epsilon_of, run, x0_of


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_tcd_follows_its_formula(eta: float) -> None:
    levels = levels_from_half_log_snr(CLEAN)
    x = START
    for i in range(len(levels)):
        t, s = levels[i], levels[i + 1]
        # Levels of λ have no clock: the time is σ̂.
        below = levels.locate((1 - eta) * s.noise_ratio)
        x = below.alpha * x0_of(x, t.timestep) + below.sigma * epsilon_of(x, t)
        kept = s.alpha / below.alpha
        x = kept * x + np.sqrt(max(1 - kept**2, 0.0)) * NOISE[i]
    assert_close(run(tcd(levels, Prediction(), eta=eta)), x)


def test_tcd_goes_below_the_next_level_in_the_timestep() -> None:
    alphas_cumprod = create_noise_scheduler("linear").alphas_cumprod
    table = tcd(levels_from_timesteps(alphas_cumprod, [800, 400]), Prediction(), eta=0.25)
    kept = float(alphas_cumprod[400] / alphas_cumprod[300])
    assert table.source[0].prev_sample.coefficients[-1] == pytest.approx((1 - kept) ** 0.5, rel=1e-12)


def test_tcd_without_noise_is_ddim() -> None:
    levels = levels_from_half_log_snr(CLEAN)
    for row, other in zip(tcd(levels, Prediction(), eta=0.0), ddim(levels, Prediction()), strict=True):
        assert row.prev_sample == other.prev_sample


def test_tcd_refuses_eta_above_one() -> None:
    with pytest.raises(ValueError, match=r"^tcd: eta is 1.5, expected a number from 0 to 1"):
        tcd(levels_from_half_log_snr(CLEAN), Prediction(), eta=1.5)
