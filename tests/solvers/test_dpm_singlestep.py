# SPDX-License-Identifier: MIT
"""The rows of singlestep DPM-Solver(++) against its papers' algorithms."""

from __future__ import annotations

import math

import pytest

from fastdiff.schedules.levels import levels_from_half_log_snr, with_intermediate_levels
from fastdiff.solvers import Prediction, dpm_singlestep
from support.formulas import GRID, START, assert_close, epsilon_of, first_order_step, read_output, run
from support.loops import level_of


@pytest.mark.parametrize("algorithm", ["dpmsolver", "dpmsolver++"])
@pytest.mark.parametrize("r1", [0.5, 0.3])
def test_dpm_singlestep_second_order_is_algorithm_1(algorithm: str, r1: float) -> None:
    """arXiv 2206.00927, algorithm 4 (its algorithm 1 at r = 1/2), and 2211.01095, algorithm 1, in the papers' terms."""
    coarse = levels_from_half_log_snr(GRID)
    x = START
    for s, t in zip(coarse.points[:-1], coarse.points[1:], strict=True):
        h = t.half_log_snr - s.half_log_snr
        mid = level_of(s.half_log_snr + r1 * h)
        d = read_output(algorithm, x, s)
        u = first_order_step(algorithm, x, d, s, mid, START)
        gap = read_output(algorithm, u, mid) - d
        scale = -t.sigma * (math.exp(h) - 1) if algorithm == "dpmsolver" else -t.alpha * (math.exp(-h) - 1)
        x = first_order_step(algorithm, x, d, s, t, START) + scale / (2 * r1) * gap
    levels = with_intermediate_levels(coarse, [r1])
    table = dpm_singlestep(levels, Prediction(), algorithm_type=algorithm, solver_order=2)
    assert_close(run(table), x)


@pytest.mark.parametrize(("r1", "r2"), [(1 / 3, 2 / 3), (0.25, 0.6)])
def test_dpm_singlestep_third_order_is_algorithm_2(r1: float, r2: float) -> None:
    """arXiv 2206.00927, algorithm 5 (its algorithm 2 at r = 1/3, 2/3), in the paper's terms."""
    coarse = levels_from_half_log_snr(GRID)
    x = START
    for s, t in zip(coarse.points[:-1], coarse.points[1:], strict=True):
        h = t.half_log_snr - s.half_log_snr
        l1, l2 = level_of(s.half_log_snr + r1 * h), level_of(s.half_log_snr + r2 * h)
        e0 = epsilon_of(x, s)
        u1 = l1.alpha / s.alpha * x - l1.sigma * math.expm1(r1 * h) * e0
        d1 = epsilon_of(u1, l1) - e0
        u2 = l2.alpha / s.alpha * x - l2.sigma * math.expm1(r2 * h) * e0
        u2 = u2 - l2.sigma * r2 / r1 * (math.expm1(r2 * h) / (r2 * h) - 1) * d1
        d2 = epsilon_of(u2, l2) - e0
        x = t.alpha / s.alpha * x - t.sigma * math.expm1(h) * e0 - t.sigma / r2 * (math.expm1(h) / h - 1) * d2
    levels = with_intermediate_levels(coarse, [r1, r2])
    table = dpm_singlestep(levels, Prediction(), algorithm_type="dpmsolver", solver_order=3)
    assert_close(run(table), x)
