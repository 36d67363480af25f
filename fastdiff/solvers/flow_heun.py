# SPDX-License-Identifier: MIT
"""Flow Heun: the trapezoidal rule on the ODE of flow matching, in the time and coordinates of flow_euler.py."""

from __future__ import annotations

from ..schedules.levels import Levels
from .affine import HISTORY, SAMPLE
from .flow_euler import flow_span, flow_step, velocity
from .prediction import Prediction
from .table import Row, StepTable


def flow_heun(levels: Levels, prediction: Prediction) -> StepTable:
    """Compile the table of Heun's method for rectified flow (arXiv 2209.03003; the method of 2206.00364, algorithm 2).

    Two model calls a step.  The second row starts from Euler's result and exchanges half of the slope,
    ``x + (u_s − u_t)/2·(v₂ − v₁)``.  A step to σ = 0 is Euler's alone; one from pure noise is not, since v is finite
    there.

    Args:
        levels: the levels to visit.
        prediction: how to read the model.
    """
    rows: list[Row] = []
    for i in range(len(levels)):
        t, s = levels[i], levels[i + 1]
        model = prediction.at(t)
        if s.sigma == 0.0:
            rows.append(model.row(flow_step(model, t, s)))
            continue
        rows.append(model.row(flow_step(model, t, s), kept=(velocity(model),), slots=(0,)))
        end = prediction.at(s)
        _, slope = flow_span(t, s)
        rows.append(end.row(SAMPLE + (0.5 * slope) * (velocity(end) - HISTORY[0])))
    return StepTable(tuple(rows), levels.initial_scale, thresholding=prediction.thresholding)
