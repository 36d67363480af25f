# SPDX-License-Identifier: MIT
"""DPM-Solver and DPM-Solver++, singlestep: each step makes its own model calls at levels inside it."""

from __future__ import annotations

from ..schedules.levels import Level, Levels
from .affine import HISTORY, NOISE, SAMPLE, Affine
from .dpm_multistep import check_order
from .exponential import Algorithm, SolverType, exponential_step
from .prediction import Prediction
from .table import Row, StepTable

#: The history slots of a group: the output and the sample at its first level, the output at its second.
START_OUTPUT, START_SAMPLE, SECOND_OUTPUT = 0, 1, 2


def dpm_singlestep(
    levels: Levels,
    prediction: Prediction,
    *,
    algorithm_type: str | Algorithm = Algorithm.DPM_SOLVER_PP,
    solver_order: int = 2,
    solver_type: str | SolverType = SolverType.MIDPOINT,
) -> StepTable:
    """Compile the table of singlestep DPM-Solver(++), ODE or SDE (arXiv 2206.00927, algorithms 1 and 2).

    Consecutive levels are taken in groups of `solver_order`: a group starts at its first level, calls the model at
    each, and ends at the first level of the next.  The levels inside a group set the solver's r:
    on a grid made by `with_intermediate_levels` they are the paper's 1/2, or 1/3 and 2/3; on any other, its own.
    A remainder at the end is a group of lower order, and the step to σ = 0 is one of order 1.

    In the SDE forms a group's later rows start from its first sample again.  The noise of the levels in
    between is part of the same Brownian path: it is recovered from the sample that carries it, so that no noise tensor
    is kept and every row still draws once.

    Args:
        levels: the levels at which the model is called, and the end.
        prediction: how to read the model.
        algorithm_type, solver_order, solver_type: as in `dpm_multistep`; `solver_type` is that of the group's last row.
    """
    algorithm, kind = Algorithm.parse(algorithm_type), SolverType.parse(solver_type)
    check_order(solver_order)
    rows: list[Row] = []
    first = 0
    starts_blank, ends_clean = levels[0].alpha == 0.0, levels[len(levels)].sigma == 0.0
    for size in group_sizes(len(levels), solver_order, starts_blank=starts_blank, ends_clean=ends_clean):
        rows += _group(levels.points[first : first + size + 1], prediction, algorithm.at(levels[first]), kind)
        first += size
    return StepTable(tuple(rows), levels.initial_scale, thresholding=prediction.thresholding)


def group_sizes(calls: int, solver_order: int, *, starts_blank: bool, ends_clean: bool) -> list[int]:
    """Return the number of model calls of each step of the loop, `calls` in all.

    Steps from α = 0 and to σ = 0 are infinitely long in λ and have no levels inside: they make one call.
    """
    if calls == 1:
        return [1]
    first, last = [1] * starts_blank, [1] * ends_clean
    whole, rest = divmod(calls - len(first) - len(last), solver_order)
    return first + [solver_order] * whole + ([rest] if rest else []) + last


def _group(points: tuple[Level, ...], prediction: Prediction, algorithm: Algorithm, kind: SolverType) -> list[Row]:
    """Return the rows of one step from the first of `points` to the last."""
    size = len(points) - 1
    kept_outputs = [HISTORY[START_OUTPUT], HISTORY[SECOND_OUTPUT]]
    rows: list[Row] = []
    for stage in range(size):
        t, s = points[stage], points[stage + 1]
        model = prediction.at(t)
        output = algorithm.interpolated(model)
        start = SAMPLE if stage == 0 else HISTORY[START_SAMPLE]
        stage_kind = kind if stage == size - 1 else SolverType.HEUN
        prev = _from_start(points[: stage + 2], start, [*kept_outputs[:stage], output], algorithm, stage_kind)
        if algorithm.stochastic:
            onward = exponential_step(algorithm, t, s)
            prev = prev + onward.noise * NOISE
            if stage > 0:
                without_noise = _from_start(
                    points[: stage + 1], start, kept_outputs[:stage], algorithm, SolverType.HEUN
                )
                prev = prev + onward.x * (SAMPLE - without_noise)
        kept = ({START_OUTPUT: output, START_SAMPLE: SAMPLE}, {SECOND_OUTPUT: output}, {})[stage]
        rows.append(model.row(prev, kept=tuple(kept.values()), slots=tuple(kept)))
    return rows


def _from_start(
    points: tuple[Level, ...], start: Affine, outputs: list[Affine], algorithm: Algorithm, kind: SolverType
) -> Affine:
    """Return the noise-free update from the first of `points` to the last, given the outputs at all but the last."""
    step = exponential_step(algorithm, points[0], points[-1])
    base = step.x * start + step.d0 * outputs[0]
    if len(outputs) == 1:
        return base
    fractions = [(p.half_log_snr - points[0].half_log_snr) / step.h for p in points[1:-1]]
    slopes = [(output - outputs[0]) / r for output, r in zip(outputs[1:], fractions, strict=True)]
    if len(outputs) == 2:
        return base + step.first_difference(kind) * slopes[0]
    if kind is SolverType.MIDPOINT:
        return base + step.d1 * slopes[1]
    near, far = fractions
    bend = (slopes[1] - slopes[0]) / (far - near)
    return base + step.d1 * (slopes[0] - near * bend) + 2.0 * step.d2 * bend
