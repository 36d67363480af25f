# SPDX-License-Identifier: MIT
"""Euler ancestral: an Euler step in σ̂ = σ/α to less noise than the next level has, and fresh noise up to that level."""

from __future__ import annotations

import math

from ..errors import as_float
from ..schedules.levels import Level, Levels
from .affine import NOISE
from .ddim import check_eta
from .prediction import Prediction
from .table import StepTable


def euler_ancestral(levels: Levels, prediction: Prediction, *, eta: float = 1.0, s_noise: float = 1.0) -> StepTable:
    """Compile the table of ancestral sampling with Euler steps, as k-diffusion defines it.

    Each step goes down to σ̂_down and up again with noise σ̂_up, σ̂_down² + σ̂_up² = σ̂_s²::

        σ̂_up = min(σ̂_s, η·√(σ̂_s²·(σ̂_t² − σ̂_s²)/σ̂_t²))

    Args:
        levels: the levels to visit.
        prediction: how to read the model.
        eta: 0 is Euler, 1 (the default) is DDPM's noise.
        s_noise: the standard deviation of the added noise.
    """
    check_eta("euler_ancestral", eta)
    as_float("euler_ancestral", "s_noise", s_noise)
    rows = []
    for i in range(len(levels)):
        t, s = levels[i], levels[i + 1]
        model = prediction.at(t)
        down, up = ancestral_ratios(t, s, eta)
        prev = s.alpha * (model.x0 + down * model.consistent_noise + up * s_noise * NOISE)
        rows.append(model.row(prev))
    return StepTable(tuple(rows), levels.initial_scale, thresholding=prediction.thresholding)


def ancestral_ratios(t: Level, s: Level, eta: float) -> tuple[float, float]:
    """Return σ̂_down and σ̂_up of an ancestral step from t to s."""
    target, fraction = s.noise_ratio, s.noise_ratio / t.noise_ratio
    up = min(target, eta * target * math.sqrt(1.0 - fraction**2))
    return math.sqrt(target**2 - up**2), up
