# SPDX-License-Identifier: MIT
"""TCD: strategic stochastic sampling of a trajectory consistency model: below the next level, and back up by noise."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..errors import error_message
from ..schedules.levels import Level, Levels
from .affine import NOISE
from .ddim import check_eta
from .prediction import Prediction
from .table import StepTable


def tcd(levels: Levels, prediction: Prediction, *, eta: float = 0.3) -> StepTable:
    """Compile the table of strategic stochastic sampling (arXiv 2402.19159, algorithm 4, γ there).

    Each step goes to the level r at (1 − γ) times the time of s, ``α_r·x0 + σ_r·ε``, and from there up to s with fresh
    noise: ``prev = (α_s/α_r)·x_r + √(σ_s² − (α_s/α_r)²·σ_r²)·z``.  A step to σ = 0 ends at x0.

    Args:
        levels: the levels to visit.
        prediction: how to read the model.
        eta: γ from 0, which is DDIM, to 1.

    Raises:
        ValueError: eta is not between 0 and 1.
    """
    check_eta("tcd", eta)
    if eta > 1.0:
        raise ValueError(error_message("tcd", "eta", f"is {eta}", "a number from 0 to 1", "0.3 is the usual one"))
    return tcd_through(levels, prediction, [levels.at_fraction(s, 1.0 - eta) for s in levels.points[1:]])


def tcd_through(levels: Levels, prediction: Prediction, below_levels: Sequence[Level]) -> StepTable:
    """Compile the table of `tcd` for given levels r, one for each step, none with more noise than the step's end."""
    rows = []
    for i, below in enumerate(below_levels):
        t, s = levels[i], levels[i + 1]
        model = prediction.at(t)
        back = s.alpha / below.alpha if below is not s else 1.0
        std = math.sqrt(max(s.sigma**2 - (back * below.sigma) ** 2, 0.0))
        prev = back * (below.alpha * model.x0 + below.sigma * model.consistent_noise)
        rows.append(model.row(prev + std * NOISE))
    return StepTable(tuple(rows), levels.initial_scale, thresholding=prediction.thresholding)
