# SPDX-License-Identifier: MIT
"""DDIM: the deterministic solver of a diffusion model, with noise added back in proportion to η."""

from __future__ import annotations

import math

from ..errors import as_float, error_message
from ..schedules.levels import Level, Levels
from .affine import NOISE
from .prediction import Prediction
from .table import StepTable


def ddim(
    levels: Levels, prediction: Prediction, *, eta: float = 0.0, use_clipped_model_output: bool = False
) -> StepTable:
    """Compile the table of DDIM (arXiv 2010.02502, eq. 12 and 16, written for any α and σ).

    ``prev = α_s·x0 + √(σ_s² − std²)·ε + std·z`` with ``std = η·σ_s·√(1 − (α_t·σ_s/(α_s·σ_t))²)``.

    Args:
        levels: the levels to visit.
        prediction: how to read the model.
        eta: 0 is deterministic, 1 is DDPM.
        use_clipped_model_output: derive ε again from the clipped x0 instead of using the model's own.

    Raises:
        ValueError: eta is negative, not a number, or so large that no noise direction is left.
    """
    check_eta("ddim", eta)
    rows = []
    for i in range(len(levels)):
        t, s = levels[i], levels[i + 1]
        model = prediction.at(t)
        noise = model.consistent_noise if use_clipped_model_output else model.noise
        std = eta * _posterior_std(t, s)
        remaining = s.sigma**2 - std**2
        if remaining < -1e-12 * s.sigma**2:
            raise ValueError(
                error_message(
                    "ddim",
                    "eta",
                    f"is {eta}, which asks for more noise than timestep {t.timestep:g} leaves",
                    "at most 1 for any schedule",
                    "lower eta",
                )
            )
        rows.append(model.row(s.alpha * model.x0 + math.sqrt(max(remaining, 0.0)) * noise + std * NOISE))
    return StepTable(tuple(rows), levels.initial_scale, thresholding=prediction.thresholding)


def _posterior_std(t: Level, s: Level) -> float:
    """The standard deviation of q(x_s | x_t, x0)."""
    fraction = t.alpha * s.sigma / (s.alpha * t.sigma)
    return s.sigma * math.sqrt(max(1.0 - fraction**2, 0.0))


def check_eta(operation: str, eta: float) -> None:
    """Refuse a negative or non-finite η."""
    as_float(operation, "eta", eta)
    if not (math.isfinite(eta) and eta >= 0.0):
        raise ValueError(
            error_message(operation, "eta", f"is {eta}", "a number of 0 or more", "use 0 for no noise and 1 for DDPM's")
        )
