# SPDX-License-Identifier: MIT
"""The exponential integrators of all DPM-Solvers: one step in λ = log(α/σ) from level t to level s.

With h = λ_s − λ_t, each form is ``c_x·x + c_0·D0 + c_1·D1 + c_2·D2 + c_z·z``, where D0, D1, D2 are the
model's x0 (data forms) or ε (noise forms) at t and its first and second differences over the step.
Papers: DPM-Solver arXiv 2206.00927, DPM-Solver++ arXiv 2211.01095.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum

from ..errors import parse_choice
from ..schedules.levels import Level
from .affine import Affine
from .prediction import Denoised


class Algorithm(str, Enum):
    """The four forms, named as in diffusers: what is interpolated (ε, or x0 in the ++ forms), and ODE or SDE."""

    DPM_SOLVER = "dpmsolver"
    DPM_SOLVER_PP = "dpmsolver++"
    SDE_DPM_SOLVER = "sde-dpmsolver"
    SDE_DPM_SOLVER_PP = "sde-dpmsolver++"

    @classmethod
    def parse(cls, value: str | Algorithm) -> Algorithm:
        return parse_choice(cls, "dpm_solver", "algorithm_type", value)

    @property
    def predicts_data(self) -> bool:
        return self in (Algorithm.DPM_SOLVER_PP, Algorithm.SDE_DPM_SOLVER_PP)

    def at(self, level: Level) -> Algorithm:
        """Return the form for a step from this level: the data form at α = 0, where λ is infinite."""
        if level.alpha > 0.0:
            return self
        return Algorithm.SDE_DPM_SOLVER_PP if self.stochastic else Algorithm.DPM_SOLVER_PP

    def interpolated(self, model: Denoised) -> Affine:
        """Return the output that this form interpolates and keeps: x0 or ε."""
        return model.x0 if self.predicts_data else model.consistent_noise

    @property
    def stochastic(self) -> bool:
        return self in (Algorithm.SDE_DPM_SOLVER, Algorithm.SDE_DPM_SOLVER_PP)


class SolverType(str, Enum):
    """The weight of the first difference in a second-order step: `midpoint` (½·c_0) or `heun` (its exact integral)."""

    MIDPOINT = "midpoint"
    HEUN = "heun"

    @classmethod
    def parse(cls, value: str | SolverType) -> SolverType:
        return parse_choice(cls, "dpm_solver", "solver_type", value)


@dataclass(frozen=True)
class Step:
    """The coefficients of one step from level t to level s.

    Attributes:
        h: λ_s − λ_t.
        x, d0, d1, d2: coefficients of the sample and of the zeroth, first and second difference (exact integrals).
        noise: coefficient of a standard normal draw; 0 in the ODE forms.
    """

    h: float
    x: float
    d0: float
    d1: float
    d2: float
    noise: float

    def first_difference(self, solver_type: SolverType) -> float:
        return 0.5 * self.d0 if solver_type is SolverType.MIDPOINT else self.d1


def exponential_step(algorithm: Algorithm, t: Level, s: Level) -> Step:
    """Compute the coefficients of a step from t to s.

    The data forms integrate ``e^λ·x0``, with z = −h (ODE) or −2h (SDE) in the φ functions; the noise forms ``e^−λ·ε``
    with z = h, twice as much of it in the SDE.  A step to σ_s = 0 returns the predicted x0, the limit that all of them
    share but for the noise SDE, whose own limit would end in noise.
    """
    h = s.half_log_snr - t.half_log_snr
    factor = 2.0 if algorithm.stochastic else 1.0
    if algorithm.predicts_data:
        z = -factor * h
        x = s.sigma / t.sigma * (math.exp(-h) if algorithm.stochastic else 1.0)
        noise = s.sigma * math.sqrt(-math.expm1(z)) if algorithm.stochastic else 0.0
        return Step(h, x, -s.alpha * math.expm1(z), s.alpha * (1.0 - phi1(z)), s.alpha * (0.5 - phi2(z)), noise)
    ratio = s.alpha / t.alpha
    if s.sigma == 0.0:
        return Step(h, ratio, -ratio * t.sigma, 0.0, 0.0, 0.0)
    scale = -factor * s.sigma
    noise = s.sigma * math.sqrt(math.expm1(2.0 * h)) if algorithm.stochastic else 0.0
    return Step(h, ratio, scale * math.expm1(h), scale * (phi1(h) - 1.0), scale * (phi2(h) - 0.5), noise)


def phi1(z: float) -> float:
    """(e^z − 1)/z."""
    if z == 0.0:
        return 1.0
    return 0.0 if z == -math.inf else math.expm1(z) / z


def phi2(z: float) -> float:
    """(e^z − 1 − z)/z², by its series near 0, where the difference would cancel."""
    if z == -math.inf:
        return 0.0
    if abs(z) > 0.5:
        return (math.expm1(z) - z) / (z * z)
    total, term = 0.0, 0.5
    for k in range(3, 20):
        total += term
        term *= z / k
    return total + term
