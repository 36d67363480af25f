# SPDX-License-Identifier: MIT
"""The rows of Heun's method against its paper's algorithm, with and without churn."""

from __future__ import annotations

import pytest

from fastdiff.schedules.levels import levels_from_half_log_snr
from fastdiff.solvers import Churn, Prediction, heun
from support.formulas import CHURNS, CLEAN, GRID, assert_close, edm_loop, run


@pytest.mark.parametrize("churn", CHURNS, ids=lambda churn: f"churn-{churn.s_churn}")
@pytest.mark.parametrize("clean", [True, False])
def test_heun_is_algorithm_2(churn: Churn, clean: bool) -> None:
    levels = levels_from_half_log_snr(CLEAN if clean else GRID)
    table = heun(levels, Prediction(), churn=churn)
    assert_close(run(table), edm_loop(levels, churn, second_order=True))
