# SPDX-License-Identifier: MIT
"""Cache rows: rows that take their step from earlier model outputs in the history instead of a model call.

A calling row keeps the model's output in a history slot that the solver leaves free.  In a cache row the model's output
is a weighted sum of kept outputs, an extrapolation to the row's time, so the row has history terms in its place, and
the step is the same operation.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import replace

from ..errors import checked_float, checked_integer, error_message, unknown_name
from ..row_layout import NUM_REGISTERS, Variance
from .affine import HISTORY, MODEL_OUTPUT, PREDICTION, SAMPLE, ZERO, Affine
from .table import Row, StepTable

#: Ways to extrapolate the model's output.
EXTRAPOLATIONS = ("linear", "taylor", "chebyshev")


def extrapolation_weights(
    times: Sequence[float], time: float, extrapolation: str = "linear", order: int = 1, ridge: float = 1e-3
) -> list[float]:
    """Return the weight of each kept output in the extrapolated one.

    Args:
        times: the times of the kept outputs, the newest first.
        time: where to extrapolate to.
        extrapolation: ``linear``: the line through the newest two.  ``taylor``: a Taylor polynomial whose derivatives
            are repeated backward differences (TaylorSeer, arXiv 2503.06923, eq. 9 and 10).  ``chebyshev``: a ridge
            regression of all kept outputs on Chebyshev polynomials of the time, scaled to [−1, 1], as in spectral
            forecasting.
        order: the degree of ``taylor`` or ``chebyshev``; 0 repeats the newest (``taylor``) or the mean.
        ridge: λ of the regression.

    Returns:
        A weight for each of `times`; with fewer outputs than the degree asks for, the degree is lowered.

    Raises:
        ValueError: there is no output, or an unknown extrapolation.
    """
    if extrapolation not in EXTRAPOLATIONS:
        raise unknown_name("extrapolation_weights", "extrapolation", extrapolation, EXTRAPOLATIONS)
    if not times:
        remedy = "call the model in the first step"
        raise ValueError(error_message("extrapolation_weights", "times", "is empty", "a kept output", remedy))
    if extrapolation == "chebyshev":
        return _chebyshev(times, time, min(order, len(times) - 1), ridge)
    degree = min(1 if extrapolation == "linear" else order, len(times) - 1)
    return _taylor(times, time, degree)


def _taylor(times: Sequence[float], time: float, degree: int) -> list[float]:
    """Return the weights of Σ_i D^i·(time − t_0)^i/i!, D^(i+1)_n = (D^i_n − D^i_(n+1))/(t_n − t_(n+1))."""
    number = len(times)
    differences = [[1.0 if i == j else 0.0 for i in range(number)] for j in range(degree + 1)]
    weights = [0.0] * number
    factor = 1.0
    for i in range(degree + 1):
        weights = [w + factor * d for w, d in zip(weights, differences[0], strict=True)]
        factor *= (time - times[0]) / (i + 1)
        differences = [
            [(a - b) / (times[n] - times[n + 1]) for a, b in zip(differences[n], differences[n + 1], strict=True)]
            for n in range(len(differences) - 1)
        ]
    return weights


def _chebyshev(times: Sequence[float], time: float, degree: int, ridge: float) -> list[float]:
    """Return φ(time)ᵀ·(ΦᵀΦ + λ·I)⁻¹·Φᵀ with Φ_nk = T_k of time n."""
    low, high = min(*times, time), max(*times, time)
    middle, half = 0.5 * (low + high), 0.5 * (high - low) or 1.0
    basis = [[math.cos(k * math.acos(max(-1.0, min(1.0, (t - middle) / half)))) for k in range(degree + 1)]
             for t in (*times, time)]  # fmt: skip
    kept, wanted = basis[:-1], basis[-1]
    size = degree + 1
    matrix = [[sum(row[i] * row[j] for row in kept) + (ridge if i == j else 0.0) for j in range(size)]
              for i in range(size)]  # fmt: skip
    solved = _solved(matrix, wanted)
    return [sum(a * b for a, b in zip(solved, row, strict=True)) for row in kept]


def _solved(matrix: list[list[float]], right: Sequence[float]) -> list[float]:
    """Solve a small symmetric positive definite system by elimination."""
    rows = [[*row, value] for row, value in zip(matrix, right, strict=True)]
    size = len(rows)
    for i in range(size):
        for j in range(i + 1, size):
            factor = rows[j][i] / rows[i][i]
            rows[j] = [a - factor * b for a, b in zip(rows[j], rows[i], strict=True)]
    found = [0.0] * size
    for i in reversed(range(size)):
        found[i] = (rows[i][-1] - sum(rows[i][j] * found[j] for j in range(i + 1, size))) / rows[i][i]
    return found


def free_slots(table: StepTable) -> tuple[int, ...]:
    """Return the history slots that no row of a table reads or writes.

    Raises:
        ValueError: there is none, a row keeps two outputs already, or the model has a second output.
    """
    used = {slot for slots in (*table.kept_slots, *table.read_slots) for slot in slots}
    free = tuple(slot for slot in range(NUM_REGISTERS) if slot not in used)
    got, remedy = "", "choose a solver of lower order"
    if not free:
        got = "uses all four history slots"
    if any(len(slots) > 1 for slots in table.kept_slots):
        got = "keeps two outputs in a row"
    if table.variance is not Variance.FIXED:
        got, remedy = "has a learned variance, an output that is not kept", "choose a fixed variance_type"
    if got:
        expected = "a free slot, and one kept output of the solver at most"
        raise ValueError(error_message("cached_table", "table", got, expected, remedy))
    return free


def calling_row(row: Row, slot: int) -> Row:
    """Return a row that also keeps the model's output in a history slot."""
    return replace(row, kept=(*row.kept, MODEL_OUTPUT), slots=(*row.slots, slot))


def cache_row(row: Row, slots: Sequence[int], weights: Sequence[float]) -> Row:
    """Return a row whose model output is the weighted sum of history slots; it reads no model output.

    Raises:
        ValueError: the row clips x0, which is then no affine map of the slots.
    """
    if has_bounded_x0(row):
        remedy = "use CachedStepper, which combines the kept outputs first, or leave x0 unclipped"
        raise ValueError(error_message("cache_row", "row", "clips x0", "a row without clip", remedy))
    output = ZERO
    for slot, weight in zip(slots, weights, strict=True):
        output = output + weight * HISTORY[slot]
    p, q = row.prediction
    x0 = p * SAMPLE + q * output
    return replace(
        row,
        prev_sample=_substituted(row.prev_sample, output, x0),
        kept=tuple(_substituted(form, output, x0) for form in row.kept),
    )


def has_bounded_x0(row: Row) -> bool:
    """Return whether a row uses an x0 that it clips."""
    column = PREDICTION.coefficients.index(1.0)
    return math.isfinite(row.clip) and any(form.coefficients[column] != 0.0 for form in (row.prev_sample, *row.kept))


def _substituted(form: Affine, output: Affine, x0: Affine) -> Affine:
    """Replace the model's output and x0 in a form."""
    of_output, of_x0 = (form.coefficients[symbol.coefficients.index(1.0)] for symbol in (MODEL_OUTPUT, PREDICTION))
    return form - of_output * MODEL_OUTPUT - of_x0 * PREDICTION + of_output * output + of_x0 * x0


def cached_table(
    table: StepTable, skip: Collection[int], *, extrapolation: str = "linear", order: int = 1, ridge: float = 1e-3
) -> StepTable:
    """Return a table whose rows `skip` take the step from kept model outputs: those rows need no model call.

    A `Stepper`, `fastdiff.ops.step` and a table file take it as any other table; in a skipped row the model output is
    not read, and any tensor like the sample may be given.

    Args:
        table: the compiled sampler.
        skip: the indices of the rows without a call; 0 cannot be one.
        extrapolation, order, ridge: as in `extrapolation_weights`; the time is the row's timestep.

    Returns:
        A table of as many rows.

    Raises:
        ValueError: a row cannot be skipped, or the solver leaves no history slot.
    """
    skipped = check_skip("cached_table", skip, len(table))
    check_extrapolation("cached_table", extrapolation, order, ridge)
    if table.thresholding:
        remedy = "use CachedStepper, which combines the kept outputs first"
        raise ValueError(error_message("cached_table", "table", "thresholds x0", "an x0 without bounds", remedy))
    free = free_slots(table)
    calls: list[tuple[float, int]] = []  # time and slot of the kept outputs, the newest first
    rows = []
    for i, row in enumerate(table.source):
        if i in skipped:
            weights = extrapolation_weights([t for t, _ in calls], row.timestep, extrapolation, order, ridge)
            rows.append(cache_row(row, [slot for _, slot in calls], weights))
            continue
        slot = free[len(calls)] if len(calls) < len(free) else calls[-1][1]
        calls = [(row.timestep, slot), *calls][: len(free)]
        rows.append(calling_row(row, slot))
    return replace(table, source=tuple(rows))


def check_skip(operation: str, skip: Collection[int], rows: int) -> frozenset[int]:
    """Return the indices of rows without a call, checked."""
    found = frozenset(checked_integer(operation, "skip", index, 0) for index in skip)
    if 0 in found or any(index >= rows for index in found):
        got = f"holds {0 if 0 in found else max(found)}"
        expected = f"indices from 1 to {rows - 1}: the first row has nothing to extrapolate"
        raise ValueError(error_message(operation, "skip", got, expected, "leave it out"))
    return found


def check_extrapolation(operation: str, extrapolation: str, order: int, ridge: float) -> None:
    """Refuse an unknown extrapolation or a degree that is none."""
    if extrapolation not in EXTRAPOLATIONS:
        raise unknown_name(operation, "extrapolation", extrapolation, EXTRAPOLATIONS)
    checked_integer(operation, "order", order, 0)
    checked_float(operation, "ridge", ridge, 0.0)
