# SPDX-License-Identifier: MIT
"""Gradient estimation: Euler's method with a slope extrapolated from the last two (arXiv 2306.04848)."""

from __future__ import annotations

from ..errors import as_float
from ..schedules.levels import Levels
from .affine import HISTORY
from .prediction import Prediction
from .sigma_steps import UNCOND, UNCOND_SLOT, noise_ratios, scaled
from .table import Row, StepTable


def gradient_estimation(
    levels: Levels, prediction: Prediction, *, ge_gamma: float = 2.0, cfg_pp: bool = False
) -> StepTable:
    """Compile the table of gradient estimation (arXiv 2306.04848, algorithm 2), ε̄ = γ·ε + (1 − γ)·ε_last.

    ``x̂ = x̂ + (σ̂_s − σ̂_t)·ε̄``; the first step is Euler's and the step to σ = 0 returns x0.

    Args:
        levels: the levels to visit.
        prediction: how to read the model.
        ge_gamma: γ; 1 is Euler's method, 2 the paper's choice.
        cfg_pp: the CFG++ form (arXiv 2406.08070): ε from the unconditional x0, in the history slot `UNCOND_SLOT`.
    """
    sigmas = noise_ratios("gradient_estimation", levels)
    gamma = as_float("gradient_estimation", "ge_gamma", ge_gamma)
    rows: list[Row] = []
    for i in range(len(levels)):
        t, s, model = levels[i], levels[i + 1], prediction.at(levels[i])
        slope = (scaled(t) - UNCOND) / sigmas[i] if cfg_pp else model.consistent_noise
        next_x = model.x0 + sigmas[i + 1] * slope
        if i > 0 and s.sigma > 0.0:
            next_x = next_x + ((sigmas[i + 1] - sigmas[i]) * (gamma - 1.0)) * (slope - HISTORY[0])
        rows.append(model.row(s.alpha * next_x, kept=(slope,), slots=(0,)))
    return StepTable(
        tuple(rows),
        levels.initial_scale,
        thresholding=prediction.thresholding,
        provided_slots=(UNCOND_SLOT,) if cfg_pp else (),
    )
