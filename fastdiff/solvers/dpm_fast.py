# SPDX-License-Identifier: MIT
"""DPM-Solver of orders 1, 2 and 3 in one loop: DPM-Solver-fast, and the pieces of the adaptive solver.

arXiv 2206.00927: algorithms 1 and 2, section 3.4 (fast) and appendix C (adaptive), in the noise form with ε and, as
k-diffusion has it, ancestral noise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..errors import as_float, error_message
from ..row_layout import COLUMNS, KEEP_0, KEEP_1, PREDICTION_OUTPUT, PREV_SAMPLE, STORE_0, blank_row
from ..schedules.levels import Level, Levels, Locate
from .affine import HISTORY, NOISE
from .exponential import phi1
from .prediction import Prediction
from .sigma_steps import ancestral_split, between, noise_ratios, scaled
from .table import Row, StepTable

#: History slots of a step: ε at its start, the sample there, the result of lower order, and its difference from the
#: result itself.
START_NOISE, START, LOW_ORDER, DIFFERENCE = 0, 1, 2, 3


def fast_orders(calls: int) -> tuple[int, ...]:
    """Return the orders of the steps of DPM-Solver-fast with `calls` model calls (arXiv 2206.00927, section 3.4)."""
    steps = calls // 3 + 1
    if calls % 3 == 0:
        return (*[3] * (steps - 2), 2, 1)
    return (*[3] * (steps - 1), calls % 3)


def dpm_fast(
    levels: Levels, prediction: Prediction, *, orders: Sequence[int], eta: float = 0.0, s_noise: float = 1.0
) -> StepTable:
    """Compile the table of DPM-Solver-fast: one step of the given order between each two levels.

    With η, a step goes down to σ̂_down of `ancestral_split`, but not below the last level, and noise brings it up.

    Args:
        levels: the ends of the steps; the last has noise.
        prediction: how to read the model.
        orders: 1, 2 or 3 for each step.
        eta: 0 is the ODE, 1 is DDPM's noise.
        s_noise: the standard deviation of the added noise.
    """
    sigmas = noise_ratios("dpm_fast", levels)
    as_float("dpm_fast", "s_noise", s_noise)
    if len(orders) != len(levels):
        raise ValueError(
            error_message("dpm_fast", "orders", f"has {len(orders)}", f"{len(levels)}", "give one for each step")
        )
    if sigmas[-1] == 0.0:
        got, remedy = "ends at σ = 0", "end at a small noise level"
        raise ValueError(error_message("dpm_fast", "levels", got, "a last level with noise", remedy))
    rows: list[Row] = []
    for i, order in enumerate(orders):
        down, up = noisy_step("dpm_fast", sigmas[i], sigmas[i + 1], sigmas[-1], eta)
        end = levels[i + 1]
        step = step_rows(levels[i], levels.locate(down), order, prediction, levels.locate)
        last = step[-1]
        prev = (end.alpha / levels.locate(down).alpha) * last.prev_sample + (end.alpha * s_noise * up) * NOISE
        rows += [*step[:-1], Row(last.timestep, prev, last.prediction, last.clip)]
    return StepTable(tuple(rows), levels.initial_scale, thresholding=prediction.thresholding)


def noisy_step(operation: str, sigma: float, sigma_next: float, sigma_end: float, eta: float) -> tuple[float, float]:
    """Return the level that a step goes down to and the noise after it, no level below the end of the loop."""
    if not eta:
        return sigma_next, 0.0
    down = max(sigma_end, ancestral_split(operation, sigma, sigma_next, eta)[0])
    return down, math.sqrt(max(sigma_next**2 - down**2, 0.0))


def step_rows(t: Level, s: Level, order: int, prediction: Prediction, locate: Locate) -> list[Row]:
    """Return the rows of one step from t to s with σ̂_s > 0: `order` model calls.

    Args:
        t, s: the levels.
        order: 1, 2 (r = ½) or 3 (r = ⅓ and ⅔).
        prediction: how to read the model.
        locate: finds the levels inside.
    """
    sigma, target = t.noise_ratio, s.noise_ratio
    first = prediction.at(t)
    x, noise = scaled(t), first.consistent_noise
    if order == 1:
        return [first.row(s.alpha * (x - (sigma - target) * noise))]
    kept_noise, start = HISTORY[START_NOISE], HISTORY[START]
    near = locate(between(sigma, target, 1.0 / order))
    inner = x - (sigma - near.noise_ratio) * noise
    rows = [first.row(near.alpha * inner, kept=(noise, x), slots=(START_NOISE, START))]
    second = prediction.at(near)
    slope = second.consistent_noise - kept_noise
    whole = start - (sigma - target) * kept_noise
    if order == 2:
        rows.append(second.row(s.alpha * (whole - (sigma - target) * slope)))
        return rows
    if order != 3:
        raise ValueError(error_message("dpm_fast", "order", f"is {order}", "1, 2 or 3", "choose one of those orders"))
    far = locate(between(sigma, target, 2.0 / 3.0))
    outer = start - (sigma - far.noise_ratio) * kept_noise - _bend(far.noise_ratio, sigma, 2.0) * slope
    rows.append(second.row(far.alpha * outer))
    third = prediction.at(far)
    rows.append(third.row(s.alpha * (whole - _bend(target, sigma, 1.5) * (third.consistent_noise - kept_noise))))
    return rows


def _bend(target: float, sigma: float, weight: float) -> float:
    """Return the weight of the difference of two ε in a step to `target`: weight·σ̂_s·((e^h − 1)/h − 1)."""
    return weight * target * (phi1(math.log(sigma / target)) - 1.0)


def step_with_error(sigma: float, target: float, order: int) -> tuple[list[list[float]], list[float], list[list[int]]]:
    """Return the step of `step_rows` with an estimate of its error, for x = x0 + σ·ε and a model that predicts x0.

    The estimate is the step of one order less from the same outputs: order 1 beside 2, and order 2 with r = ⅓ beside 3.
    It goes to the slot `LOW_ORDER`, and its difference from the result to `DIFFERENCE`.  A loop that chooses its steps
    makes these rows at each of them, so that they are written as numbers, without symbols.

    Args:
        sigma, target: the levels, above 0.
        order: 2 or 3.

    Returns:
        The rows' numbers, the model's level of each, and the slots that each writes.
    """
    span, near = sigma - target, between(sigma, target, 1.0 / order)
    first, second = blank_row(), blank_row()
    _fill(first, PREV_SAMPLE, near / sigma, 1.0 - near / sigma)
    _fill(first, KEEP_0, 1.0 / sigma, -1.0 / sigma)
    slots = [[START_NOISE, START]]
    rows, levels = [first, second], [sigma, near]
    if order == 2:
        # The sample at the inner level and ε give the sample at the start.
        _fill(first, KEEP_1, target / sigma, 1.0 - target / sigma)
        slots = [[START_NOISE, LOW_ORDER], [DIFFERENCE]]
        result = 1.0 - span / near, span / near, sigma - near, 0.0
        last = second
    else:
        _fill(first, KEEP_1, 1.0, 0.0)
        far, last = between(sigma, target, 2.0 / 3.0), blank_row()
        outer, low = _bend(far, sigma, 2.0), 1.5 * span
        for at, weight, whole in ((PREV_SAMPLE, outer, sigma - far), (KEEP_0, low, span)):
            _fill(second, at, -weight / near, weight / near, weight - whole, 1.0)
        bend = _bend(target, sigma, 1.5)
        result = -bend / far, bend / far, bend - span, 1.0
        slots += [[LOW_ORDER], [DIFFERENCE]]
        rows, levels = [*rows, last], [*levels, far]
    of_sample, of_output, of_noise, of_start = result
    _fill(last, PREV_SAMPLE, of_sample, of_output, of_noise, of_start)
    _fill(last, KEEP_0, -of_sample, -of_output, -of_noise, -of_start, 1.0)
    for row, written in zip(rows, slots, strict=True):
        row[PREDICTION_OUTPUT] = 1.0
        row[STORE_0 : STORE_0 + len(written)] = written
    return rows, levels, slots


_X, _M, _H = COLUMNS.index("sample"), COLUMNS.index("model_output"), COLUMNS.index("history_0")


def _fill(
    row: list[float],
    start: int,
    of_sample: float,
    of_output: float,
    of_noise: float = 0.0,
    of_start: float = 0.0,
    of_low_order: float = 0.0,
) -> None:
    """Write the weights of one output: of the sample, the model's output and three history slots."""
    row[start + _X], row[start + _M] = of_sample, of_output
    row[start + _H + START_NOISE], row[start + _H + START] = of_noise, of_start
    row[start + _H + LOW_ORDER] = of_low_order


class StepSizeController:
    """A PID controller of the step size h in −log σ̂, as k-diffusion defines it.

    Args:
        h: the first step size.
        pcoeff, icoeff, dcoeff: of the controller.
        order: of the error estimate.
        accept_safety: a step is accepted where the factor for the next one is at least this.
    """

    def __init__(
        self, h: float, pcoeff: float, icoeff: float, dcoeff: float, order: float, accept_safety: float
    ) -> None:
        self.h = h
        self._exponents = (
            (pcoeff + icoeff + dcoeff) / order,
            -(pcoeff + 2.0 * dcoeff) / order,
            dcoeff / order,
        )
        self._accept_safety = accept_safety
        self._inverse_errors: list[float] = []

    def accepts(self, error: float) -> bool:
        """Take the error of a step, in units of the tolerance; set the next step size; return True to keep the step."""
        inverse = 1.0 / (error + 1e-8)
        if not self._inverse_errors:
            self._inverse_errors = [inverse] * 3
        self._inverse_errors[0] = inverse
        factor = math.prod(e**power for e, power in zip(self._inverse_errors, self._exponents, strict=True))
        factor = 1.0 + math.atan(factor - 1.0)
        accepted = factor >= self._accept_safety
        if accepted:
            self._inverse_errors[2] = self._inverse_errors[1]
            self._inverse_errors[1] = self._inverse_errors[0]
        self.h *= factor
        return accepted
