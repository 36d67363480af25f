# SPDX-License-Identifier: MIT
"""LCM against its formula on numbers."""

from __future__ import annotations

import numpy as np
import pytest

from fastdiff.schedules.levels import levels_from_half_log_snr
from fastdiff.solvers import Prediction, lcm
from support.formulas import CLEAN, NOISE, START, assert_close, run, x0_of


@pytest.mark.parametrize(("scaling", "sigma_data"), [(10.0, 0.5), (0.7, 1.3)])
def test_lcm_follows_its_formula(scaling: float, sigma_data: float) -> None:
    levels = levels_from_half_log_snr(CLEAN)
    x = START
    for i in range(len(levels)):
        t, s = levels[i], levels[i + 1]
        time = scaling * t.timestep
        skip, out = sigma_data**2 / (time**2 + sigma_data**2), time / np.hypot(time, sigma_data)
        x = s.alpha * (skip * x + out * x0_of(x, t.timestep)) + s.sigma * NOISE[i]
    assert_close(run(lcm(levels, Prediction(), timestep_scaling=scaling, sigma_data=sigma_data)), x)


def test_lcm_draws_no_noise_in_its_last_step() -> None:
    table = lcm(levels_from_half_log_snr(CLEAN), Prediction())
    assert table.draws_noise == (True,) * (len(table) - 1) + (False,)


def test_lcm_refuses_data_without_deviation() -> None:
    with pytest.raises(ValueError, match=r"^lcm: sigma_data is 0.0, expected a finite number above 0"):
        lcm(levels_from_half_log_snr(CLEAN), Prediction(), sigma_data=0.0)
