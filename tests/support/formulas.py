# SPDX-License-Identifier: MIT
"""Grids, a model and the papers' steps, for the tests of a solver's rows against its formula, on numbers."""

from __future__ import annotations

import math

import numpy as np

from fastdiff.schedules.levels import Level, Levels
from fastdiff.solvers import Churn, PredictionType
from fastdiff.solvers.table import StepTable
from support.loops import Array, ElementModel, Outputs, evaluate, level_of, output_for

#: Both sides do some tens of operations a step on numbers of size 10 at most: 20·2⁻⁵³·10·(6 steps) = 1e-13.
TOLERANCE = 1e-11
SHAPE = (4,)

_random = np.random.default_rng(3)
START, NOISE = _random.standard_normal(SHAPE), [_random.standard_normal(SHAPE) for _ in range(16)]
GRID = (-1.6, -1.1, -0.4, 0.1, 0.9, 1.5)
CLEAN = (*GRID, math.inf)


def x0_of(x: Array, half_log_snr: float) -> Array:
    return np.tanh(x + 0.3 * half_log_snr)


def epsilon_of(x: Array, level: Level) -> Array:
    return (x - level.alpha * x0_of(x, level.timestep)) / level.sigma


def model_of(kind: PredictionType = PredictionType.EPSILON, variance: Array | None = None) -> ElementModel:
    def model(x: Array, half_log_snr: float) -> Outputs:
        return Outputs(output_for(kind, level_of(half_log_snr), x, x0_of(x, half_log_snr)), None, variance)

    return model


def run(table: StepTable, **options: object) -> Array:
    return evaluate(table, model_of(**options), START, NOISE)  # type: ignore[arg-type]


def assert_close(ours: Array, theirs: Array) -> None:
    np.testing.assert_allclose(ours, theirs, rtol=TOLERANCE, atol=TOLERANCE)


def first_order_step(algorithm: str, x: Array, d: Array, s: Level, t: Level, z: Array) -> Array:
    """From s to t given x0 or ε at s: DPM-Solver eq. 3.7, ++ eq. 13, SDE eq. 18 of 2211.01095 and of its appendix."""
    h = t.half_log_snr - s.half_log_snr
    if algorithm == "dpmsolver":
        return t.alpha / s.alpha * x - t.sigma * (math.exp(h) - 1) * d
    if algorithm == "dpmsolver++":
        return t.sigma / s.sigma * x - t.alpha * (math.exp(-h) - 1) * d
    if algorithm == "sde-dpmsolver":
        return (
            t.alpha / s.alpha * x - 2 * t.sigma * (math.exp(h) - 1) * d + t.sigma * math.sqrt(math.exp(2 * h) - 1) * z
        )
    decay = t.sigma / s.sigma * math.exp(-h)
    return decay * x + t.alpha * (1 - math.exp(-2 * h)) * d + t.sigma * math.sqrt(1 - math.exp(-2 * h)) * z


def read_output(algorithm: str, x: Array, level: Level) -> Array:
    return x0_of(x, level.timestep) if algorithm.endswith("++") else epsilon_of(x, level)


def edm_loop(levels: Levels, churn: Churn, *, second_order: bool) -> Array:
    """Algorithm 2 of arXiv 2206.00364 in its own terms, x̂ = x/α and D = x0, with α·x̂ where it ends."""
    sigmas = [level.noise_ratio for level in levels.points]
    n = len(levels)

    def denoise(x_hat: Array, sigma: float) -> Array:
        level = level_of(-math.log(sigma))
        return x0_of(level.alpha * x_hat, level.timestep)

    rows = 0
    raised_first = min(churn.s_churn / n, math.sqrt(2) - 1) if churn.s_tmin <= sigmas[0] <= churn.s_tmax else 0.0
    # The first churn is part of the initial noise: the loop begins at the raised level.
    x_hat = START / level_of(-math.log(sigmas[0] * (1 + raised_first))).alpha
    for i in range(n):
        gamma = min(churn.s_churn / n, math.sqrt(2) - 1) if churn.s_tmin <= sigmas[i] <= churn.s_tmax else 0.0
        raised = sigmas[i] * (1 + gamma)
        if i > 0:
            x_hat = x_hat + math.sqrt(raised**2 - sigmas[i] ** 2) * churn.s_noise * NOISE[rows - 1]
        slope = (x_hat - denoise(x_hat, raised)) / raised
        following = x_hat + (sigmas[i + 1] - raised) * slope
        rows += 1
        if second_order and sigmas[i + 1] != 0.0:
            other = (following - denoise(following, sigmas[i + 1])) / sigmas[i + 1]
            following = x_hat + (sigmas[i + 1] - raised) * (0.5 * slope + 0.5 * other)
            rows += 1
        x_hat = following
    return levels[n].alpha * x_hat


CHURNS = [Churn(), Churn(1.2, 0.3, 3.0, 1.02), Churn(30.0, 0.0, math.inf, 1.0), Churn(2.0)]
