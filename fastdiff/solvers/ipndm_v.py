# SPDX-License-Identifier: MIT
"""iPNDM for any spacing: Adams–Bashforth in σ̂ with the weights of the actual levels (arXiv 2204.13902)."""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import checked_integer, error_message
from ..schedules.levels import Levels
from .affine import HISTORY
from .prediction import Prediction
from .sigma_steps import integral, noise_ratios, scaled
from .table import Row, StepTable

_SLOTS = 3


def ipndm_v(levels: Levels, prediction: Prediction, *, max_order: int = 4) -> StepTable:
    """Compile the table of variable-step Adams–Bashforth on dx̂/dσ̂ = ε (iPNDM of arXiv 2204.13902, any spacing).

    ε is interpolated through the last values at their levels and the polynomial integrated exactly.  The step to σ = 0
    returns x0.

    Args:
        levels: the levels to visit.
        prediction: how to read the model.
        max_order: 1 to 4; the first steps run at the order that the history allows.
    """
    sigmas = noise_ratios("ipndm_v", levels)
    order = checked_integer("ipndm_v", "max_order", max_order, 1)
    if order > _SLOTS + 1:
        raise ValueError(error_message("ipndm_v", "max_order", f"is {order}", "1 to 4", "lower max_order"))
    rows: list[Row] = []
    for i in range(len(levels)):
        t, s, model = levels[i], levels[i + 1], prediction.at(levels[i])
        slope = model.consistent_noise
        if s.sigma == 0.0:
            rows.append(model.row(s.alpha * model.x0))
            continue
        used = min(order, i + 1)
        slopes = [slope, *(HISTORY[(i - j) % _SLOTS] for j in range(1, used))]
        next_x = scaled(t)
        for weight, value in zip(lagrange_integrals([sigmas[i - j] for j in range(used)], sigmas[i + 1]), slopes, strict=True):
            next_x = next_x + weight * value
        rows.append(model.row(s.alpha * next_x, kept=(slope,), slots=(i % _SLOTS,)))
    return StepTable(tuple(rows), levels.initial_scale, thresholding=prediction.thresholding)


def lagrange_integrals(nodes: Sequence[float], end: float) -> list[float]:
    """Return ∫ of each Lagrange polynomial of the nodes, from the first node to `end`; exact for up to eight nodes."""

    def basis(j: int, at: float) -> float:
        value = 1.0
        for k, node in enumerate(nodes):
            if k != j:
                value *= (at - node) / (nodes[j] - node)
        return value

    return [integral(lambda at, j=j: basis(j, at), nodes[0], end) for j in range(len(nodes))]  # type: ignore[misc]
