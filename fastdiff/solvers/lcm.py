# SPDX-License-Identifier: MIT
"""LCM: multistep sampling of a latent consistency model, which predicts the clean sample from any level."""

from __future__ import annotations

from ..errors import checked_float
from ..schedules.levels import Levels
from .affine import NOISE, SAMPLE, Affine
from .prediction import Denoised, Prediction
from .table import StepTable


def lcm(
    levels: Levels, prediction: Prediction, *, timestep_scaling: float = 10.0, sigma_data: float = 0.5
) -> StepTable:
    """Compile the table of multistep latent consistency sampling (arXiv 2310.04378, algorithm 3 and eq. 9).

    ``f = c_out·x0 + c_skip·x`` with c_skip = σ_data²/(τ² + σ_data²), c_out = τ/√(τ² + σ_data²) and
    τ = timestep_scaling·timestep; then ``prev = α_s·f + σ_s·z``.  The loop needs a model distilled for it: with one
    that predicts the mean of x0 it does not converge to the data.

    Args:
        levels: the levels to visit.
        prediction: how to read the model.
        timestep_scaling: the factor of the timestep, 0 or more.
        sigma_data: σ_data, above 0.

    Raises:
        ValueError, TypeError: an option is out of range.
    """
    checked_float("lcm", "timestep_scaling", timestep_scaling, 0.0)
    checked_float("lcm", "sigma_data", sigma_data, 0.0, strict=True)
    rows = []
    for i in range(len(levels)):
        t, s = levels[i], levels[i + 1]
        model = prediction.at(t)
        clean = consistency_function(model, timestep_scaling, sigma_data)
        rows.append(model.row(s.alpha * clean + s.sigma * NOISE))
    return StepTable(tuple(rows), levels.initial_scale, thresholding=prediction.thresholding)


def consistency_function(model: Denoised, timestep_scaling: float, sigma_data: float) -> Affine:
    """Return ``f = c_out·x0 + c_skip·x`` at the level of a model output, with the coefficients of `lcm`."""
    time = timestep_scaling * model.timestep
    norm = time**2 + sigma_data**2
    mixed: Affine = (time / norm**0.5) * model.x0 + (sigma_data**2 / norm) * SAMPLE
    return mixed
