# SPDX-License-Identifier: MIT
"""Euler: the probability-flow ODE in σ̂ = σ/α (arXiv 2206.00364).

The paper holds samples as x̂ = x/α = x0 + σ̂·ε, whose derivative in σ̂ is ε.  Samples here stay in the model's
coordinates, so each update is the paper's with α_s in front.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..errors import as_float, error_message
from ..schedules.levels import Level, Levels
from .affine import NOISE, Affine
from .prediction import Prediction
from .table import StepTable


@dataclass(frozen=True)
class Churn:
    """Noise added before each model call (arXiv 2206.00364, algorithm 2).

    Args:
        s_churn: the total amount; 0 turns it off.
        s_tmin, s_tmax: the range of σ̂ in which it is added.
        s_noise: the standard deviation of the noise.
    """

    s_churn: float = 0.0
    s_tmin: float = 0.0
    s_tmax: float = math.inf
    s_noise: float = 1.0

    def __post_init__(self) -> None:
        for name in ("s_churn", "s_tmin", "s_tmax", "s_noise"):
            value = as_float("euler", name, getattr(self, name))
            if not value >= 0.0:
                raise ValueError(
                    error_message(
                        "euler", name, f"is {value}", "a number of 0 or more", "leave s_churn at 0 for no churn"
                    )
                )

    def raise_level(self, levels: Levels, index: int) -> tuple[Level, float]:
        """Return the level that churn raises a sample to before the model call, and the noise in x̂ that this takes."""
        level = levels[index]
        ratio = level.noise_ratio
        if index == len(levels) or not self.s_churn or math.isinf(ratio) or not self.s_tmin <= ratio <= self.s_tmax:
            return level, 0.0
        gamma = min(self.s_churn / len(levels), math.sqrt(2.0) - 1.0)
        raised = levels.locate(ratio * (1.0 + gamma))
        return raised, self.s_noise * ratio * math.sqrt((1.0 + gamma) ** 2 - 1.0)


def lifted(prev_sample: Affine, level: Level, raised: Level, noise: float) -> Affine:
    """Move a sample from one level to a noisier one: x̂ keeps its value and gains noise."""
    if raised is level:
        return prev_sample
    return (raised.alpha / level.alpha) * prev_sample + (raised.alpha * noise) * NOISE


def euler(levels: Levels, prediction: Prediction, *, churn: Churn | None = None) -> StepTable:
    """Compile the table of Euler's method in σ̂ with churn (arXiv 2206.00364, algorithm 2 without lines 6 to 8).

    The noise that churn adds before a model call is added at the end of the step before it: the same draw, without a
    pass over memory of its own.  Before the first call it is part of the initial noise.

    Args:
        levels: the levels to visit.
        prediction: how to read the model.
        churn: noise added before each model call; None adds none.
    """
    churn = churn or Churn()
    rows = []
    for i in range(len(levels)):
        t, _ = churn.raise_level(levels, i)
        s = levels[i + 1]
        model = prediction.at(t)
        prev = s.alpha * model.x0 + s.sigma * model.consistent_noise
        rows.append(model.row(lifted(prev, s, *churn.raise_level(levels, i + 1))))
    return StepTable(tuple(rows), levels.initial_scale, thresholding=prediction.thresholding)
