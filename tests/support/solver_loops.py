# SPDX-License-Identifier: MIT
"""Every variant of every solver by name, and its loop, in plain numpy and with `Stepper`.

`evaluate` reads a table's float64 rows with numpy alone, so it depends on no backend and not on the reference.
`error_bound` bounds the difference to a loop in another precision by a first-order error analysis.
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

#: All but that of EDM networks, which tests/solvers/test_edm_euler.py tests.
PREDICTION_TYPES = tuple(kind for kind in PredictionType if kind is not PredictionType.EDM)

#: Half the distance from 1 to the next number: the maximum relative error of one rounding.
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
    """Outputs of a model at one row; `uncond` and `variance` are None if they are not used."""

    cond: Array
    uncond: Array | None = None
    variance: Array | None = None


#: Elementwise model: (sample, timestep of the row) -> outputs.
ElementModel = Callable[[Array, float], Outputs]


@dataclass
class Trace:
    """Elementwise data of one row for the error analysis: its outputs, and the magnitudes of its sums."""

    outputs: list[Array] = field(default_factory=list)
    summed: list[Array] = field(default_factory=list)  # Σ|coefficient·term| of each output
    terms: int = 0  # maximum number of products in one sum
    model_output: Array = field(default_factory=lambda: np.zeros(()))  # |g·c| + |(1 − g)·u|
    variance_part: Array = field(default_factory=lambda: np.zeros(()))  # change of an output per relative change of v


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
    """Run the loop in float64 numpy, by the formulas at the head of fastdiff/solvers/table.py, without fastdiff's code.

    Args:
        nudge: (row, output, size): add `size`·(1 + |value|) to an output of a row, or to m if `output` is −1.
        trace: a list to fill with the data for `error_bound`.
    """
    # NaN reveals registers that are read before they are written.
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
    """Response of a loop's result to a change of each intermediate tensor, and the data of their roundings."""

    traces: list[Trace]
    of_output: list[list[Array]]  # a row, an output: |∂end/∂output|
    of_model: list[Array]


def sensitivity(
    table: StepTable, model: ElementModel, x: Array, noise: Sequence[Array] | None, *, guidance: float = 1.0
) -> Sensitivity:
    """Measure the responses by perturbing the float64 loop; the model is elementwise, and so are the derivatives."""
    traces: list[Trace] = []
    end = evaluate(table, model, x, noise, guidance=guidance, trace=traces)

    def response(row: int, what: int, value: Array) -> Array:
        size = 1e-6  # relative to the values; the neglected second-order part is a millionth of the response
        moved = evaluate(table, model, x, noise, guidance=guidance, nudge=(row, what, size))
        return np.abs(moved - end) / (size * (1.0 + np.abs(value)))

    return Sensitivity(
        traces,
        [[response(i, j, value) for j, value in enumerate(trace.outputs)] for i, trace in enumerate(traces)],
        [response(i, -1, trace.model_output) for i, trace in enumerate(traces)],
    )


def error_bound(found: Sensitivity, dtype: torch.dtype) -> Array:
    """Bound the difference between a loop on tensors of `dtype` and `evaluate`, elementwise, to first order.

    A row rounds each output once to `dtype` (u), and the model's outputs once before it.  In between it computes with
    unit roundoff c (float32's, or float64's): a sum of k products has an error of at most (k + 1)·c·Σ|product|, and the
    factors of the products 6·c more (p, q and the coefficient as stored in the table, two roundings of d, one of m's
    difference).  exp and sqrt of a learned variance may have an error of 4 units.  Each error is multiplied by the
    measured response to it.  The sum is doubled for second-order terms.
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


def run_loop(
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
    """Run the loop with `Stepper` on tensors of `dtype`; the model computes in float64, outputs are rounded once."""

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
    """Return the output of a model with prediction type `kind` that predicts `x0`, by each definition."""
    epsilon = (sample - level.alpha * x0) / level.sigma
    if kind is PredictionType.EPSILON:
        return epsilon
    if kind is PredictionType.SAMPLE:
        return x0
    if kind is PredictionType.V_PREDICTION:
        return level.alpha * epsilon - level.sigma * x0
    return epsilon - x0


def level_of(half_log_snr: float) -> Level:
    """Return the variance-preserving level of λ, which is the timestep on `levels_from_half_log_snr`."""
    return variance_preserving(math.exp(-half_log_snr), half_log_snr)
