# SPDX-License-Identifier: MIT
"""DPM-Solver and DPM-Solver++, multistep: differences of earlier model outputs approximate its derivatives."""

from __future__ import annotations

import math

from ..errors import error_message, unknown_name
from ..schedules.levels import Level, Levels
from .affine import HISTORY, NOISE, SAMPLE, Affine
from .exponential import Algorithm, SolverType, Step, exponential_step, phi2
from .prediction import Prediction
from .table import StepTable

#: Below this many steps, `lower_order_final` lowers the order at the end, as in the authors' code.
FEW_STEPS = 15

THIRD_ORDERS = ("compatible", "exact")


def dpm_multistep(
    levels: Levels,
    prediction: Prediction,
    *,
    algorithm_type: str | Algorithm = Algorithm.DPM_SOLVER_PP,
    solver_order: int = 2,
    solver_type: str | SolverType = SolverType.MIDPOINT,
    lower_order_final: bool = True,
    euler_at_final: bool = False,
    third_order: str = "compatible",
) -> StepTable:
    """Compile the table of multistep DPM-Solver(++), ODE or SDE (arXiv 2211.01095, algorithm 2 and section 5).

    Args:
        levels: the levels to visit.
        prediction: how to read the model.
        algorithm_type: ``dpmsolver``, ``dpmsolver++``, ``sde-dpmsolver`` or ``sde-dpmsolver++``.
        solver_order: 1, 2 or 3; the first steps run at the order that the history allows.
        solver_type: ``midpoint`` or ``heun``, for second-order steps.
        lower_order_final: with fewer than 15 steps, take the last two at orders 2 and 1.
        euler_at_final: take the last step at order 1.
        third_order: ``compatible`` weighs the second difference as the authors and diffusers do, which measures
            order 2; ``exact`` gives it its whole weight, twice as much (a divided difference is half a
            derivative), which measures order 3.  In the SDE form the compatible weight also has the sign that
            diffusers gives its constant.

    The last step to σ = 0 is of first order always: its h is infinite and no difference is defined over it.
    """
    algorithm, kind = Algorithm.parse(algorithm_type), SolverType.parse(solver_type)
    check_order(solver_order)
    if third_order not in THIRD_ORDERS:
        raise unknown_name("dpm_solver", "third_order", third_order, THIRD_ORDERS)
    n = len(levels)
    slots = max(solver_order - 1, 1)
    rows = []
    for i in range(n):
        t, s = levels[i], levels[i + 1]
        model = prediction.at(t)
        current = algorithm.interpolated(model)
        form = algorithm.at(t)
        step = exponential_step(form, t, s)
        order = min(solver_order, i + 1, n - i if lower_order_final and n < FEW_STEPS else solver_order)
        if math.isinf(step.h) or (i == n - 1 and euler_at_final):
            order = 1
        past = [HISTORY[(i - j) % slots] for j in range(1, order)]
        prev = step.x * SAMPLE + step.d0 * form.interpolated(model)
        if order == 2:
            d1 = (current - past[0]) / _spacing(levels, i - 1, step)
            prev = prev + step.first_difference(kind) * d1
        elif order == 3:
            d1, d2 = _differences(current, past, _spacing(levels, i - 1, step), _spacing(levels, i - 2, step))
            prev = prev + step.d1 * d1 + _second_weight(algorithm, step, s, third_order) * d2
        if step.noise:
            prev = prev + step.noise * NOISE
        rows.append(model.row(prev, kept=(current,), slots=(i % slots,)))
    return StepTable(tuple(rows), levels.initial_scale, thresholding=prediction.thresholding)


def _spacing(levels: Levels, index: int, step: Step) -> float:
    """r: the distance of levels `index` and `index` + 1 in λ, in units of the current step."""
    return (levels[index + 1].half_log_snr - levels[index].half_log_snr) / step.h


def _differences(current: Affine, past: list[Affine], r0: float, r1: float) -> tuple[Affine, Affine]:
    """First and second divided differences of the last three outputs, scaled to the current step."""
    if math.isinf(r1):  # the oldest output is at infinite noise: its second difference is 0
        return (current - past[0]) / r0, 0.0 * current
    recent, older = (current - past[0]) / r0, (past[0] - past[1]) / r1
    bend = (recent - older) / (r0 + r1)
    return recent + r0 * bend, bend


def _second_weight(algorithm: Algorithm, step: Step, s: Level, third_order: str) -> float:
    """The coefficient of the second difference in a step to level s."""
    if third_order == "exact":
        return 2.0 * step.d2
    if algorithm is Algorithm.SDE_DPM_SOLVER_PP:
        return -s.alpha * (phi2(-2.0 * step.h) + 0.5)
    return step.d2


def check_order(solver_order: int) -> None:
    """Refuse an order other than the integers 1, 2 and 3."""
    if isinstance(solver_order, bool) or not hasattr(solver_order, "__index__"):
        got, remedy = f"has type {type(solver_order).__name__}", "pass solver_order as an int"
        raise TypeError(error_message("dpm_solver", "solver_order", got, "1, 2 or 3", remedy))
    if solver_order not in (1, 2, 3):
        raise ValueError(
            error_message(
                "dpm_solver", "solver_order", f"is {solver_order!r}", "1, 2 or 3", "choose one of those orders"
            )
        )
