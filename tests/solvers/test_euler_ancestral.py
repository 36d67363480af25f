# SPDX-License-Identifier: MIT
"""The rows of Euler ancestral against k-diffusion's code."""

from __future__ import annotations

import pytest

from fastdiff.schedules.levels import levels_from_half_log_snr
from fastdiff.solvers import Prediction, PredictionType, euler_ancestral
from support.formulas import CLEAN, NOISE, START, assert_close, run, x0_of
from support.loops import PREDICTION_TYPES


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
@pytest.mark.parametrize(("eta", "s_noise"), [(0.0, 1.0), (0.5, 1.0), (1.0, 1.03), (1.6, 1.0)])
def test_euler_ancestral_is_k_diffusions(eta: float, s_noise: float, kind: PredictionType) -> None:
    """get_ancestral_step and sample_euler_ancestral of k-diffusion, on x̂ = x/α."""
    levels = levels_from_half_log_snr(CLEAN)
    x_hat = START / levels[0].alpha
    for i in range(len(levels)):
        now, following = levels[i].noise_ratio, levels[i + 1].noise_ratio
        up = min(following, eta * (following**2 * (now**2 - following**2) / now**2) ** 0.5)
        down = (following**2 - up**2) ** 0.5
        slope = (x_hat - x0_of(levels[i].alpha * x_hat, levels[i].timestep)) / now
        x_hat = x_hat + slope * (down - now) + NOISE[i] * s_noise * up
    table = euler_ancestral(levels, Prediction(kind), eta=eta, s_noise=s_noise)
    assert_close(run(table, kind=kind), x_hat)
