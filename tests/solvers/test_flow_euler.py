# SPDX-License-Identifier: MIT
"""Flow Euler against its formula on numbers."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from fastdiff.schedules.levels import levels_from_flow_times, levels_from_half_log_snr
from fastdiff.solvers import Prediction, PredictionType, ddim, flow_euler
from support.formulas import CLEAN, NOISE, START, assert_close
from support.solver_loops import Array, Outputs, evaluate

TIMES = [1.0, 0.85, 0.5, 0.45, 0.1, 0.0]
FLOW = Prediction(PredictionType.FLOW_PREDICTION)


def _velocity(x: Array, timestep: float) -> Array:
    return np.tanh(x - timestep / 700.0)


@pytest.mark.parametrize("stochastic", [False, True])
def test_flow_euler_follows_its_formula(stochastic: bool) -> None:
    x = START
    for i, (t, s) in enumerate(itertools.pairwise(TIMES)):
        v = _velocity(x, 1000.0 * t)
        x = (1 - s) * (x - t * v) + s * NOISE[i] if stochastic else x + (s - t) * v
    table = flow_euler(levels_from_flow_times(TIMES), FLOW, stochastic_sampling=stochastic)
    assert_close(evaluate(table, lambda x, t: Outputs(_velocity(x, t)), START, NOISE), x)


def test_flow_euler_reads_the_output_alone_on_the_straight_path() -> None:
    for row in flow_euler(levels_from_flow_times(TIMES), FLOW):
        assert row.prev_sample.coefficients[0] == 1.0
        assert not any(row.prev_sample.coefficients[2:])


def test_flow_euler_is_ddim_on_any_path() -> None:
    levels = levels_from_half_log_snr(CLEAN)
    for row, other in zip(flow_euler(levels, Prediction()), ddim(levels, Prediction()), strict=True):
        np.testing.assert_allclose(row.prev_sample.coefficients, other.prev_sample.coefficients, atol=1e-13)
