# SPDX-License-Identifier: MIT
"""KDPM2 against k-diffusion's formula in x/α."""

from __future__ import annotations

import math

import pytest

from fastdiff.schedules.levels import levels_from_half_log_snr
from fastdiff.solvers import Churn, Prediction, kdpm2
from support.formulas import CHURNS, CLEAN, NOISE, START, assert_close, run, x0_of
from support.solver_loops import Array, level_of


def _slope(x_hat: Array, sigma: float) -> Array:
    level = level_of(-math.log(sigma))
    return (x_hat - x0_of(level.alpha * x_hat, level.timestep)) / sigma


@pytest.mark.parametrize("churn", CHURNS)
def test_kdpm2_follows_its_formula(churn: Churn) -> None:
    levels = levels_from_half_log_snr(CLEAN)
    sigmas, n, rows = [level.noise_ratio for level in levels.points], len(levels), 0
    x_hat = None
    for i in range(n):
        gamma = min(churn.s_churn / n, math.sqrt(2) - 1) if churn.s_tmin <= sigmas[i] <= churn.s_tmax else 0.0
        raised = sigmas[i] * (1 + gamma)
        if x_hat is None:  # the first churn is part of the initial noise
            x_hat = START / level_of(-math.log(raised)).alpha
        else:
            x_hat = x_hat + churn.s_noise * math.sqrt(raised**2 - sigmas[i] ** 2) * NOISE[rows - 1]
        if sigmas[i + 1] == 0.0:
            x_hat = x_hat - raised * _slope(x_hat, raised)
            rows += 1
        else:
            middle = math.exp(0.5 * (math.log(raised) + math.log(sigmas[i + 1])))
            halfway = x_hat + (middle - raised) * _slope(x_hat, raised)
            x_hat = x_hat + (sigmas[i + 1] - raised) * _slope(halfway, middle)
            rows += 2
    table = kdpm2(levels, Prediction(), churn=churn)
    assert len(table) == rows == 2 * n - 1
    assert_close(run(table), x_hat)
