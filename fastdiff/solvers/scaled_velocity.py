# SPDX-License-Identifier: MIT
"""v-prediction of a model with the variance-preserving input x/√(1 + σ²), read at a level x0 + σ·ε."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..schedules.levels import Level
from .affine import MODEL_OUTPUT, SAMPLE, Affine
from .prediction import Prediction, PredictionType


@dataclass(frozen=True)
class ScaledVelocity(Prediction):
    """v = (ε − σ·x0)/√(1 + σ²), the velocity of x/√(1 + σ²), at levels with α = 1 (arXiv 2202.00512, section 4)."""

    prediction_type: PredictionType = PredictionType.V_PREDICTION

    def _solve(self, level: Level) -> tuple[tuple[float, float], Affine]:
        sigma = level.sigma
        norm = 1.0 + sigma * sigma
        noise = (sigma / norm) * SAMPLE + (1.0 / math.sqrt(norm)) * MODEL_OUTPUT
        return (1.0 / norm, -sigma / math.sqrt(norm)), noise
