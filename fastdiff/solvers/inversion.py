# SPDX-License-Identifier: MIT
"""DDIM inversion: a table that walks the levels upwards, from the clean sample to the noise."""

from __future__ import annotations

from ..errors import checked_integer, error_message
from ..schedules.levels import Levels
from .affine import HISTORY, SAMPLE
from .prediction import Prediction
from .table import StepTable

_SLOT = 0


def ddim_inversion(levels: Levels, prediction: Prediction, *, iterations: int = 1) -> StepTable:
    """Compile the table of DDIM inversion (arXiv 2105.05233, appendix F), each step solved by fixed-point iteration.

    DDIM's step from t to s is undone by ``x_t = (α_t/α_s)·x_s + (σ_t − (α_t/α_s)·σ_s)·ε(x_t)``.  The first row of a
    step reads ε from the model at (x_s, t); each further one at the last x_t, with x_s from a history slot
    (arXiv 2309.04907, 2312.12540).  The iteration contracts by (σ_t − (α_t/α_s)·σ_s) times the Lipschitz constant of ε,
    little for steps of the usual lengths.

    Args:
        levels: those of the loop that is inverted, from noise to the clean sample; the rows go from the last to the
            first.
        prediction: how to read the model; x0 is not bounded, for a bounded x0 cannot be undone.
        iterations: model calls a step, 1 or more.

    Raises:
        TypeError, ValueError: x0 is bounded, or `iterations` is no integer of 1 or more.
    """
    count = checked_integer("ddim_inversion", "iterations", iterations, 1)
    if prediction.bounds_x0:
        remedy = "make the sampler with clip_sample=False, without thresholding"
        raise ValueError(error_message("ddim_inversion", "prediction", "bounds x0", "an x0 without bounds", remedy))
    rows = []
    for i in reversed(range(len(levels))):
        t, s = levels[i], levels[i + 1]
        model = prediction.at(t)
        ratio = t.alpha / s.alpha
        change = (t.sigma - ratio * s.sigma) * model.noise
        rows.append(model.row(ratio * SAMPLE + change, kept=(SAMPLE,), slots=(_SLOT,)))
        rows += [model.row(ratio * HISTORY[_SLOT] + change)] * (count - 1)
    return StepTable(tuple(rows))
