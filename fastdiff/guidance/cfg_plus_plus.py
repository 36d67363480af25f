# SPDX-License-Identifier: MIT
"""CFG++ as a schedule of scales."""

from __future__ import annotations

import math

from ..errors import checked_float, checked_type, error_message
from ..schedules.levels import Levels


def cfg_plus_plus(scale: float, levels: Levels) -> tuple[float, ...]:
    """Return the guidance scale of each step with which DDIM takes the step of CFG++ (arXiv 2406.08070, algorithm 2).

    CFG++ predicts x0 with ε̂ = u + λ·(c − u) and adds noise with u: x' = α'·(x − σ·ε̂)/α + σ'·u.  Terms with c − u have
    the weight −λ·α'·σ/α there, and g·(σ' − α'·σ/α) in DDIM with scale g.  So g = λ·ρ/(ρ − ρ') with ρ = σ/α, for every
    prediction type.  With a solver other than DDIM without noise (or Euler) it is a schedule of scales, and no CFG++.

    Args:
        scale: λ, usually between 0 and 1.
        levels: the levels of the loop, from ``sampler.levels(n)``.

    Returns:
        n scales, for `PlainGuidance` and every method with the branches of it.

    Raises:
        TypeError, ValueError: an argument does not fit.
    """
    checked_type("cfg_plus_plus", "levels", levels, Levels, "Levels", "pass sampler.levels(n)")
    number = checked_float("cfg_plus_plus", "scale", scale, -math.inf)
    scales = []
    for i in range(len(levels)):
        here, there = levels[i].noise_ratio, levels[i + 1].noise_ratio
        if here == there:
            got = f"have one noise level at {i} and {i + 1}"
            raise ValueError(error_message("cfg_plus_plus", "levels", got, "falling noise", "leave one out"))
        scales.append(number if math.isinf(here) else number * here / (here - there))
    return tuple(scales)
