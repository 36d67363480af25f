# SPDX-License-Identifier: MIT
"""IPNDM against its formula on numbers."""

from __future__ import annotations

import pytest

from fastdiff.schedules.levels import Level, Levels, levels_from_half_log_snr
from fastdiff.solvers import Prediction, PredictionType, ipndm
from support.formulas import CLEAN, START, assert_close, epsilon_of, run

BASHFORTH = {1: [1], 2: [3 / 2, -1 / 2], 3: [23 / 12, -16 / 12, 5 / 12], 4: [55 / 24, -59 / 24, 37 / 24, -9 / 24]}


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_ipndm_follows_its_formula(order: int) -> None:
    levels = levels_from_half_log_snr(CLEAN)
    x, outputs = START, []
    for i in range(len(levels)):
        t, s = levels[i], levels[i + 1]
        outputs = [epsilon_of(x, t), *outputs][:order]
        noise = sum(b * e for b, e in zip(BASHFORTH[len(outputs)], outputs, strict=True))
        x = s.alpha * (x - t.sigma * noise) / t.alpha + s.sigma * noise
    assert_close(run(ipndm(levels, Prediction(), multistep_order=order)), x)


def test_ipndm_from_pure_noise_starts_again_at_the_next_level() -> None:
    points = levels_from_half_log_snr(CLEAN).points
    kind = Prediction(PredictionType.V_PREDICTION)
    blank = Levels((Level(-9.0, 0.0, 1.0), *points), levels_from_half_log_snr(CLEAN).locate)
    first, *others = ipndm(blank, kind)
    assert first.prev_sample.coefficients[:2] == pytest.approx((points[0].sigma, -points[0].alpha))
    later = ipndm(levels_from_half_log_snr(CLEAN), kind)
    for row, other in zip(others, later, strict=True):
        assert sorted(row.prev_sample.coefficients) == pytest.approx(sorted(other.prev_sample.coefficients))
