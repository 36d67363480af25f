# SPDX-License-Identifier: MIT
"""PNDM: Adams-Bashforth on ε with DDIM's step, after a start-up of its own."""

from __future__ import annotations

from ..errors import checked_bool
from ..schedules.levels import Levels
from .adams import plain_step, transfer
from .affine import HISTORY, SAMPLE
from .ipndm import even_weights
from .prediction import Prediction
from .table import Row, StepTable

#: Three earlier outputs in a ring, and what the start-up keeps.
RING, SCRATCH = 3, 3


def pndm(levels: Levels, prediction: Prediction, *, skip_prk_steps: bool = True) -> StepTable:
    """Compile the table of PNDM (arXiv 2202.09778, eq. 9, 12 and 13 and algorithm 2).

    Every step is DDIM's, ``prev/α_s = x/α_t + (σ̂_s − σ̂_t)·ε'``, and ε' is ``(55·ε_0 − 59·ε_1 + 37·ε_2 − 9·ε_3)/24`` as
    soon as there are four outputs.  Before that the paper takes three pseudo Runge-Kutta steps of four model calls, two
    of them halfway; ``skip_prk_steps`` takes one step with the mean of ε at its two ends, two model calls, and goes on
    with the outputs that there are.  Steps from α = 0, and start-up steps to σ = 0, are DDIM's.

    Args:
        levels: the levels to visit.
        prediction: how to read the model.
        skip_prk_steps: as above; True is what latent diffusion models use.

    Raises:
        TypeError: skip_prk_steps is not a bool.
    """
    checked_bool("pndm", "skip_prk_steps", skip_prk_steps)
    rows: list[Row] = []
    ring: list[int] = []  # slots of earlier outputs, the newest first
    started = 0
    for i in range(len(levels)):
        t, s = levels[i], levels[i + 1]
        model = prediction.at(t)
        if t.alpha == 0.0:
            rows.append(model.row(plain_step(model, s)))
            continue
        slot = i % RING
        if s.sigma > 0.0 and started < (1 if skip_prk_steps else 3):
            start = _improved_euler if skip_prk_steps else _runge_kutta
            rows += start(levels, prediction, i, slot)
            started += 1
        else:
            outputs = [model.consistent_noise, *(HISTORY[j] for j in ring)]
            x, slope = transfer(t, s)
            prev = x * SAMPLE
            for weight, value in zip(even_weights(len(outputs)), outputs, strict=True):
                prev = prev + (slope * weight) * value
            rows.append(model.row(prev, kept=(model.consistent_noise,), slots=(slot,)))
        ring = [slot, *ring][:RING]
    return StepTable(tuple(rows), levels.initial_scale, thresholding=prediction.thresholding)


def _improved_euler(levels: Levels, reading: Prediction, i: int, slot: int) -> list[Row]:
    """Return the step to s with ε at t, and again with the mean of ε at t and s, which starts from the result."""
    t, s = levels[i], levels[i + 1]
    x, slope = transfer(t, s)
    first, second = reading.at(t), reading.at(s)
    prev = x * SAMPLE + slope * first.consistent_noise
    again = SAMPLE + (0.5 * slope) * (second.consistent_noise - HISTORY[slot])
    return [first.row(prev, kept=(first.consistent_noise,), slots=(slot,)), second.row(again)]


def _runge_kutta(levels: Levels, reading: Prediction, i: int, slot: int) -> list[Row]:
    """Return the four rows of a pseudo Runge-Kutta step: ε' = (ε_1 + 2·ε_2 + 2·ε_3 + ε_4)/6.

    The scratch slot has the first sample until the third row, and from there all of the result but ε_4's part.
    """
    t, s = levels[i], levels[i + 1]
    middle = levels.middle(t, s)
    (half_x, half_slope), (x, slope) = transfer(t, middle), transfer(t, s)
    at_t, at_middle, at_s = reading.at(t), reading.at(middle), reading.at(s)
    noise_1, noise_4 = at_t.consistent_noise, at_s.consistent_noise
    start = HISTORY[SCRATCH]
    noise_3 = at_middle.consistent_noise
    noise_2 = (SAMPLE - half_x * start) / half_slope  # from the sample that it led to
    gathered = x * start + (slope / 6.0) * (HISTORY[slot] + 2.0 * noise_2 + 2.0 * noise_3)
    return [
        at_t.row(half_x * SAMPLE + half_slope * noise_1, kept=(noise_1, SAMPLE), slots=(slot, SCRATCH)),
        at_middle.row(half_x * start + half_slope * at_middle.consistent_noise),
        at_middle.row(x * start + slope * noise_3, kept=(gathered,), slots=(SCRATCH,)),
        at_s.row(start + (slope / 6.0) * noise_4),
    ]
