# SPDX-License-Identifier: MIT
"""IPNDM: PNDM without its start-up, the first steps at the order that the history allows."""

from __future__ import annotations

from ..schedules.levels import Levels
from .adams import MultistepStep, adams_weights, checked_order, multistep_table, transfer
from .prediction import Prediction
from .table import StepTable


def ipndm(levels: Levels, prediction: Prediction, *, multistep_order: int = 4) -> StepTable:
    """Compile the table of the improved PNDM (arXiv 2202.09778 without its start-up; 2204.13902, appendix H.2).

    ε is extrapolated by the Adams-Bashforth formula for even steps, ``ε' = (55·ε_0 − 59·ε_1 + 37·ε_2 − 9·ε_3)/24``
    from the fourth step on, and the step is DDIM's with ε': ``prev/α_s = x/α_t + (σ̂_s − σ̂_t)·ε'``.

    Args:
        levels: the levels to visit.
        prediction: how to read the model.
        multistep_order: 1 to 4, the number of outputs.

    Raises:
        ValueError, TypeError: the order is out of range.
    """
    checked_order("ipndm", "multistep_order", multistep_order, 1, 4)

    def step_at(i: int, known: int) -> MultistepStep:
        x, slope = transfer(levels[i], levels[i + 1])
        weights = even_weights(min(multistep_order, known + 1))
        return MultistepStep(x, [slope * weight for weight in weights])

    slots = max(multistep_order - 1, 1)
    return multistep_table(levels, prediction, lambda model: model.consistent_noise, slots, step_at)


def even_weights(order: int) -> list[float]:
    """Return the weights of the Adams-Bashforth formula for even steps, the newest output first."""
    return adams_weights([-float(j) for j in range(order)])
