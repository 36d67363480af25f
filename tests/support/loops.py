# SPDX-License-Identifier: MIT
"""Loops over the tables of every form of every solver, in plain numpy and through `Stepper`.

`evaluate` reads a table's float64 rows with numpy alone, so it depends on no backend and not on the reference.
`error_bound` says how far a loop in another precision may end from it, by a first-order error analysis.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from fastdiff.row_layout import Variance
from fastdiff.sampling.stepper import Stepper
from fastdiff.schedules.levels import Level, Levels, variance_preserving
from fastdiff.solvers import Prediction, PredictionType
from fastdiff.solvers.table import StepTable
from support.solver_cases import FORMS

Array = NDArray[np.float64]
MakeTable = Callable[[Levels, Prediction], StepTable]

PREDICTION_TYPES = tuple(PredictionType)

#: Half the distance from 1 to the next number: the largest relative error of one rounding.
UNIT_ROUNDOFF = {
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-8,
    torch.float32: 2.0**-24,
    torch.float64: 2.0**-53,
}


#: Every form of every registered solver, by name.
SOLVERS: dict[str, MakeTable] = dict(FORMS)


@dataclass(frozen=True)
class Outputs:
    """What a model returns at one row; `uncond` and `variance` where they are used."""

    cond: Array
    uncond: Array | None = None
    variance: Array | None = None


#: (sample, what the row tells the model) -> outputs; it acts on each element by itself.
ElementModel = Callable[[Array, float], Outputs]


@dataclass
class Trace:
    """What the error analysis needs of one row, all elementwise: the tensors it made, and what its sums rounded."""

    outputs: list[Array] = field(default_factory=list)
    summed: list[Array] = field(default_factory=list)  # Σ|coefficient·term| of each output
    terms: int = 0  # the most products in one of its sums
    model_output: Array = field(default_factory=lambda: np.zeros(()))  # |g·c| + |(1 − g)·u|
    variance_part: Array = field(default_factory=lambda: np.zeros(()))  # change of an output for a relative one of v


def evaluate(
    table: StepTable,
    model: ElementModel,
    x: Array,
    noise: Sequence[Array] | None = None,
    *,
    guidance: float = 1.0,
    nudge: tuple[int, int, float] | None = None,
    trace: list[Trace] | None = None,
) -> Array:
    """The loop in float64 numpy: the formulas at the head of fastdiff/solvers/table.py, and nothing of fastdiff's code.

    Args:
        nudge: (row, what, size): adds `size`·(1 + |value|) to output `what` of a row, or to m where it is −1.
        trace: a list to fill with what `error_bound` needs.
    """
    # NaN rather than nothing: what is read before it is written shows.
    registers = [np.full_like(x, np.nan)] * 4
    for i, row in enumerate(table.source):
        answer = model(x, row.timestep)
        m, m_size = answer.cond, np.abs(answer.cond)
        if answer.uncond is not None:
            m = answer.uncond + guidance * (answer.cond - answer.uncond)
            m_size = np.abs(guidance * answer.cond) + np.abs((1.0 - guidance) * answer.uncond)
        if nudge is not None and nudge[:2] == (i, -1):
            m = m + nudge[2] * (1.0 + m_size)
        p, q = row.prediction
        d = np.clip(p * x + q * m, -row.clip, row.clip)
        z = np.zeros_like(x) if noise is None else noise[i]
        spread = np.zeros_like(x)
        if answer.variance is not None and table.variance is Variance.LEARNED_RANGE:
            z = z * np.exp(row.variance_offset + row.variance_slope * answer.variance)
            spread = np.abs(z * row.variance_slope * answer.variance)
        elif answer.variance is not None and table.variance is Variance.LEARNED:
            z = z * np.sqrt(answer.variance)
            spread = np.abs(0.5 * z)
        entries = [x, m, d, *registers, z]
        sizes = [np.abs(entry) for entry in entries]
        sizes[1], sizes[2] = m_size, np.abs(p * x) + np.abs(q) * m_size
        outputs, summed, terms = [], [], 0
        for j, form in enumerate((row.prev_sample, *row.kept)):
            used = [k for k, weight in enumerate(form.coefficients) if weight]
            value = sum((form.coefficients[k] * entries[k] for k in used), np.zeros_like(x))
            if nudge is not None and nudge[:2] == (i, j):
                value = value + nudge[2] * (1.0 + np.abs(value))
            outputs.append(value)
            terms = max(terms, len(used))
            summed.append(sum((abs(form.coefficients[k]) * sizes[k] for k in used), np.zeros_like(x)))
        if trace is not None:
            variance_part = abs(row.prev_sample.coefficients[-1]) * spread
            trace.append(Trace(outputs, summed, terms, m_size, variance_part))
        x = outputs[0]
        for register, kept in zip(row.slots, outputs[1:], strict=True):
            registers[register] = kept
    return x


@dataclass(frozen=True)
class Sensitivity:
    """How a loop's end answers to a change of each tensor on its way, and what each of them rounded."""

    traces: list[Trace]
    of_output: list[list[Array]]  # a row, an output: |∂end/∂output|
    of_model: list[Array]


def sensitivity(
    table: StepTable, model: ElementModel, x: Array, noise: Sequence[Array] | None, *, guidance: float = 1.0
) -> Sensitivity:
    """Perturb the float64 loop: since the model acts on each element by itself, so does its derivative."""
    traces: list[Trace] = []
    end = evaluate(table, model, x, noise, guidance=guidance, trace=traces)

    def response(row: int, what: int, value: Array) -> Array:
        size = 1e-6  # relative to the values; what it leaves out, of second order, is a millionth of the response
        moved = evaluate(table, model, x, noise, guidance=guidance, nudge=(row, what, size))
        return np.abs(moved - end) / (size * (1.0 + np.abs(value)))

    return Sensitivity(
        traces,
        [[response(i, j, value) for j, value in enumerate(trace.outputs)] for i, trace in enumerate(traces)],
        [response(i, -1, trace.model_output) for i, trace in enumerate(traces)],
    )


def error_bound(found: Sensitivity, dtype: torch.dtype) -> Array:
    """How far a loop on tensors of `dtype` may end from `evaluate`, elementwise, to first order.

    A row rounds each output once to `dtype` (u), and the model's outputs once before it.  In between it computes with
    unit roundoff c (float32's, or float64's): a sum of k products is off by at most (k + 1)·c·Σ|product|, and what
    enters the products by 6·c more (p, q and the coefficient as stored in the table, two roundings of d, one of m's
    difference).  exp and sqrt of a learned variance may be 4 units off.  Each error then reaches the end times the
    measured response to it.  Twice the sum, for the terms of second order.
    """
    u, c = UNIT_ROUNDOFF[dtype], UNIT_ROUNDOFF[torch.float64 if dtype == torch.float64 else torch.float32]
    tiny = 2.0**-25 if dtype == torch.float16 else 0.0  # half a step between float16's subnormal numbers
    bound = np.zeros_like(found.traces[0].outputs[0])
    for trace, of_outputs, of_model in zip(found.traces, found.of_output, found.of_model, strict=True):
        bound = bound + of_model * (u * trace.model_output + tiny)
        for j, response in enumerate(of_outputs):
            local = u * np.abs(trace.outputs[j]) + tiny + (trace.terms + 7) * c * trace.summed[j]
            if j == 0:
                local = local + (u + 4.0 * c) * trace.variance_part
            bound = bound + response * local
    return 2.0 * bound


def walk(
    table: StepTable,
    model: ElementModel,
    x: Array,
    noise: Sequence[Array] | None = None,
    *,
    guidance: float = 1.0,
    dtype: torch.dtype = torch.float64,
    backend: str | None = None,
    device: str = "cpu",
) -> Array:
    """The same loop through `Stepper`, on tensors of `dtype`; the model computes in float64 and is rounded once."""

    def tensor(values: Array) -> torch.Tensor:
        return torch.from_numpy(np.asarray(values, dtype=np.float64)).to(device, dtype)

    stepper, sample = Stepper(table, backend=backend), tensor(x)
    for i, timestep in enumerate(table.timesteps):
        answer = model(sample.double().cpu().numpy(), timestep)
        guided = answer.uncond is not None
        sample = stepper.step(
            sample,
            tensor(answer.cond),
            uncond=tensor(answer.uncond) if guided else None,  # type: ignore[arg-type]
            guidance_scale=guidance if guided else None,
            variance=None if answer.variance is None else tensor(answer.variance),
            noise=tensor(noise[i]) if noise is not None and table.draws_noise[i] else None,
        )
    assert stepper.done
    return sample.double().cpu().numpy()


def output_for(kind: PredictionType, level: Level, sample: Array, x0: Array) -> Array:
    """What a model of `kind` returns where it believes in `x0`: each definition, written out."""
    epsilon = (sample - level.alpha * x0) / level.sigma
    if kind is PredictionType.EPSILON:
        return epsilon
    if kind is PredictionType.SAMPLE:
        return x0
    if kind is PredictionType.V_PREDICTION:
        return level.alpha * epsilon - level.sigma * x0
    return epsilon - x0


def level_of(half_log_snr: float) -> Level:
    """The variance-preserving level of λ, which is the timestep on `levels_from_half_log_snr`."""
    return variance_preserving(math.exp(-half_log_snr), half_log_snr)
