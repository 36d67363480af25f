# SPDX-License-Identifier: MIT
"""CFG++ (arXiv 2406.08070) for Euler, Euler ancestral and DPM-Solver++(2M): the slope comes from the unconditional x0.

u is the unconditional x0 of the same model call, in the history slot `UNCOND_SLOT`, and x0 the guided one.
"""

from __future__ import annotations

import math

from ..errors import as_float
from ..schedules.levels import Levels
from .affine import HISTORY, NOISE
from .prediction import Prediction
from .sigma_steps import UNCOND, UNCOND_SLOT, ancestral_split, noise_ratios, scaled
from .table import Row, StepTable


def euler_ancestral_cfg_pp(
    levels: Levels, prediction: Prediction, *, eta: float = 1.0, s_noise: float = 1.0
) -> StepTable:
    """Compile the table of Euler ancestral steps under CFG++: ``x̂ = x0 + σ̂_down·(x̂ − u)/σ̂_t + σ̂_up·z``.

    Args:
        levels: the levels to visit.
        prediction: how to read the model.
        eta: 0 is Euler, the paper's algorithm 1; 1 is DDPM's noise.
        s_noise: the standard deviation of the added noise.
    """
    sigmas = noise_ratios("euler_ancestral_cfg_pp", levels)
    as_float("euler_ancestral_cfg_pp", "s_noise", s_noise)
    rows: list[Row] = []
    for i in range(len(levels)):
        t, s, model = levels[i], levels[i + 1], prediction.at(levels[i])
        down, up = ancestral_split("euler_ancestral_cfg_pp", sigmas[i], sigmas[i + 1], eta)
        next_x = model.x0 + (down / sigmas[i]) * (scaled(t) - UNCOND) + (s_noise * up) * NOISE
        rows.append(model.row(s.alpha * next_x))
    return StepTable(
        tuple(rows),
        levels.initial_scale,
        thresholding=prediction.thresholding,
        provided_slots=(UNCOND_SLOT,),
    )


def dpmpp_2m_cfg_pp(levels: Levels, prediction: Prediction) -> StepTable:
    """Compile the table of DPM-Solver++(2M) under CFG++, as ComfyUI has it.

    With h the step in −log σ̂ and r the last step over this one::

        x̂ = x0 + e^−h·(x̂ − u) + (1 − e^−h)/(2r)·(x0 − u_last)

    The first step and the step to σ = 0 leave out the last term.

    Args:
        levels: the levels to visit.
        prediction: how to read the model.
    """
    sigmas = noise_ratios("dpmpp_2m_cfg_pp", levels)
    rows: list[Row] = []
    for i in range(len(levels)):
        t, s, model = levels[i], levels[i + 1], prediction.at(levels[i])
        ratio = sigmas[i + 1] / sigmas[i]
        next_x = model.x0 + ratio * (scaled(t) - UNCOND)
        if i > 0 and s.sigma > 0.0:
            r = math.log(sigmas[i - 1] / sigmas[i]) / -math.log(ratio)
            next_x = next_x + ((1.0 - ratio) / (2.0 * r)) * (model.x0 - HISTORY[0])
        rows.append(model.row(s.alpha * next_x, kept=(UNCOND,), slots=(0,)))
    return StepTable(
        tuple(rows),
        levels.initial_scale,
        thresholding=prediction.thresholding,
        provided_slots=(UNCOND_SLOT,),
    )
