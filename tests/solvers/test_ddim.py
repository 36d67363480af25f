# SPDX-License-Identifier: MIT
"""The rows of DDIM against its paper's equations."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fastdiff.schedules.levels import levels_from_half_log_snr
from fastdiff.solvers import Prediction, PredictionType, ddim
from support.formulas import CLEAN, NOISE, START, assert_close, epsilon_of, run
from support.loops import PREDICTION_TYPES


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
@pytest.mark.parametrize("use_clipped", [False, True])
@pytest.mark.parametrize(("eta", "clip"), [(0.0, math.inf), (0.4, math.inf), (1.0, 0.6), (0.4, 0.6), (0.0, 0.6)])
def test_ddim_is_equations_12_and_16(eta: float, clip: float, use_clipped: bool, kind: PredictionType) -> None:
    """arXiv 2010.02502: x0 of eq. 9, σ of eq. 16, the update of eq. 12, with diffusers' use_clipped_model_output."""
    levels = levels_from_half_log_snr(CLEAN)
    x = START
    for i in range(len(levels)):
        ac, ac_prev = levels[i].alpha ** 2, levels[i + 1].alpha ** 2
        epsilon = epsilon_of(x, levels[i])
        x0 = np.clip((x - math.sqrt(1 - ac) * epsilon) / math.sqrt(ac), -clip, clip)
        sigma = eta * math.sqrt((1 - ac_prev) / (1 - ac)) * math.sqrt(1 - ac / ac_prev)
        if use_clipped:
            epsilon = (x - math.sqrt(ac) * x0) / math.sqrt(1 - ac)
        x = math.sqrt(ac_prev) * x0 + math.sqrt(1 - ac_prev - sigma**2) * epsilon + sigma * NOISE[i]
    table = ddim(levels, Prediction(kind, clip), eta=eta, use_clipped_model_output=use_clipped)
    assert_close(run(table, kind=kind), x)


def test_ddim_refuses_an_eta_that_leaves_no_direction() -> None:
    levels = levels_from_half_log_snr(CLEAN)
    with pytest.raises(
        ValueError, match=r"ddim: eta is 3.0, which asks for more noise .*expected at most 1 .*; lower eta"
    ):
        ddim(levels, Prediction(), eta=3.0)
    for eta in (-0.1, math.nan, math.inf):
        with pytest.raises(ValueError, match=r"ddim: eta is .*expected a number of 0 or more; use 0"):
            ddim(levels, Prediction(), eta=eta)
