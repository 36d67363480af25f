# SPDX-License-Identifier: MIT
"""Flow Euler: Euler's method on the ODE of flow matching, in the time u = σ/(α + σ).

On the straight path α = 1 − u and σ = u the slope dx/du is v = ε − x0.  A level of any other path is a point of the
straight one times α + σ, so that every update holds there with these factors.
"""

from __future__ import annotations

from ..errors import checked_bool
from ..schedules.levels import Level, Levels
from .affine import NOISE, SAMPLE, Affine
from .prediction import Denoised, Prediction
from .table import StepTable


def flow_euler(levels: Levels, prediction: Prediction, *, stochastic_sampling: bool = False) -> StepTable:
    """Compile the table of Euler's method for rectified flow (arXiv 2209.03003, section 2.1): ``x + (u_s − u_t)·v``.

    Args:
        levels: the levels to visit.
        prediction: how to read the model.
        stochastic_sampling: step to ``α_s·x0 + σ_s·z`` with fresh noise z instead, for few-step distilled models.

    Raises:
        TypeError: stochastic_sampling is not a bool.
    """
    checked_bool("flow_euler", "stochastic_sampling", stochastic_sampling)
    rows = []
    for i in range(len(levels)):
        t, s = levels[i], levels[i + 1]
        model = prediction.at(t)
        fresh = s.alpha * model.x0 + s.sigma * NOISE
        rows.append(model.row(fresh if stochastic_sampling else flow_step(model, t, s)))
    return StepTable(tuple(rows), levels.initial_scale, thresholding=prediction.thresholding)


def velocity(model: Denoised) -> Affine:
    """Return v = ε − x0, with the ε of a clipped x0."""
    return model.consistent_noise - model.x0


def flow_span(t: Level, s: Level) -> tuple[float, float]:
    """Return (a, c) of Euler's step ``a·x + c·v`` from t to s."""
    scale = s.alpha + s.sigma
    return scale / (t.alpha + t.sigma), scale * (s.sigma / scale - t.sigma / (t.alpha + t.sigma))


def flow_step(model: Denoised, t: Level, s: Level) -> Affine:
    """Return the sample after Euler's step from t to s."""
    x, slope = flow_span(t, s)
    return x * SAMPLE + slope * velocity(model)
