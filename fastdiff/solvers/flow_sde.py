# SPDX-License-Identifier: MIT
"""Flow-SDE: the stochastic sampler of a flow model that policy-gradient training draws from."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..errors import checked_float, error_message
from ..schedules.levels import Level, Levels
from .affine import NOISE, SAMPLE
from .prediction import Prediction
from .table import StepTable


def flow_sde(
    levels: Levels,
    prediction: Prediction,
    *,
    noise_level: float | Sequence[float] = 0.7,
    noise_last: bool = True,
) -> StepTable:
    """Compile the table of Flow-GRPO's SDE (arXiv 2505.05470, eq. 9) on the straight path α = 1 − t, σ = t.

    With v = ε − x0 and dt = t − s > 0 each step is Euler–Maruyama's, ``σ_t = a·√(t/(1 − t))``::

        mean = x − [v + σ_t²/(2t)·(x + (1 − t)·v)]·dt
        prev = mean + σ_t·√dt·z

    The marginals are those of the ODE in the limit of small steps.  At t = 1, where σ_t is infinite, it is taken at
    the next level, as in the authors' code.

    Args:
        levels: the levels to visit, of a flow schedule.
        prediction: how to read the model.
        noise_level: a, 0 for the ODE; or one a step, to draw in a window of the steps alone.
        noise_last: add noise in the last step too, as the paper does; False makes that step deterministic.

    Raises:
        TypeError, ValueError: a noise level is negative or no number, there are not as many as steps, or the levels
            lie on another path.
    """
    amounts = step_noise_levels("flow_sde", "noise_level", noise_level, len(levels))
    rows = []
    for i in range(len(levels)):
        t, s = levels[i], levels[i + 1]
        check_flow_level("flow_sde", t)
        check_flow_level("flow_sde", s)
        model = prediction.at(t)
        velocity = model.consistent_noise - model.x0
        time, dt = t.sigma, t.sigma - s.sigma
        amount = amounts[i] if noise_last or i + 1 < len(levels) else 0.0
        std = 0.0
        if amount:
            capped = time if time < 1.0 else s.sigma
            if not 0.0 < capped < 1.0:
                raise ValueError(
                    error_message(
                        "flow_sde",
                        "levels",
                        "go from time 1 to 0 in one step, where the noise is infinite",
                        "a level between, or no noise in that step",
                        "ask for two steps or more",
                    )
                )
            std = amount * math.sqrt(capped / (1.0 - capped))
        drift = velocity + (std * std / (2.0 * time)) * (SAMPLE + (1.0 - time) * velocity)
        rows.append(model.row(SAMPLE - dt * drift + (std * math.sqrt(dt)) * NOISE))
    return StepTable(tuple(rows), levels.initial_scale, thresholding=prediction.thresholding)


def check_flow_level(operation: str, level: Level) -> None:
    """Refuse a level off the path α = 1 − t, σ = t."""
    if abs(level.alpha + level.sigma - 1.0) > 1e-9:
        raise ValueError(
            error_message(
                operation,
                "levels",
                f"hold alpha {level.alpha:.6g} and sigma {level.sigma:.6g}",
                "alpha + sigma = 1, the path of a flow model",
                "make them with levels_from_flow_times, or use cps or ddim(eta=...) for another path",
            )
        )


def step_noise_levels(operation: str, argument: str, given: float | Sequence[float], steps: int) -> list[float]:
    """Return a noise level for each step, from one for all or from one a step."""
    if not isinstance(given, (list, tuple)):
        return [checked_float(operation, argument, given, 0.0)] * steps
    if len(given) != steps:
        raise ValueError(
            error_message(operation, argument, f"holds {len(given)} numbers", f"{steps}, one a step", "pass one number")
        )
    return [checked_float(operation, f"{argument}[{i}]", value, 0.0) for i, value in enumerate(given)]
