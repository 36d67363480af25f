# SPDX-License-Identifier: MIT
"""DEIS: an exponential integrator that extrapolates ε as a polynomial in log σ̂."""

from __future__ import annotations

import math

from ..schedules.levels import Levels
from .adams import MultistepStep, adams_weights, checked_order, log_snr_nodes, multistep_table
from .dpm_multistep import FEW_STEPS
from .exponential import Algorithm, exponential_step
from .prediction import Prediction
from .table import StepTable


def deis(levels: Levels, prediction: Prediction, *, solver_order: int = 2, lower_order_final: bool = True) -> StepTable:
    """Compile the table of log-ρ multistep DEIS (arXiv 2204.13902, section 3.3 and appendix H, "ρAB" in log ρ).

    ``prev/α_s = x/α_t + Σ_j ∫ L_j(log ρ) dρ·ε_j`` with ρ = σ̂, from ρ_t to ρ_s.  In λ = −log ρ that is the integral of
    ``e^−λ·ε`` over the step, which is how it is computed here.  A step to σ = 0 has order 1.

    Args:
        levels: the levels to visit.
        prediction: how to read the model.
        solver_order: 1 to 3, the number of outputs that are interpolated; the first steps have fewer.
        lower_order_final: with fewer than 15 steps, take the last ones at orders 2 and 1, as diffusers does.

    Raises:
        ValueError, TypeError: an option is out of range.
    """
    checked_order("deis", "solver_order", solver_order, 1, 3)
    n = len(levels)

    def step_at(i: int, known: int) -> MultistepStep:
        step = exponential_step(Algorithm.DPM_SOLVER, levels[i], levels[i + 1])
        if math.isinf(step.h):
            return MultistepStep(step.x, [step.d0])
        order = min(solver_order, known + 1, n - i if lower_order_final and n < FEW_STEPS else solver_order)
        scale = -levels[i + 1].sigma * step.h
        weights = adams_weights(log_snr_nodes(levels, i, order), step.h)
        return MultistepStep(step.x, [scale * weight for weight in weights])

    slots = max(solver_order - 1, 1)
    return multistep_table(levels, prediction, Algorithm.DPM_SOLVER.interpolated, slots, step_at)
