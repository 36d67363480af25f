# SPDX-License-Identifier: MIT
"""Euler, Euler-ancestral and Heun: the probability-flow ODE in σ̂ = σ/α (arXiv 2206.00364).

Their papers hold samples as x̂ = x/α = x0 + σ̂·ε, whose derivative in σ̂ is ε.  Samples here stay in model
coordinates, so each update is the paper's with α_s in front.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..errors import as_float, error_message
from ..schedules.levels import Level, Levels
from .affine import HISTORY, NOISE, SAMPLE, Affine
from .ddim import check_eta
from .prediction import Prediction
from .table import Row, StepTable


@dataclass(frozen=True)
class Churn:
    """Noise put in before each model call (arXiv 2206.00364, algorithm 2).

    Args:
        s_churn: how much in all; 0 turns it off.
        s_tmin, s_tmax: the range of σ̂ in which it is done.
        s_noise: the standard deviation of the noise put in.
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
        """The level to which churn lifts the sample before the call, and the noise in x̂ that it takes."""
        level = levels[index]
        ratio = level.noise_ratio
        if index == len(levels) or not self.s_churn or math.isinf(ratio) or not self.s_tmin <= ratio <= self.s_tmax:
            return level, 0.0
        gamma = min(self.s_churn / len(levels), math.sqrt(2.0) - 1.0)
        raised = levels.locate(ratio * (1.0 + gamma))
        return raised, self.s_noise * ratio * math.sqrt((1.0 + gamma) ** 2 - 1.0)


def _lifted(prev_sample: Affine, level: Level, raised: Level, noise: float) -> Affine:
    """Move a sample from one level to a noisier one: x̂ keeps its value and gains noise."""
    if raised is level:
        return prev_sample
    return (raised.alpha / level.alpha) * prev_sample + (raised.alpha * noise) * NOISE


def euler(levels: Levels, prediction: Prediction, *, churn: Churn | None = None) -> StepTable:
    """The table of Euler's method in σ̂ with optional churn (arXiv 2206.00364, algorithm 2 without lines 6 to 8).

    The noise that churn wants before a model call is added at the end of the step before it: the same draw, and
    no pass over memory of its own.  Before the first call it is part of the initial noise.
    """
    churn = churn or Churn()
    rows = []
    for i in range(len(levels)):
        t, _ = churn.raise_level(levels, i)
        s = levels[i + 1]
        model = prediction.at(t)
        prev = s.alpha * model.x0 + s.sigma * model.consistent_noise
        rows.append(model.row(_lifted(prev, s, *churn.raise_level(levels, i + 1))))
    return StepTable(tuple(rows), levels.initial_scale, thresholding=prediction.thresholding)


def euler_ancestral(levels: Levels, prediction: Prediction, *, eta: float = 1.0, s_noise: float = 1.0) -> StepTable:
    """The table of ancestral sampling with Euler steps, as k-diffusion defines it.

    Each step goes down to σ̂_down and up again with noise σ̂_up, σ̂_down² + σ̂_up² = σ̂_s²::

        σ̂_up = min(σ̂_s, η·√(σ̂_s²·(σ̂_t² − σ̂_s²)/σ̂_t²))

    Args:
        levels: the levels to visit.
        prediction: how to read the model.
        eta: 0 is Euler, 1 (the default) is DDPM's noise.
        s_noise: the standard deviation of the noise put back.
    """
    check_eta("euler_ancestral", eta)
    as_float("euler_ancestral", "s_noise", s_noise)
    rows = []
    for i in range(len(levels)):
        t, s = levels[i], levels[i + 1]
        model = prediction.at(t)
        target, fraction = s.noise_ratio, s.noise_ratio / t.noise_ratio
        up = min(target, eta * target * math.sqrt(1.0 - fraction**2))
        down = math.sqrt(target**2 - up**2)
        prev = s.alpha * (model.x0 + down * model.consistent_noise + up * s_noise * NOISE)
        rows.append(model.row(prev))
    return StepTable(tuple(rows), levels.initial_scale, thresholding=prediction.thresholding)


def heun(levels: Levels, prediction: Prediction, *, churn: Churn | None = None) -> StepTable:
    """The table of Heun's method in σ̂ (arXiv 2206.00364, algorithm 2): two model calls a step.

    The first row of a step is Euler's and keeps its slope ε₁.  The second starts from what Euler gave and
    exchanges half of the slope, ``prev = x + α_s·(σ̂_s − σ̂_t)/2·(ε₂ − ε₁)``: the paper's update without keeping the
    sample it started from.  A step to σ = 0, where no slope can be read, or from infinite σ̂ is Euler's alone.
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
            rows.append(model.row(_lifted(prev, s, *lift)))
            continue
        rows.append(model.row(prev, keep=(model.consistent_noise,), store=(0,)))
        end = prediction.at(s)
        half_step = 0.5 * s.alpha * (s.noise_ratio - t.noise_ratio)
        prev = SAMPLE + half_step * (end.consistent_noise - first_slope)
        rows.append(end.row(_lifted(prev, s, *lift)))
    return StepTable(tuple(rows), levels.initial_scale, thresholding=prediction.thresholding)
