# SPDX-License-Identifier: MIT
"""A solver's table for given sigmas, with the facts of each model call; compiled once and kept for the next loop."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from ..errors import error_message
from ..schedules.levels import Level, Levels
from ..solvers import Churn, Prediction, PredictionType
from ..solvers.affine import NOISE, SAMPLE
from ..solvers.registry import Solver
from ..solvers.table import Row, StepTable
from .denoisers import Parametrization

#: Compiled programs that are kept: a table of 20 rows takes 20 KiB.
CACHED_PROGRAMS = 256

NoiseBy = Literal["step", "stage", "rise"]

#: Model calls in each step, for sigmas and the solver's options: a number, or a function of both.
Calls = int | Callable[[Sequence[float], dict[str, Any]], Sequence[int]]


@dataclass(frozen=True)
class Call:
    """One row of a program.

    Attributes:
        sigma: the level at which the model is called; None where the row adds noise alone, before the first call.
        step: the index of the step.
        begins: True for the first call of a step.
        noise_from, noise_to: the levels that the row's noise belongs to, for noise samplers.
    """

    sigma: float | None
    step: int
    begins: bool
    noise_from: float
    noise_to: float


@dataclass(frozen=True)
class Program:
    """A compiled loop.

    Attributes:
        table: one row for each element of `calls`.
        calls: what each row needs besides the table.
        steps: the number of steps.
        sigmas: the model's level of each row; the first level again for a row that does not call it.
    """

    table: StepTable
    calls: tuple[Call, ...]
    steps: int
    sigmas: tuple[float, ...]


def sigma_levels(sigmas: Sequence[float]) -> Levels:
    """Return the levels x0 + σ·ε of descending sigmas, with σ as the timestep."""

    def locate(sigma: float) -> Level:
        return Level(sigma, 1.0, sigma)

    return Levels(tuple(locate(sigma) for sigma in sigmas), locate)


def flow_levels(times: Sequence[float]) -> Levels:
    """Return the levels (1 − σ)·x0 + σ·ε of descending times, with σ as the timestep."""

    def locate(ratio: float) -> Level:
        time = ratio / (1.0 + ratio)
        return Level(time, 1.0 - time, time)

    return Levels(tuple(Level(time, 1.0 - time, time) for time in times), locate)


@functools.lru_cache(CACHED_PROGRAMS)
def compiled(
    solver: Solver,
    sigmas: tuple[float, ...],
    options: tuple[tuple[str, Hashable], ...],
    calls: Calls,
    noise_by: NoiseBy,
    parametrization: Parametrization | None,
    flow: bool = False,
) -> Program:
    """Compile a solver for the levels of `sigmas`.

    Args:
        solver: ``(levels, prediction, **options) -> StepTable``.
        sigmas: n + 1 levels, descending.
        options: the solver's, as pairs; the four of `Churn`, where it takes them, are made into one.
        calls: model calls in each step.
        noise_by: the interval that the noise of a row belongs to: from the start of its ``step`` to the next model
            call; from its own model call to the next, ``stage``; or the ``rise`` from the end of its step to the start
            of the next, which churn and restarts make.
        parametrization: of the model's raw output and input; None for a model that takes x and returns x0.
        flow: samples are (1 − σ)·x0 + σ·ε, not x0 + σ·ε.

    Raises:
        ValueError: as the solver.
    """
    levels = flow_levels(sigmas) if flow else sigma_levels(sigmas)
    prediction = Prediction(PredictionType.SAMPLE) if parametrization is None else parametrization.prediction
    named = dict(options)
    churn = Churn(**named.pop("churn")._asdict()) if "churn" in named else None  # type: ignore[attr-defined]
    table = solver(levels, prediction, **named, **({} if churn is None else {"churn": churn}))
    counts = _counts(calls, sigmas, named, len(table))
    rows = list(table.source)
    lift = 0.0 if churn is None else churn.raise_level(levels, 0)[1]
    described: list[Call] = []
    if lift:
        rows.insert(0, Row(sigmas[0], SAMPLE + lift * NOISE, (0.0, 1.0)))
        described.append(Call(None, 0, False, sigmas[0], rows[1].timestep))
    first = len(described)
    for step, count in enumerate(counts):
        starts_at = rows[first].timestep
        for row in range(first, first + count):
            begin = rows[row].timestep if noise_by == "stage" else starts_at
            if noise_by == "rise":
                begin = rows[row].timestep if churn is None else sigmas[step + 1]
            end = rows[row + 1].timestep if row + 1 < len(rows) else sigmas[-1]
            described.append(Call(rows[row].timestep, step, row == first, begin, end))
        first += count
    model_sigmas = tuple(row.timestep for row in rows)
    if parametrization is not None:
        scales = [parametrization.input_scale(sigma) for sigma in model_sigmas]
        rows = [replace(row, model_input_scale=scale) for row, scale in zip(rows, [*scales[1:], 1.0], strict=True)]
    if tuple(rows) != table.source:
        table = replace(table, source=tuple(rows))
    return Program(table, tuple(described), len(counts), model_sigmas)


def _counts(calls: Calls, sigmas: Sequence[float], options: dict[str, Any], rows: int) -> Sequence[int]:
    """Return the number of model calls of each step."""
    counts = calls(sigmas, options) if callable(calls) else [calls if sigma > 0.0 else 1 for sigma in sigmas[1:]]
    if sum(counts) != rows:
        raise ValueError(
            error_message(
                "loops", "calls", f"add up to {sum(counts)}", f"{rows}, the rows of the table", "count each step's rows"
            )
        )
    return counts
