# SPDX-License-Identifier: MIT
"""LMS: the Adams-Bashforth method for uneven steps on the probability-flow ODE in σ̂ = σ/α."""

from __future__ import annotations

from ..schedules.levels import Levels
from .adams import MultistepStep, adams_weights, checked_order, multistep_table, transfer
from .prediction import Prediction
from .table import StepTable


def lms(levels: Levels, prediction: Prediction, *, multistep_order: int = 4) -> StepTable:
    """Compile the table of linear multistep sampling, as k-diffusion defines it.

    ``prev/α_s = x/α_t + Σ_j ∫ L_j(σ̂) dσ̂·ε_j`` from σ̂_t to σ̂_s: the slope ε is extrapolated by the polynomial through
    its last values, in σ̂.  The first steps have the order that the history allows.

    Args:
        levels: the levels to visit.
        prediction: how to read the model.
        multistep_order: 1 to 4, the number of slopes.

    Raises:
        ValueError, TypeError: the order is out of range.
    """
    checked_order("lms", "multistep_order", multistep_order, 1, 4)

    def step_at(i: int, known: int) -> MultistepStep:
        t, s = levels[i], levels[i + 1]
        span = s.noise_ratio - t.noise_ratio
        order = min(multistep_order, known + 1)
        nodes = [(levels[i - j].noise_ratio - t.noise_ratio) / span for j in range(order)]
        x, slope = transfer(t, s)
        return MultistepStep(x, [slope * weight for weight in adams_weights(nodes)])

    slots = max(multistep_order - 1, 1)
    return multistep_table(levels, prediction, lambda model: model.consistent_noise, slots, step_at)
