# SPDX-License-Identifier: MIT
"""Euler ancestral: an Euler step in σ̂ = σ/α to less noise than the next level has, and fresh noise up to that level."""

from __future__ import annotations

from ..errors import as_float
from ..schedules.levels import Levels
from .affine import NOISE
from .prediction import Prediction
from .sigma_steps import ancestral_split
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
    as_float("euler_ancestral", "s_noise", s_noise)
    rows = []
    for i in range(len(levels)):
        t, s = levels[i], levels[i + 1]
        model = prediction.at(t)
        down, up = ancestral_split("euler_ancestral", t.noise_ratio, s.noise_ratio, eta)
        prev = s.alpha * (model.x0 + down * model.consistent_noise + up * s_noise * NOISE)
        rows.append(model.row(prev))
    return StepTable(tuple(rows), levels.initial_scale, thresholding=prediction.thresholding)
