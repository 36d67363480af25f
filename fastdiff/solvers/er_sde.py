# SPDX-License-Identifier: MIT
"""ER-SDE-Solver: the extended reverse-time SDE, orders 1 to 3 (arXiv 2309.06169)."""

from __future__ import annotations

import math
from collections.abc import Callable

from ..errors import as_float, checked_integer
from ..schedules.levels import Levels
from .affine import HISTORY, NOISE
from .prediction import Prediction
from .sigma_steps import integral, noise_ratios, scaled
from .table import Row, StepTable


def default_noise_scaler(sigma: float) -> float:
    """Return φ(σ̂) = σ̂·(e^(σ̂^0.3) + 10), ER-SDE 5 of the paper."""
    return sigma * (math.exp(sigma**0.3) + 10.0)


def er_sde(
    levels: Levels,
    prediction: Prediction,
    *,
    s_noise: float = 1.0,
    noise_scaler: Callable[[float], float] = default_noise_scaler,
    max_stage: int = 3,
) -> StepTable:
    """Compile the table of ER-SDE-Solver (arXiv 2309.06169, algorithms 2 and 3 in the coordinates x/α).

    With r = φ(σ̂_s)/φ(σ̂_t) and differences of earlier x0 for its derivatives::

        x̂ = r·x̂ + (1 − r)·x0 + (Δ + φ(σ̂_s)·∫dλ/φ)·x0' + (Δ²/2 + φ(σ̂_s)·∫(λ − σ̂_t)dλ/φ)·x0'' + √(σ̂_s² − σ̂_t²·r²)·z

    with Δ = σ̂_s − σ̂_t and integrals from σ̂_s to σ̂_t.  The step to σ = 0 returns x0.  The authors approximate the
    integrals by a sum of 200 terms; here they are exact to 1e-12.

    Args:
        levels: the levels to visit.
        prediction: how to read the model.
        s_noise: the standard deviation of the added noise.
        noise_scaler: φ, of a noise level σ̂ > 0.
        max_stage: the order, 1 to 3; the first steps run at the order that the history allows.
    """
    sigmas = noise_ratios("er_sde", levels)
    as_float("er_sde", "s_noise", s_noise)
    order = checked_integer("er_sde", "max_stage", max_stage, 1)
    rows: list[Row] = []
    for i in range(len(levels)):
        t, s, model = levels[i], levels[i + 1], prediction.at(levels[i])
        x0, now, end = model.x0, sigmas[i], sigmas[i + 1]
        kept, slots = (x0,), (i % 2,)
        if s.sigma == 0.0:
            rows.append(model.row(s.alpha * x0))
            continue
        scale = noise_scaler(end)
        ratio = scale / noise_scaler(now)
        next_x = ratio * scaled(t) + (1.0 - ratio) * x0
        used, step = min(order, i + 1, 3), end - now
        if used >= 2:
            slope = (x0 - HISTORY[(i - 1) % 2]) / (now - sigmas[i - 1])
            weight = integral(lambda level: 1.0 / noise_scaler(level), end, now, nodes=16, panels=8)
            next_x = next_x + (step + scale * weight) * slope
            if used == 3:
                last_slope = (HISTORY[(i - 1) % 2] - HISTORY[i % 2]) / (sigmas[i - 1] - sigmas[i - 2])
                bend = (slope - last_slope) / (0.5 * (now - sigmas[i - 2]))
                moment = integral(
                    lambda level, now=now: (level - now) / noise_scaler(level),  # type: ignore[misc]
                    end, now, nodes=16, panels=8,
                )  # fmt: skip
                next_x = next_x + (0.5 * step**2 + scale * moment) * bend
        noise = math.sqrt(max(end**2 - (now * ratio) ** 2, 0.0))
        rows.append(model.row(s.alpha * (next_x + (s_noise * noise) * NOISE), kept=kept, slots=slots))
    return StepTable(tuple(rows), levels.initial_scale, thresholding=prediction.thresholding)
