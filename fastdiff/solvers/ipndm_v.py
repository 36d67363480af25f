# SPDX-License-Identifier: MIT
"""iPNDM for any spacing: Adams–Bashforth in σ̂ with the weights of the actual levels (arXiv 2204.13902)."""

from __future__ import annotations

from ..schedules.levels import Levels
from .adams import MultistepStep, adams_weights, checked_order, multistep_table, transfer
from .prediction import Prediction
from .sigma_steps import noise_ratios
from .table import StepTable


def ipndm_v(levels: Levels, prediction: Prediction, *, max_order: int = 4) -> StepTable:
    """Compile the table of variable-step Adams–Bashforth on dx̂/dσ̂ = ε (iPNDM of arXiv 2204.13902, any spacing).

    ε is interpolated through the last values at their levels and the polynomial integrated exactly, as in `lms`.  The
    step to σ = 0 returns x0.

    Args:
        levels: the levels to visit.
        prediction: how to read the model.
        max_order: 1 to 4; the first steps run at the order that the history allows.

    Raises:
        ValueError, TypeError: the order is out of range.
    """
    sigmas = noise_ratios("ipndm_v", levels)
    order = checked_order("ipndm_v", "max_order", max_order, 1, 4)

    def step_at(i: int, known: int) -> MultistepStep:
        t, s = levels[i], levels[i + 1]
        used = 1 if s.sigma == 0.0 else min(order, known + 1)
        span = sigmas[i + 1] - sigmas[i]
        x, slope = transfer(t, s)
        weights = adams_weights([(sigmas[i - j] - sigmas[i]) / span for j in range(used)])
        return MultistepStep(x, [slope * weight for weight in weights])

    return multistep_table(levels, prediction, lambda model: model.consistent_noise, max(order - 1, 1), step_at)
