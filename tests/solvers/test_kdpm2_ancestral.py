# SPDX-License-Identifier: MIT
"""KDPM2 ancestral against k-diffusion's formula in x/α."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from fastdiff.schedules.levels import levels_from_half_log_snr
from fastdiff.solvers import Prediction, kdpm2, kdpm2_ancestral
from support.formulas import CLEAN, NOISE, START, assert_close, run, x0_of
from support.solver_loops import Array, level_of


def _slope(x_hat: Array, sigma: float) -> Array:
    level = level_of(-math.log(sigma))
    return (x_hat - x0_of(level.alpha * x_hat, level.timestep)) / sigma


@pytest.mark.parametrize(("eta", "s_noise"), [(0.0, 1.0), (0.6, 1.02), (1.0, 1.0)])
def test_kdpm2_ancestral_follows_its_formula(eta: float, s_noise: float) -> None:
    levels = levels_from_half_log_snr(CLEAN)
    sigmas, rows = [level.noise_ratio for level in levels.points], 0
    x_hat = START / levels[0].alpha
    for sigma, target in itertools.pairwise(sigmas):
        up = min(target, eta * math.sqrt(target**2 * (sigma**2 - target**2) / sigma**2))
        down = math.sqrt(target**2 - up**2)
        slope = _slope(x_hat, sigma)
        if down == 0.0:
            x_hat = x_hat - sigma * slope
            rows += 1
            continue
        middle = math.exp(0.5 * (math.log(sigma) + math.log(down)))
        halfway = x_hat + (middle - sigma) * slope
        x_hat = x_hat + (down - sigma) * _slope(halfway, middle) + up * s_noise * NOISE[rows + 1]
        rows += 2
    table = kdpm2_ancestral(levels, Prediction(), eta=eta, s_noise=s_noise)
    assert len(table) == rows
    assert_close(run(table), x_hat)


def test_kdpm2_ancestral_without_noise_is_kdpm2() -> None:
    levels = levels_from_half_log_snr(CLEAN)
    for row, other in zip(kdpm2_ancestral(levels, Prediction(), eta=0.0), kdpm2(levels, Prediction()), strict=True):
        np.testing.assert_allclose(row.prev_sample.coefficients, other.prev_sample.coefficients, atol=1e-14)
