# SPDX-License-Identifier: MIT
"""Restart sampling: Heun's method that goes back up to more noise and down again (arXiv 2306.14878)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from ..errors import as_float
from ..schedules.levels import Level, Levels
from .affine import HISTORY, NOISE, SAMPLE, Affine
from .prediction import Prediction
from .sigma_steps import noise_ratios
from .table import Row, StepTable


def restart(
    levels: Levels,
    prediction: Prediction,
    *,
    restarts: Sequence[tuple[int, Sequence[float], int]] = (),
    s_noise: float = 1.0,
) -> StepTable:
    """Compile the table of Restart with Heun steps (arXiv 2306.14878, algorithm 1).

    A restart at a level adds noise up to σ̂_max, then walks down to the level again, K times.  The noise is added at the
    end of the step before it, in the same pass.

    Args:
        levels: the levels to visit.
        prediction: how to read the model.
        restarts: for each restart, the index of its level in `levels`, the σ̂ of its walk, from σ̂_max down to that
            level, and K.
        s_noise: the standard deviation of the added noise, in units of the paper's.
    """
    noise_ratios("restart", levels)
    as_float("restart", "s_noise", s_noise)
    steps = restart_steps(levels, restarts)
    rows: list[Row] = []
    for i, (t, s) in enumerate(steps):
        start = steps[i + 1][0] if i + 1 < len(steps) else s
        model = prediction.at(t)
        prev = s.alpha * model.x0 + s.sigma * model.consistent_noise
        if s.sigma == 0.0:
            rows.append(model.row(prev))
            continue
        rows.append(model.row(prev, kept=(model.consistent_noise,), slots=(0,)))
        end = prediction.at(s)
        half_step = 0.5 * s.alpha * (s.noise_ratio - t.noise_ratio)
        rows.append(end.row(_up(SAMPLE + half_step * (end.consistent_noise - HISTORY[0]), s, start, s_noise)))
    return StepTable(tuple(rows), levels.initial_scale, thresholding=prediction.thresholding)


def restart_steps(levels: Levels, restarts: Sequence[tuple[int, Sequence[float], int]]) -> list[tuple[Level, Level]]:
    """Return the start and the end of each Heun step, in order."""
    walks = {index: (sigmas, times) for index, sigmas, times in restarts}
    steps: list[tuple[Level, Level]] = []
    for i in range(len(levels)):
        steps.append((levels[i], levels[i + 1]))
        sigmas, times = walks.get(i + 1, ((), 0))
        walk = [levels.locate(sigma) for sigma in sigmas[:-1]] + [levels[i + 1]]
        steps += list(itertools.pairwise(walk)) * times
    return steps


def _up(sample: Affine, level: Level, start: Level, s_noise: float) -> Affine:
    """Add noise to a sample at `level` up to a noisier one; return it as it is where the next step starts here."""
    if start is level:
        return sample
    extra = math.sqrt(start.noise_ratio**2 - level.noise_ratio**2)
    return (start.alpha / level.alpha) * sample + (start.alpha * s_noise * extra) * NOISE
