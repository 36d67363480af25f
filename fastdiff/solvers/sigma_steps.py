# SPDX-License-Identifier: MIT
"""Parts of the solvers that are written in σ̂ = σ/α on x̂ = x/α = x0 + σ̂·ε, the coordinates of k-diffusion.

Such a solver reads the sample as ``scaled(t)``, and multiplies its result by α_s.  With α = 1 at every level both are
the sample itself.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

from ..errors import error_message
from ..schedules.levels import Level, Levels
from .affine import HISTORY, SAMPLE, Affine
from .ddim import check_eta

#: The history slot that holds the unconditional prediction of x0 in the CFG++ forms; the caller fills it (see
#: `StepTable.provided_slots`).
UNCOND_SLOT = 3
UNCOND = HISTORY[UNCOND_SLOT]


def scaled(level: Level) -> Affine:
    """Return x̂ = x/α of the sample at a level."""
    return SAMPLE / level.alpha


def noise_ratios(operation: str, levels: Levels) -> list[float]:
    """Return σ̂ of all levels.

    Raises:
        ValueError: the first one is infinite: the sample there has no signal.
    """
    ratios = [level.noise_ratio for level in levels.points]
    if math.isinf(ratios[0]):
        raise ValueError(
            error_message(
                operation,
                "levels",
                "begins at α = 0, where σ/α is infinite",
                "a first level with some signal",
                "start at a lower noise level, or take ddim or dpm_multistep",
            )
        )
    return ratios


def ancestral_split(operation: str, sigma: float, sigma_next: float, eta: float) -> tuple[float, float]:
    """Split a step into one down to σ̂_down and fresh noise σ̂_up, with σ̂_down² + σ̂_up² = σ̂_s² (k-diffusion).

    ``σ̂_up = min(σ̂_s, η·√(σ̂_s²·(σ̂_t² − σ̂_s²)/σ̂_t²))``

    Args:
        operation: the caller's name, for errors.
        sigma, sigma_next: σ̂_t, which may be infinite, and σ̂_s.
        eta: η; 0 is no noise and 1 DDPM's.

    Returns:
        (σ̂_down, σ̂_up).

    Raises:
        TypeError, ValueError: η is not a finite number of 0 or more.
    """
    check_eta(operation, eta)
    up = min(sigma_next, eta * sigma_next * math.sqrt(max(1.0 - (sigma_next / sigma) ** 2, 0.0)))
    return math.sqrt(max(sigma_next**2 - up**2, 0.0)), up


def between(sigma: float, sigma_next: float, fraction: float) -> float:
    """Return σ̂ at a fraction of the way from one level to the next in log σ̂."""
    return math.exp((1.0 - fraction) * math.log(sigma) + fraction * math.log(sigma_next))


@functools.cache
def gauss_legendre(count: int) -> tuple[tuple[float, float], ...]:
    """Return the nodes and weights of the Gauss–Legendre rule on [−1, 1], exact for polynomials of degree 2·count − 1.

    The nodes are the roots of the Legendre polynomial, found by Newton's method.
    """
    rule = []
    for k in range(count):
        node = math.cos(math.pi * (k + 0.75) / (count + 0.5))
        for _ in range(100):
            before, value = 1.0, node
            for n in range(2, count + 1):
                before, value = value, ((2 * n - 1) * node * value - (n - 1) * before) / n
            slope = count * (node * value - before) / (node * node - 1.0)
            change = value / slope
            node -= change
            if abs(change) < 1e-15:
                break
        rule.append((node, 2.0 / ((1.0 - node * node) * slope * slope)))
    return tuple(rule)


def integral(function: Callable[[float], float], start: float, end: float, *, nodes: int = 4, panels: int = 1) -> float:
    """Integrate a smooth function by the Gauss–Legendre rule on equal panels."""
    half = 0.5 * (end - start) / panels
    return half * sum(
        weight * function(start + half * (2 * panel + 1 + node))
        for panel in range(panels)
        for node, weight in gauss_legendre(nodes)
    )
