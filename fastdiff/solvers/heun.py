# SPDX-License-Identifier: MIT
"""Heun: the trapezoidal rule on the probability-flow ODE in σ̂ = σ/α, in the coordinates of euler.py."""

from __future__ import annotations

import math

from ..schedules.levels import Levels
from .affine import HISTORY, SAMPLE
from .euler import Churn, lifted
from .prediction import Prediction
from .table import Row, StepTable


def heun(levels: Levels, prediction: Prediction, *, churn: Churn | None = None) -> StepTable:
    """Compile the table of Heun's method in σ̂ (arXiv 2206.00364, algorithm 2): two model calls a step.

    The first row of a step is Euler's and keeps its slope ε₁.  The second row starts from Euler's result and
    exchanges half of the slope, ``prev = x + α_s·(σ̂_s − σ̂_t)/2·(ε₂ − ε₁)``: the paper's update without keeping the
    first sample.  A step to σ = 0, where the slope is undefined, or from infinite σ̂ is Euler's alone.

    Args:
        levels: the levels to visit.
        prediction: how to read the model.
        churn: noise added before each step; None adds none.
    """
    churn = churn or Churn()
    first_slope = HISTORY[0]
    rows: list[Row] = []
    for i in range(len(levels)):
        t, _ = churn.raise_level(levels, i)
        s = levels[i + 1]
        lift = churn.raise_level(levels, i + 1)
        model = prediction.at(t)
        prev = s.alpha * model.x0 + s.sigma * model.consistent_noise
        if s.sigma == 0.0 or math.isinf(t.noise_ratio):
            rows.append(model.row(lifted(prev, s, *lift)))
            continue
        rows.append(model.row(prev, kept=(model.consistent_noise,), slots=(0,)))
        end = prediction.at(s)
        half_step = 0.5 * s.alpha * (s.noise_ratio - t.noise_ratio)
        prev = SAMPLE + half_step * (end.consistent_noise - first_slope)
        rows.append(end.row(lifted(prev, s, *lift)))
    return StepTable(tuple(rows), levels.initial_scale, thresholding=prediction.thresholding)
