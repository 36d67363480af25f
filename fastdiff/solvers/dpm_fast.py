# SPDX-License-Identifier: MIT
"""DPM-Solver of orders 1, 2 and 3 in one loop: DPM-Solver-fast, and the pieces of the adaptive solver.

arXiv 2206.00927: algorithms 1 and 2, section 3.4 (fast) and appendix C (adaptive), in the noise form with ε and, as
k-diffusion has it, ancestral noise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..errors import as_float, error_message
from ..schedules.levels import Level, Levels, Locate
from .affine import HISTORY, NOISE, SAMPLE, ZERO, Affine
from .exponential import phi1
from .prediction import Prediction
from .sigma_steps import ancestral_split, between, noise_ratios, scaled
from .table import Row, StepTable

#: History slots of a step: ε at its start, the sample there, and the result of lower order.
START_NOISE, START, LOW_ORDER = 0, 1, 2


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
        step = step_rows(levels[i], levels.locate(down), order, prediction, levels.locate, with_low_order=False)
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


def step_rows(
    t: Level, s: Level, order: int, prediction: Prediction, locate: Locate, *, with_low_order: bool
) -> list[Row]:
    """Return the rows of one step from t to s with σ̂_s > 0: `order` model calls.

    Args:
        t, s: the levels.
        order: 1, 2 (r = ½) or 3 (r = ⅓ and ⅔).
        prediction: how to read the model.
        locate: finds the levels inside.
        with_low_order: keep the step of one order less in the slot `LOW_ORDER`, for an estimate of the error: from
            order 1 beside 2, and from order 2 with r = ⅓ beside 3.
    """
    sigma, target = t.noise_ratio, s.noise_ratio
    h = math.log(sigma / target)
    first = prediction.at(t)
    x, noise = scaled(t), first.consistent_noise

    def first_order(start: Affine, slope: Affine, level: Level) -> Affine:
        return start - (level.noise_ratio * math.expm1(math.log(sigma / level.noise_ratio))) * slope

    def second_order(start: Affine, slope: Affine, inner: Affine, r: float) -> Affine:
        return first_order(start, slope, s) - (target * math.expm1(h) / (2.0 * r)) * (inner - slope)

    if order == 1:
        return [first.row(s.alpha * first_order(x, noise, s))]
    kept_noise, kept_x = HISTORY[START_NOISE], HISTORY[START]
    near = locate(between(sigma, target, 1.0 / order))
    inner = near.alpha * first_order(x, noise, near)
    second = prediction.at(near)
    if order == 2:
        # The sample at the inner level and ε give the sample at the start: no slot for it.
        start = SAMPLE / near.alpha - first_order(ZERO, kept_noise, near)
        low = (first_order(x, noise, s) * s.alpha,) if with_low_order else ()
        rows = [first.row(inner, kept=(noise, *low), slots=(START_NOISE, LOW_ORDER)[: 1 + len(low)])]
        rows.append(second.row(s.alpha * second_order(start, kept_noise, second.consistent_noise, 0.5)))
        return rows
    if order != 3:
        raise ValueError(error_message("dpm_fast", "order", f"is {order}", "1, 2 or 3", "choose one of those orders"))
    far = locate(between(sigma, target, 2.0 / 3.0))
    far_h = math.log(sigma / far.noise_ratio)
    rows = [first.row(inner, kept=(noise, x), slots=(START_NOISE, START))]
    slope = second.consistent_noise - kept_noise
    outer = first_order(kept_x, kept_noise, far) - (2.0 * far.noise_ratio * (phi1(far_h) - 1.0)) * slope
    low = (s.alpha * second_order(kept_x, kept_noise, second.consistent_noise, 1.0 / 3.0),) if with_low_order else ()
    rows.append(second.row(far.alpha * outer, kept=low, slots=(LOW_ORDER,)[: len(low)]))
    third = prediction.at(far)
    bend = third.consistent_noise - kept_noise
    rows.append(third.row(s.alpha * (first_order(kept_x, kept_noise, s) - (1.5 * target * (phi1(h) - 1.0)) * bend)))
    return rows


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
