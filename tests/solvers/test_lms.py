# SPDX-License-Identifier: MIT
"""LMS against its formula in x/α, each integral taken of a fitted polynomial."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.polynomial import Polynomial

from fastdiff.schedules.levels import levels_from_half_log_snr
from fastdiff.solvers import Prediction, euler, lms
from support.formulas import CLEAN, START, assert_close, epsilon_of, run


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_lms_follows_its_formula(order: int) -> None:
    levels = levels_from_half_log_snr(CLEAN)
    sigmas = [level.noise_ratio for level in levels.points]
    x_hat, slopes = START / levels[0].alpha, []
    for i in range(len(levels)):
        slopes = [*slopes, epsilon_of(levels[i].alpha * x_hat, levels[i])][-order:]
        nodes = sigmas[i + 1 - len(slopes) : i + 1]
        curve = np.polynomial.polynomial.polyfit(nodes, np.array(slopes), len(slopes) - 1)
        integrals = [Polynomial(coefficients).integ() for coefficients in curve.T]
        x_hat = x_hat + np.array([area(sigmas[i + 1]) - area(sigmas[i]) for area in integrals])
    assert_close(run(lms(levels, Prediction(), multistep_order=order)), x_hat)


def test_lms_of_one_slope_is_euler() -> None:
    levels = levels_from_half_log_snr(CLEAN)
    for row, other in zip(lms(levels, Prediction(), multistep_order=1), euler(levels, Prediction()), strict=True):
        np.testing.assert_allclose(row.prev_sample.coefficients, other.prev_sample.coefficients, rtol=0, atol=1e-14)


def test_lms_refuses_an_order_out_of_range() -> None:
    with pytest.raises(ValueError, match=r"^lms: multistep_order is 5, expected an integer from 1 to 4"):
        lms(levels_from_half_log_snr(CLEAN), Prediction(), multistep_order=5)
