# SPDX-License-Identifier: MIT
"""Heun++: Heun's method with a third slope one step ahead, each slope weighed by its noise level."""

from __future__ import annotations

from ..schedules.levels import Levels
from .affine import HISTORY, SAMPLE
from .euler import Churn, lifted
from .prediction import Prediction
from .sigma_steps import noise_ratios
from .table import Row, StepTable


def heunpp2(levels: Levels, prediction: Prediction, *, churn: Churn | None = None) -> StepTable:
    """Compile the table of Heun++ of order 2 (Carzit, sd-webui-samplers-scheduler; there is no paper).

    A step calls the model at its start and, by Euler steps, at the next two levels, and takes the slope
    ``w_1·ε_1 + w_2·ε_2 + w_3·ε_3`` with w_2 = σ̂_{i+1}/(3·σ̂_0), w_3 = σ̂_{i+2}/(3·σ̂_0) and w_1 the rest.  The last step
    but one has two slopes, w_2 = σ̂_{i+1}/(2·σ̂_0), and the last step is Euler's.

    Args:
        levels: the levels to visit.
        prediction: how to read the model.
        churn: noise added before each step; None adds none.
    """
    churn = churn or Churn()
    sigmas = noise_ratios("heunpp2", levels)
    n = len(levels)
    rows: list[Row] = []
    for i in range(n):
        t, _ = churn.raise_level(levels, i)
        lift = churn.raise_level(levels, i + 1)
        s = levels[i + 1]
        step = sigmas[i + 1] - t.noise_ratio
        model = prediction.at(t)
        prev = s.alpha * model.x0 + s.sigma * model.consistent_noise
        if i == n - 1:
            rows.append(model.row(lifted(prev, s, *lift)))
            continue
        rows.append(model.row(prev, kept=(model.consistent_noise,), slots=(0,)))
        # Each later row exchanges the slopes that its sample was made with for the weighed ones.
        second, first_slope = prediction.at(s), HISTORY[0]
        if i == n - 2:
            w2 = sigmas[i + 1] / (2.0 * sigmas[0])
            prev = SAMPLE + (s.alpha * step * w2) * (second.consistent_noise - first_slope)
            rows.append(second.row(lifted(prev, s, *lift)))
            continue
        u = levels[i + 2]
        ahead = sigmas[i + 2] - sigmas[i + 1]
        prev = u.alpha * second.x0 + u.sigma * second.consistent_noise
        rows.append(second.row(prev, kept=(second.consistent_noise,), slots=(1,)))
        w2, w3 = sigmas[i + 1] / (3.0 * sigmas[0]), sigmas[i + 2] / (3.0 * sigmas[0])
        third, second_slope = prediction.at(u), HISTORY[1]
        prev = SAMPLE / u.alpha - ahead * second_slope
        prev = prev + step * (w2 * (second_slope - first_slope) + w3 * (third.consistent_noise - first_slope))
        rows.append(third.row(lifted(s.alpha * prev, s, *lift)))
    return StepTable(tuple(rows), levels.initial_scale, thresholding=prediction.thresholding)
