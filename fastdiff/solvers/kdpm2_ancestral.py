# SPDX-License-Identifier: MIT
"""KDPM2 ancestral: a midpoint step to less noise than the next level has, and fresh noise up to that level."""

from __future__ import annotations

import math

from ..errors import as_float
from ..schedules.levels import Levels
from .adams import plain_step
from .affine import NOISE
from .kdpm2 import midpoint_step
from .prediction import Prediction
from .sigma_steps import ancestral_split
from .table import Row, StepTable


def kdpm2_ancestral(levels: Levels, prediction: Prediction, *, eta: float = 1.0, s_noise: float = 1.0) -> StepTable:
    """Compile the table of k-diffusion's `sample_dpm_2_ancestral`: `kdpm2` to σ̂_down, and noise σ̂_up on top.

    σ̂_down and σ̂_up are those of `euler_ancestral`.  A step that goes down to σ = 0, or from infinite σ̂, makes one call.

    Args:
        levels: the levels to visit.
        prediction: how to read the model.
        eta: 0 is `kdpm2`, 1 (the default) is DDPM's noise.
        s_noise: the standard deviation of the added noise.
    """
    as_float("kdpm2_ancestral", "s_noise", s_noise)
    rows: list[Row] = []
    for i in range(len(levels)):
        t, s = levels[i], levels[i + 1]
        down, up = ancestral_split("kdpm2_ancestral", t.noise_ratio, s.noise_ratio, eta)
        # From the level that the step goes down to, back to s: x̂ keeps its value and gains noise.
        below = levels.locate(down) if down < s.noise_ratio else s
        back, noise = s.alpha / below.alpha, (s.alpha * up * s_noise) * NOISE
        if below.sigma == 0.0 or math.isinf(t.noise_ratio):
            model = prediction.at(t)
            rows.append(model.row(back * plain_step(model, below) + noise))
            continue
        first, second, prev = midpoint_step(levels, prediction, t, below)
        rows += [first, second.row(back * prev + noise)]
    return StepTable(tuple(rows), levels.initial_scale, thresholding=prediction.thresholding)
