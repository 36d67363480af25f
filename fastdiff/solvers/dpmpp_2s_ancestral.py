# SPDX-License-Identifier: MIT
"""DPM-Solver++(2S) with ancestral noise, as k-diffusion defines it, and its CFG++ form."""

from __future__ import annotations

import math

from ..errors import as_float
from ..schedules.levels import Levels
from .affine import HISTORY, NOISE
from .prediction import Prediction
from .sigma_steps import UNCOND, UNCOND_SLOT, ancestral_split, between, noise_ratios, scaled
from .table import Row, StepTable

_START = 0


def dpmpp_2s_ancestral(
    levels: Levels, prediction: Prediction, *, eta: float = 1.0, s_noise: float = 1.0, cfg_pp: bool = False
) -> StepTable:
    """Compile the table of DPM-Solver++(2S) steps (arXiv 2211.01095, algorithm 1, r = ½) down to σ̂_down, then noise.

    A step makes two model calls, the second halfway in log σ̂; a step with σ̂_down = 0 is Euler's, with one.

    Args:
        levels: the levels to visit.
        prediction: how to read the model.
        eta, s_noise: as in `euler_ancestral`.
        cfg_pp: the CFG++ form (arXiv 2406.08070): u is the unconditional x0, in the history slot `UNCOND_SLOT`.  Each
            update starts at x + x0 − u, with x0 of the first call and u of the call before it, as ComfyUI has it.
    """
    sigmas = noise_ratios("dpmpp_2s_ancestral", levels)
    as_float("dpmpp_2s_ancestral", "s_noise", s_noise)
    rows: list[Row] = []
    for i in range(len(levels)):
        t, s, model = levels[i], levels[i + 1], prediction.at(levels[i])
        down, up = ancestral_split("dpmpp_2s_ancestral", sigmas[i], sigmas[i + 1], eta)
        noise = (s_noise * up) * NOISE
        x, x0 = scaled(t), model.x0
        if down == 0.0:
            slope = (x - (UNCOND if cfg_pp else x0)) / sigmas[i]
            rows.append(model.row(s.alpha * (x0 + down * slope + noise)))
            continue
        middle = levels.locate(between(sigmas[i], down, 0.5))
        ratio, h = middle.noise_ratio / sigmas[i], math.log(sigmas[i] / down)
        start = x + x0 if cfg_pp else x
        first = ratio * (start - UNCOND if cfg_pp else start) - math.expm1(-0.5 * h) * x0
        rows.append(model.row(middle.alpha * first, kept=(start,), slots=(_START,)))
        second = prediction.at(middle)
        begin = HISTORY[_START] - UNCOND if cfg_pp else HISTORY[_START]
        rows.append(second.row(s.alpha * (down / sigmas[i] * begin - math.expm1(-h) * second.x0 + noise)))
    return StepTable(
        tuple(rows),
        levels.initial_scale,
        thresholding=prediction.thresholding,
        provided_slots=(UNCOND_SLOT,) if cfg_pp else (),
    )
