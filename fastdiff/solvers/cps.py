# SPDX-License-Identifier: MIT
"""Coefficients-preserving sampling: a stochastic step whose total noise is that of the level it goes to."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..errors import error_message
from ..schedules.levels import Levels
from .affine import NOISE
from .flow_sde import step_noise_levels
from .prediction import Prediction
from .table import StepTable


def cps(levels: Levels, prediction: Prediction, *, noise_level: float | Sequence[float] = 0.7) -> StepTable:
    """Compile the table of Coefficients-Preserving Sampling (arXiv 2509.05952).

    ``prev = α_s·x0 + σ_s·cos(ηπ/2)·ε + σ_s·sin(ηπ/2)·z``: the model's noise and the fresh one share the variance σ_s²,
    so samples carry no more noise than their level says.  It is DDIM with the standard deviation σ_s·sin(ηπ/2), on a
    flow path (α = 1 − t, σ = t) as on any other.  A step to the clean sample adds no noise.

    Args:
        levels: the levels to visit.
        prediction: how to read the model.
        noise_level: η from 0, the ODE's step, to 1, where all noise is fresh; or one a step.

    Raises:
        TypeError, ValueError: a noise level is outside 0 to 1 or no number, or there are not as many as steps.
    """
    amounts = step_noise_levels("cps", "noise_level", noise_level, len(levels))
    if max(amounts) > 1.0:
        remedy = "use 0 for the ODE and 1 for fresh noise alone"
        raise ValueError(error_message("cps", "noise_level", f"is {max(amounts)}", "0 to 1", remedy))
    rows = []
    for i, amount in enumerate(amounts):
        s = levels[i + 1]
        model = prediction.at(levels[i])
        # cos(π/2) is not 0 in float64.
        kept, fresh = (
            (0.0, 1.0) if amount == 1.0 else (math.cos(0.5 * math.pi * amount), math.sin(0.5 * math.pi * amount))
        )
        rows.append(model.row(s.alpha * model.x0 + s.sigma * (kept * model.noise + fresh * NOISE)))
    return StepTable(tuple(rows), levels.initial_scale, thresholding=prediction.thresholding)
