# SPDX-License-Identifier: MIT
"""Explicit exponential Runge–Kutta methods in λ = log(α/σ) on x0: RES (ODE), SEEDS (SDE) and exponential Heun.

A method has the nodes c of its later model calls, in fractions of the step h, and weights w of the outputs::

    x̂_c = e^(−c·h')·x̂ + Σ_j w_cj·x0_j + σ̂_c·√(1 − e^(−2·c·h·η))·noise,    h' = (1 + η)·h

The noise of a step is one process: from node to node it decays with the sample and a fresh draw is added.
Papers: RES arXiv 2308.02157; SEEDS arXiv 2305.14267.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from ..errors import as_float, error_message, unknown_name
from ..schedules.levels import Levels
from .affine import HISTORY, NOISE, SAMPLE, Affine
from .exponential import phi1, phi2
from .prediction import Prediction
from .sigma_steps import ancestral_split, between, noise_ratios, scaled
from .table import Row, StepTable

#: History slots: the sample at the start of the step, and the outputs of its first two calls.
_START, _OUTPUTS = 0, (1, 2)

#: h' → the weights of x0_1 … x0_k in each update, the update of the whole step last.
Weights = Callable[[float], Sequence[Sequence[float]]]


def exponential_runge_kutta(
    name: str,
    levels: Levels,
    prediction: Prediction,
    nodes: Sequence[float],
    weights: Weights,
    eta: float = 0.0,
    s_noise: float = 1.0,
) -> StepTable:
    """Compile the table of a method with two or three model calls a step; the step to σ = 0 returns x0 after one.

    Args:
        name: of the solver, for messages.
        levels: the levels to visit.
        prediction: how to read the model.
        nodes: c of the second and the third call, in (0, 1].
        weights: the method's weights.
        eta: 0 is the ODE, 1 is DDPM's noise.
        s_noise: the standard deviation of the added noise.
    """
    sigmas = noise_ratios(name, levels)
    as_float(name, "s_noise", s_noise)
    for last, node in zip((0.0, *nodes), nodes, strict=False):
        if not last < as_float(name, "node", node) <= 1.0:
            expected = f"above {last:g} and at most 1"
            raise ValueError(error_message(name, "node", f"is {node}", expected, "place the model calls in order"))
    targets = (*nodes, 1.0)
    rows: list[Row] = []
    for i in range(len(levels)):
        t, s = levels[i], levels[i + 1]
        ancestral_split(name, sigmas[i], sigmas[i + 1], eta)  # refuses a negative eta
        if s.sigma == 0.0:
            model = prediction.at(t)
            rows.append(model.row(s.alpha * model.x0))
            continue
        h = math.log(sigmas[i] / sigmas[i + 1])
        update_weights = weights(h * (1.0 + eta))
        level, carried = t, 0.0 * SAMPLE
        for stage, c in enumerate(targets):
            model = prediction.at(level)
            start = scaled(t) if stage == 0 else HISTORY[_START]
            outputs = [*(HISTORY[slot] for slot in _OUTPUTS[:stage]), model.x0]
            without_noise = _update(c * h * (1.0 + eta), start, outputs, update_weights[stage])
            last_c = 0.0 if stage == 0 else targets[stage - 1]
            target = s if c == 1.0 else levels.locate(between(sigmas[i], sigmas[i + 1], c))
            if eta and stage > 0:
                at_node = _update(last_c * h * (1.0 + eta), start, outputs[:-1], update_weights[stage - 1])
                carried = math.exp(-(c - last_c) * h * (1.0 + eta)) * (scaled(level) - at_node)
            fresh = s_noise * target.noise_ratio * math.sqrt(-math.expm1(-2.0 * (c - last_c) * h * eta))
            prev = target.alpha * (without_noise + carried + fresh * NOISE)
            kept = ((start, model.x0), (model.x0,), ())[stage if stage < len(nodes) else 2]
            slots = ((_START, _OUTPUTS[0]), (_OUTPUTS[1],), ())[stage if stage < len(nodes) else 2]
            rows.append(model.row(prev, kept=kept, slots=slots))
            level = target
    return StepTable(tuple(rows), levels.initial_scale, thresholding=prediction.thresholding)


def _update(distance: float, start: Affine, outputs: Sequence[Affine], weights: Sequence[float]) -> Affine:
    total = math.exp(-distance) * start
    for weight, output in zip(weights, outputs, strict=True):
        total = total + weight * output
    return total


def _first(z: float) -> float:
    """z·φ₁(−z): the integral of the exponential over a distance z."""
    return z * phi1(-z)


def _second(z: float) -> float:
    """z·φ₂(−z)."""
    return z * phi2(-z)


def res_2s(
    levels: Levels, prediction: Prediction, *, c2: float = 0.5, eta: float = 0.0, s_noise: float = 1.0
) -> StepTable:
    """Compile the table of the two-stage RES method (arXiv 2308.02157, section 3.1): b₂ = φ₂/c₂, b₁ = φ₁ − b₂.

    Args:
        levels, prediction, eta, s_noise: as in `exponential_runge_kutta`.
        c2: the node of the second call.
    """
    return exponential_runge_kutta("res_2s", levels, prediction, (c2,), _two_stages(c2), eta, s_noise)


def res_3s(
    levels: Levels,
    prediction: Prediction,
    *,
    c2: float = 0.5,
    c3: float = 1.0,
    eta: float = 0.0,
    s_noise: float = 1.0,
) -> StepTable:
    """Compile the table of the three-stage RES method (arXiv 2308.02157; Hochbruck and Ostermann 2005, eq. 5.8).

    The weight γ of the second output follows from the third-order condition 2·(γ·c₂ + c₃) = 3·(γ·c₂² + c₃²).

    Args:
        levels, prediction, eta, s_noise: as in `exponential_runge_kutta`.
        c2, c3: the nodes of the second and the third call; c₂ is not 2/3.
    """
    if c2 == 2.0 / 3.0:
        raise ValueError(error_message("res_3s", "c2", "is 2/3", "another node", "take c2=0.5"))
    gamma = (3.0 * c3**2 - 2.0 * c3) / (c2 * (2.0 - 3.0 * c2))

    def weights(h: float) -> Sequence[Sequence[float]]:
        a32 = gamma * _second(c2 * h) + c3 / c2 * _second(c3 * h)
        b3 = _second(h) / (gamma * c2 + c3)
        return (
            (_first(c2 * h),),
            (_first(c3 * h) - a32, a32),
            (_first(h) - (1.0 + gamma) * b3, gamma * b3, b3),
        )

    return exponential_runge_kutta("res_3s", levels, prediction, (c2, c3), weights, eta, s_noise)


def seeds_2(
    levels: Levels,
    prediction: Prediction,
    *,
    eta: float = 1.0,
    s_noise: float = 1.0,
    r: float = 0.5,
    solver_type: str = "phi_1",
) -> StepTable:
    """Compile the table of SEEDS-2 (arXiv 2305.14267, algorithm 2); with r = 1 and ``phi_2`` it is exponential Heun.

    Args:
        levels, prediction, eta, s_noise: as in `exponential_runge_kutta`.
        r: the node of the second call.
        solver_type: ``phi_1`` weighs the difference of the outputs with φ₁/(2r), ``phi_2`` with φ₂/r.
    """
    if solver_type not in ("phi_1", "phi_2"):
        raise unknown_name("seeds_2", "solver_type", solver_type, ("phi_1", "phi_2"))

    def midpoint(h: float) -> Sequence[Sequence[float]]:
        share = 1.0 / (2.0 * r)
        return (_first(r * h),), ((1.0 - share) * _first(h), share * _first(h))

    weights = midpoint if solver_type == "phi_1" else _two_stages(r)
    return exponential_runge_kutta("seeds_2", levels, prediction, (r,), weights, eta, s_noise)


def seeds_3(
    levels: Levels,
    prediction: Prediction,
    *,
    eta: float = 1.0,
    s_noise: float = 1.0,
    r_1: float = 1.0 / 3.0,
    r_2: float = 2.0 / 3.0,
) -> StepTable:
    """Compile the table of SEEDS-3 (arXiv 2305.14267, algorithm 3).

    Args:
        levels, prediction, eta, s_noise: as in `exponential_runge_kutta`.
        r_1, r_2: the nodes of the second and the third call.
    """

    def weights(h: float) -> Sequence[Sequence[float]]:
        a32, b3 = r_2 / r_1 * _second(r_2 * h), _second(h) / r_2
        return (_first(r_1 * h),), (_first(r_2 * h) - a32, a32), (_first(h) - b3, 0.0, b3)

    return exponential_runge_kutta("seeds_3", levels, prediction, (r_1, r_2), weights, eta, s_noise)


def _two_stages(c2: float) -> Weights:
    def weights(h: float) -> Sequence[Sequence[float]]:
        b2 = _second(h) / c2
        return (_first(c2 * h),), (_first(h) - b2, b2)

    return weights
