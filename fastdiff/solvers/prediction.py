# SPDX-License-Identifier: MIT
"""x0 and ε as affine maps of the sample and the model's output, for every prediction type."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum

from ..errors import as_float, checked_float, error_message, parse_choice
from ..schedules.levels import Level
from .affine import MODEL_OUTPUT, PREDICTION, SAMPLE, Affine
from .table import Row


class PredictionType(str, Enum):
    """The quantity that the model was trained to predict, with x = α·x0 + σ·ε."""

    EPSILON = "epsilon"
    V_PREDICTION = "v_prediction"
    SAMPLE = "sample"
    FLOW_PREDICTION = "flow_prediction"
    EDM = "edm"

    @classmethod
    def parse(cls, value: str | PredictionType) -> PredictionType:
        return parse_choice(cls, "Prediction", "prediction_type", value)


@dataclass(frozen=True)
class Denoised:
    """The model output at one level, read as x0 and as ε.

    Attributes:
        x0: the predicted clean sample: the symbol d where d is clipped, else p·x + q·m.
        noise: the model's own prediction of ε, from the unclipped x0.
        consistent_noise: (x − α·x0)/σ, which differs from `noise` only where x0 is clipped.
        scalars: (p, q) of d = p·x + q·m.
        clip: the bound of d, inf without one.
    """

    timestep: float
    x0: Affine
    noise: Affine
    consistent_noise: Affine
    scalars: tuple[float, float]
    clip: float

    def row(self, prev_sample: Affine, kept: tuple[Affine, ...] = (), slots: tuple[int, ...] = ()) -> Row:
        """Return the row that calls the model at this level, steps to `prev_sample` and keeps `kept` in `slots`."""
        return Row(self.timestep, prev_sample, self.scalars, self.clip, kept, slots)


@dataclass(frozen=True)
class Prediction:
    """The interpretation of the model's output: its prediction type, and the bounds of the x0 that it implies.

    Args:
        prediction_type: ``epsilon``; ``v_prediction``, v = α·ε − σ·x0 (arXiv 2202.00512, section 4); ``sample``, x0;
            ``flow_prediction``, ε − x0 (arXiv 2209.03003); ``edm``, the network F of x0 = c_skip·x/α + c_out·F with
            c_skip = σ_data²/(σ̂² + σ_data²) and c_out = σ̂·σ_data/√(σ̂² + σ_data²) (arXiv 2206.00364, table 1).
        clip_range: x0 is clamped to ±clip_range; inf leaves it as it is.
        thresholding: x0 is clamped to a quantile a sample and divided by it (arXiv 2205.11487, section 2.3).
        sigma_data: the standard deviation of the data, of ``edm``.
    """

    prediction_type: PredictionType = PredictionType.EPSILON
    clip_range: float = math.inf
    thresholding: bool = False
    sigma_data: float = 0.5

    def __post_init__(self) -> None:
        object.__setattr__(self, "prediction_type", PredictionType.parse(self.prediction_type))
        if not as_float("Prediction", "clip_range", self.clip_range) > 0.0:
            raise ValueError(
                error_message(
                    "Prediction", "clip_range", f"is {self.clip_range}", "a number above 0", "use inf for no clipping"
                )
            )
        checked_float("Prediction", "sigma_data", self.sigma_data, 0.0, strict=True)

    @property
    def bounds_x0(self) -> bool:
        return self.thresholding or math.isfinite(self.clip_range)

    def at(self, level: Level) -> Denoised:
        """Read the model output at one level.

        Raises:
            ValueError: the output does not determine x0 or ε there (ε at ᾱ = 0, x0 at σ = 0).
        """
        (p, q), noise = self._solve(level)
        free_x0 = p * SAMPLE + q * MODEL_OUTPUT
        x0 = PREDICTION if self.bounds_x0 else free_x0
        consistent = (SAMPLE - level.alpha * x0) / level.sigma if self.bounds_x0 else noise
        clip = math.inf if self.thresholding else self.clip_range
        return Denoised(level.timestep, x0, noise, consistent, (p, q), clip)

    def _solve(self, level: Level) -> tuple[tuple[float, float], Affine]:
        """Solve x = α·x0 + σ·ε and the definition of the output for x0 (as scalars of x and m) and for ε."""
        x, m, alpha, sigma = SAMPLE, MODEL_OUTPUT, level.alpha, level.sigma
        kind = self.prediction_type
        if kind is PredictionType.EPSILON:
            if alpha == 0.0:
                raise _undetermined(level, "epsilon", "x0", "ᾱ > 0", "v_prediction or sample")
            return (1.0 / alpha, -sigma / alpha), m
        if sigma == 0.0:
            raise _undetermined(level, kind.value, "the noise", "σ > 0", "a schedule without a noiseless timestep")
        if kind is PredictionType.SAMPLE:
            return (0.0, 1.0), (x - alpha * m) / sigma
        if kind is PredictionType.V_PREDICTION:
            norm = alpha * alpha + sigma * sigma
            return (alpha / norm, -sigma / norm), (sigma * x + alpha * m) / norm
        if kind is PredictionType.EDM:
            norm = math.hypot(sigma, self.sigma_data * alpha)
            of_sample, of_output = self.sigma_data**2 * alpha / norm**2, self.sigma_data * sigma / norm
            return (of_sample, of_output), (sigma / norm**2) * x - (self.sigma_data * alpha / norm) * m
        total = alpha + sigma
        return (1.0 / total, -sigma / total), (x + alpha * m) / total


def _undetermined(level: Level, kind: str, what: str, needs: str, instead: str) -> ValueError:
    return ValueError(
        error_message(
            "Prediction",
            "prediction_type",
            f"is {kind!r} at timestep {level.timestep:g}, where it does not determine {what}",
            f"a level with {needs}",
            f"use {instead}",
        )
    )
