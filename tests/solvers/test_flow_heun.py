# SPDX-License-Identifier: MIT
"""Flow Heun against its formula on numbers."""

from __future__ import annotations

import itertools

import numpy as np

from fastdiff.schedules.levels import levels_from_flow_times, levels_from_half_log_snr
from fastdiff.solvers import Prediction, PredictionType, flow_heun
from support.formulas import CLEAN, START, assert_close, epsilon_of, run, x0_of
from support.solver_loops import Array, Outputs, evaluate

TIMES = [1.0, 0.85, 0.5, 0.45, 0.1, 0.0]


def _velocity(x: Array, timestep: float) -> Array:
    return np.tanh(x - timestep / 700.0)


def test_flow_heun_follows_its_formula() -> None:
    x = START
    for t, s in itertools.pairwise(TIMES):
        v = _velocity(x, 1000.0 * t)
        end = x + (s - t) * v
        x = end if s == 0.0 else x + (s - t) * (v + _velocity(end, 1000.0 * s)) / 2
    table = flow_heun(levels_from_flow_times(TIMES), Prediction(PredictionType.FLOW_PREDICTION))
    assert len(table) == 2 * (len(TIMES) - 1) - 1
    assert_close(evaluate(table, lambda x, t: Outputs(_velocity(x, t)), START), x)


def test_flow_heun_holds_on_any_path() -> None:
    """On other paths the straight path's sample is x/(α + σ), and its time σ/(α + σ)."""
    levels = levels_from_half_log_snr(CLEAN)
    straight = START / (levels[0].alpha + levels[0].sigma)
    for i in range(len(levels)):
        t, s = levels[i], levels[i + 1]
        step = s.sigma / (s.alpha + s.sigma) - t.sigma / (t.alpha + t.sigma)
        x = straight * (t.alpha + t.sigma)
        v = epsilon_of(x, t) - x0_of(x, t.timestep)
        end = straight + step * v
        if s.sigma > 0.0:
            x = end * (s.alpha + s.sigma)
            v = (v + epsilon_of(x, s) - x0_of(x, s.timestep)) / 2
        straight = straight + step * v
    assert_close(run(flow_heun(levels, Prediction())), straight)
