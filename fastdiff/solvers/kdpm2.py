# SPDX-License-Identifier: MIT
"""KDPM2: the midpoint method on the probability-flow ODE in σ̂ = σ/α, the midpoint taken in log σ̂."""

from __future__ import annotations

import math

from ..schedules.levels import Level, Levels
from .adams import plain_step, transfer
from .affine import HISTORY, SAMPLE, Affine
from .euler import Churn, lifted
from .prediction import Denoised, Prediction
from .table import Row, StepTable


def kdpm2(levels: Levels, prediction: Prediction, *, churn: Churn | None = None) -> StepTable:
    """Compile the table of k-diffusion's `sample_dpm_2`: DPM-Solver-2 (arXiv 2206.00927) in the form of 2206.00364.

    Two model calls a step: ε at t leads to the level m with σ̂_m = √(σ̂_t·σ̂_s), and ε there from the first sample to s,
    ``prev/α_s = x/α_t + (σ̂_s − σ̂_t)·ε_m``.  A step to σ = 0 or from infinite σ̂ is Euler's, with one call.

    Args:
        levels: the levels to visit.
        prediction: how to read the model.
        churn: noise added before each step; None adds none.
    """
    churn = churn or Churn()
    rows: list[Row] = []
    for i in range(len(levels)):
        t, _ = churn.raise_level(levels, i)
        s = levels[i + 1]
        lift = churn.raise_level(levels, i + 1)
        if s.sigma == 0.0 or math.isinf(t.noise_ratio):
            model = prediction.at(t)
            rows.append(model.row(lifted(plain_step(model, s), s, *lift)))
            continue
        first, second, prev = midpoint_step(levels, prediction, t, s)
        rows += [first, second.row(lifted(prev, s, *lift))]
    return StepTable(tuple(rows), levels.initial_scale, thresholding=prediction.thresholding)


def midpoint_step(grid: Levels, reading: Prediction, t: Level, s: Level) -> tuple[Row, Denoised, Affine]:
    """Return the row from t to the midpoint, the model there, and the sample at s, which starts from history slot 0."""
    middle = grid.locate(math.sqrt(t.noise_ratio * s.noise_ratio))
    at_t, at_middle = reading.at(t), reading.at(middle)
    x, slope = transfer(t, s)
    first = at_t.row(plain_step(at_t, middle), kept=(SAMPLE,), slots=(0,))
    return first, at_middle, x * HISTORY[0] + slope * at_middle.consistent_noise
