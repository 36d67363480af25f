# SPDX-License-Identifier: MIT
"""RES multistep: a second-order exponential integrator with the last x0 (arXiv 2308.02157), ancestral and CFG++ too."""

from __future__ import annotations

import math

from ..errors import as_float
from ..schedules.levels import Levels
from .affine import HISTORY, NOISE, Affine
from .exponential import phi1, phi2
from .prediction import Prediction
from .sigma_steps import UNCOND, UNCOND_SLOT, ancestral_split, noise_ratios, scaled
from .table import Row, StepTable


def res_multistep(
    levels: Levels, prediction: Prediction, *, eta: float = 0.0, s_noise: float = 1.0, cfg_pp: bool = False
) -> StepTable:
    """Compile the table of the two-step method of arXiv 2308.02157 (section 3, φ₁ and φ₂ at −h).

    With h the step in −log σ̂ down to σ̂_down and c₂ the place of the last x0, in units of h::

        x̂ = e^−h·x̂ + h·((φ₁ − φ₂/c₂)·x0 + φ₂/c₂·x0_last) + σ̂_up·z

    The first step, and one with σ̂_down = 0, is Euler's.

    Args:
        levels: the levels to visit.
        prediction: how to read the model.
        eta, s_noise: as in `euler_ancestral`.  With noise, c₂ measures from the last σ̂_down, as in ComfyUI's code.
        cfg_pp: the CFG++ form (arXiv 2406.08070), with the unconditional x0 in the history slot `UNCOND_SLOT`.
    """
    sigmas = noise_ratios("res_multistep", levels)
    as_float("res_multistep", "s_noise", s_noise)
    rows: list[Row] = []
    last_down = sigmas[0]
    for i in range(len(levels)):
        t, s, model = levels[i], levels[i + 1], prediction.at(levels[i])
        down, up = ancestral_split("res_multistep", sigmas[i], sigmas[i + 1], eta)
        x, slope_x0 = scaled(t), UNCOND if cfg_pp else model.x0
        next_x: Affine
        if down == 0.0 or i == 0:
            next_x = model.x0 + (down / sigmas[i]) * (x - slope_x0)
        else:
            h = math.log(sigmas[i] / down)
            c2 = (math.log(last_down) - math.log(sigmas[i - 1])) / h
            last_weight = phi2(-h) / c2
            if cfg_pp:
                x = x + model.x0 - UNCOND
            next_x = math.exp(-h) * x + h * ((phi1(-h) - last_weight) * slope_x0 + last_weight * HISTORY[0])
        next_x = next_x + (s_noise * up) * NOISE
        rows.append(model.row(s.alpha * next_x, kept=(slope_x0,), slots=(0,)))
        last_down = down
    return StepTable(
        tuple(rows),
        levels.initial_scale,
        thresholding=prediction.thresholding,
        provided_slots=(UNCOND_SLOT,) if cfg_pp else (),
    )
