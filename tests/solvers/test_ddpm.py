# SPDX-License-Identifier: MIT
"""The rows of DDPM against its paper's equations."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fastdiff.row_layout import Variance
from fastdiff.schedules.levels import levels_from_half_log_snr
from fastdiff.solvers import Prediction, PredictionType, ddpm
from support.formulas import CLEAN, NOISE, START, assert_close, epsilon_of, run
from support.solver_loops import PREDICTION_TYPES


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
@pytest.mark.parametrize(
    "variance_type",
    [
        "fixed_small",
        "fixed_small_log",
        "fixed_large",
        "fixed_large_log",
        "learned",
        "learned_range",
        "learned_unit_range",
    ],
)
@pytest.mark.parametrize("clip", [math.inf, 0.6])
def test_ddpm_is_equations_6_and_7(variance_type: str, kind: PredictionType, clip: float) -> None:
    """arXiv 2006.11239, eq. 6 and 7 in β_t and ᾱ, as diffusers writes them; 2102.09672, eq. 15 for the ranges."""
    levels = levels_from_half_log_snr(CLEAN)
    v = np.array([-1.0, -0.3, 0.4, 1.0]) if variance_type == "learned_range" else np.array([0.2, 0.5, 0.9, 0.01])
    x = START
    for i in range(len(levels)):
        t, s = levels[i], levels[i + 1]
        ac, ac_prev = t.alpha**2, s.alpha**2
        alpha = ac / ac_prev
        beta = 1.0 - alpha
        x0 = np.clip((x - math.sqrt(1 - ac) * epsilon_of(x, t)) / math.sqrt(ac), -clip, clip)
        mean = math.sqrt(ac_prev) * beta / (1 - ac) * x0 + math.sqrt(alpha) * (1 - ac_prev) / (1 - ac) * x
        small = max((1 - ac_prev) / (1 - ac) * beta, 1e-20)
        variance = {
            "fixed_small": small,
            "fixed_small_log": math.exp(math.log(small)),
            "fixed_large": beta,
            # diffusers takes the root of log β here, which is no variance; what it means is β.
            "fixed_large_log": math.exp(math.log(beta)),
            "learned": v,
            "learned_range": np.exp((v + 1) / 2 * math.log(beta) + (1 - v) / 2 * math.log(small)),
            "learned_unit_range": np.exp(v * math.log(beta) + (1 - v) * math.log(small)),
        }[variance_type]
        x = mean + (np.sqrt(variance) * NOISE[i] if i + 1 < len(levels) else 0.0)
    table = ddpm(levels, Prediction(kind, clip), variance_type=variance_type)
    learned = variance_type.startswith("learned")
    assert (table.variance is not Variance.FIXED) == learned
    assert_close(run(table, kind=kind, variance=v if learned else None), x)
