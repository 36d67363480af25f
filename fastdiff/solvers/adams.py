# SPDX-License-Identifier: MIT
"""Linear multistep methods: weights of earlier model outputs, and the rows of a predictor with or without corrector.

A step from t to s integrates ``e^{z·(1 − v)}·P(v)`` over v from 0 (t) to 1 (s), where P is the polynomial through the
outputs at hand and z is 0 for the classical Adams methods, ±h for the exponential ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..errors import checked_integer, error_message
from ..schedules.levels import Level, Levels
from .affine import HISTORY, NOISE, SAMPLE, ZERO, Affine
from .prediction import Denoised, Prediction
from .table import Row, StepTable


def phi(k: int, z: float) -> float:
    """φ_k(z) = ∫₀¹ e^{z·(1 − v)}·v^{k−1}/(k − 1)! dv for k ≥ 1, by its series for |z| < 1, where differences cancel."""
    if abs(z) >= 1.0:
        value = math.expm1(z) / z
        for j in range(1, k):
            value = (value - 1.0 / math.factorial(j)) / z
        return value
    return math.fsum(z**j / math.factorial(j + k) for j in range(18))


def adams_weights(nodes: Sequence[float], z: float = 0.0) -> list[float]:
    """Return the integral of ``e^{z·(1 − v)}`` times each Lagrange polynomial of the nodes, over v from 0 to 1.

    Args:
        nodes: the places of the outputs, different from each other: 0 at the start of the step, 1 at its end.
        z: the exponent.
    """
    moments = [math.factorial(j) * phi(j + 1, z) for j in range(len(nodes))]
    weights = []
    for k, node in enumerate(nodes):
        polynomial = [1.0]  # ascending powers of v
        for other in (*nodes[:k], *nodes[k + 1 :]):
            shifted, scaled = [0.0, *polynomial], [*polynomial, 0.0]
            polynomial = [(a - other * b) / (node - other) for a, b in zip(shifted, scaled, strict=True)]
        weights.append(math.fsum(a * b for a, b in zip(polynomial, moments, strict=True)))
    return weights


@dataclass(frozen=True)
class MultistepStep:
    """One step: ``prev = x·sample + Σ predictor_j·output_j + noise·z``, the newest output first.

    Attributes:
        x: coefficient of the sample.
        predictor: coefficients of the outputs at t and before it.
        corrector: coefficients of the output at s, at t and before it, which replace those of the predictor once the
            output at s is known; empty for no correction.
        noise: coefficient of a standard normal draw, which predictor and corrector share.
    """

    x: float
    predictor: Sequence[float]
    corrector: Sequence[float] = ()
    noise: float = 0.0


def transfer(t: Level, s: Level) -> tuple[float, float]:
    """Return (a, c) of ``a·x + c·ε``, the step from t to s of the probability-flow ODE for a constant ε."""
    return s.alpha / t.alpha, s.alpha * (s.noise_ratio - t.noise_ratio)


def plain_step(model: Denoised, s: Level) -> Affine:
    """Return the step to s for the constant x0 and ε of the model: DDIM's, also from α = 0 and to σ = 0."""
    return s.alpha * model.x0 + s.sigma * model.consistent_noise


def multistep_rows(
    grid: Levels,
    reading: Prediction,
    output: Callable[[Denoised], Affine],
    slots: int,
    step_at: Callable[[int, int], MultistepStep],
) -> list[Row]:
    """Return one row a level for a multistep method, whose outputs go to a ring of history slots.

    The corrector needs neither the last sample nor its noise: the predicted sample has both, and the correction is the
    difference of the two sets of coefficients, ``x + Σ (corrector_j − predictor_j)·output_j``.  A step from α = 0 is
    `plain_step`, and its output, at infinite λ, is not used again.

    Args:
        grid: the levels to visit.
        reading: how to read the model.
        output: the output that is interpolated.
        slots: history slots, 1 to 4.
        step_at: gives the step of an index, for the number of earlier outputs at hand.
    """
    rows: list[Row] = []
    known, last = 0, MultistepStep(1.0, ())
    for i in range(len(grid)):
        t, s = grid[i], grid[i + 1]
        model = reading.at(t)
        if t.alpha == 0.0:
            rows.append(model.row(plain_step(model, s)))
            continue
        current = output(model)
        outputs = [current, *(HISTORY[(i - j) % slots] for j in range(1, known + 1))]
        sample = SAMPLE
        if last.corrector:
            sample = sample + _weighted(_difference(last.corrector, [0.0, *last.predictor]), outputs)
        last = step_at(i, known)
        prev = last.x * sample + _weighted(last.predictor, outputs) + last.noise * NOISE
        rows.append(model.row(prev, kept=(current,), slots=(i % slots,)))
        known = min(known + 1, slots)
    return rows


def multistep_table(
    grid: Levels,
    reading: Prediction,
    output: Callable[[Denoised], Affine],
    slots: int,
    step_at: Callable[[int, int], MultistepStep],
) -> StepTable:
    """Return the table of `multistep_rows`."""
    rows = multistep_rows(grid, reading, output, slots, step_at)
    return StepTable(tuple(rows), grid.initial_scale, thresholding=reading.thresholding)


def _difference(a: Sequence[float], b: Sequence[float]) -> list[float]:
    size = max(len(a), len(b))
    return [x - y for x, y in zip([*a, *[0.0] * (size - len(a))], [*b, *[0.0] * (size - len(b))], strict=True)]


def _weighted(weights: Sequence[float], outputs: Sequence[Affine]) -> Affine:
    total = ZERO
    for weight, value in zip(weights, outputs[: len(weights)], strict=True):
        total = total + weight * value
    return total


def log_snr_nodes(levels: Levels, index: int, count: int) -> list[float]:
    """Return the places in λ of `count` levels, `index` first and back from there, in units of the step from it."""
    start = levels[index].half_log_snr
    h = levels[index + 1].half_log_snr - start
    return [(levels[index - j].half_log_snr - start) / h for j in range(count)]


def checked_order(operation: str, argument: str, value: object, lowest: int, highest: int) -> int:
    """Return an order as an int.

    Raises:
        TypeError: it is not an integer.
        ValueError: it is out of range.
    """
    order = checked_integer(operation, argument, value, lowest)
    if order > highest:
        raise ValueError(
            error_message(
                operation,
                argument,
                f"is {order}",
                f"an integer from {lowest} to {highest}",
                "choose one of those orders",
            )
        )
    return order
