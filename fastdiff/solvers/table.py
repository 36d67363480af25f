# SPDX-License-Identifier: MIT
"""The step table: a sampler, compiled to one row of scalars a model call.

A row holds everything that the fused step needs besides the tensors::

    m    = u + g·(c − u)                                        guidance
    d    = p·x + q·m,  clipped to ±clip, or thresholded         prediction of x0
    prev = a_x·x + a_m·m + a_d·d + Σ_j a_j·h_j + a_z·s·z        s = 1, or the learned standard deviation
    keep = two more sums of the same form, stored into history registers

History lives in up to four **registers**.  A row says which register each kept tensor goes to, so a ring
buffer is a permutation of coefficients, made here once, and the loop moves no tensor around.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from ..device_copy import OnDevice, to_device
from ..errors import checked_type, sentence
from ..row_layout import (
    CLIP,
    COLUMNS,
    NUM_REGISTERS,
    PREDICTION_OUTPUT,
    PREDICTION_SAMPLE,
    PREV_SAMPLE,
    Variance,
    blank_row,
    compute_dtype,
)
from .affine import ZERO, Affine


@dataclass(frozen=True)
class Row:
    """One model call and the update after it, in float64.

    Args:
        timestep: what the model is told.
        prev_sample: the map that gives the next sample.
        prediction: (p, q) with d = p·x + q·m, the prediction of x0.
        clip: d is clamped to ±clip; inf leaves it as it is.
        keep: maps whose values go to the registers named by `store`.
        store: a register (0 to 3) for each map of `keep`.
        variance_offset, variance_slope: of `Variance.LEARNED_RANGE`.
        model_input_scale: the next model input is this times the previous sample.
    """

    timestep: float
    prev_sample: Affine
    prediction: tuple[float, float]
    clip: float = float("inf")
    keep: tuple[Affine, ...] = ()
    store: tuple[int, ...] = ()
    variance_offset: float = 0.0
    variance_slope: float = 0.0
    model_input_scale: float = 1.0

    def scalars(self) -> list[float]:
        """The row as `ROW_WIDTH` numbers, in the layout that the backends read."""
        keep_0, keep_1 = (*self.keep, ZERO, ZERO)[:2]
        stores = [float(register) for register in (*self.store, -1, -1)[:2]]  # -1: nothing is kept
        head = [*self.prediction, self.clip, self.variance_offset, self.variance_slope, self.model_input_scale, *stores]
        return [*head, *self.prev_sample.coefficients, *keep_0.coefficients, *keep_1.coefficients]


@dataclass(frozen=True)
class StepTable:
    """A compiled sampler: its rows in float64 on the host, and what the loop must know of each.

    Attributes:
        rows: float64 ``[R, 32]`` on the CPU.
        timesteps: R timesteps, one a model call.
        store: for each row, the registers that its kept tensors go to (0, 1 or 2 of them).
        reads: for each row, the registers that it reads.
        draws_noise: for each row, whether it adds noise.
        initial_scale: the standard deviation of the first sample.
        variance: how the noise coefficient is scaled by the model's second output.
        thresholding: whether the loop computes a threshold a sample for d (dynamic thresholding).

    Raises:
        ValueError: there is no row, a scalar is NaN or infinite (`clip` may be infinite), or a register is misused.
    """

    source: tuple[Row, ...]
    initial_scale: float = 1.0
    variance: Variance = Variance.FIXED
    thresholding: bool = False
    rows: torch.Tensor = field(init=False, compare=False, repr=False)
    timesteps: tuple[float, ...] = field(init=False, compare=False, repr=False)
    store: tuple[tuple[int, ...], ...] = field(init=False, compare=False, repr=False)
    reads: tuple[tuple[int, ...], ...] = field(init=False, compare=False, repr=False)
    draws_noise: tuple[bool, ...] = field(init=False, compare=False, repr=False)
    _shared: dict[tuple[torch.dtype, torch.device, bool], OnDevice] = field(
        init=False, compare=False, repr=False, default_factory=dict
    )

    def __post_init__(self) -> None:
        checked_type("StepTable", "source", self.source, tuple, "a tuple of Row", "pass tuple(rows)")
        for i, row in enumerate(self.source):
            checked_type("StepTable", f"source[{i}]", row, Row, "a Row", "make it with a solver, or with Row(...)")
        if not self.source:
            raise ValueError(
                sentence("StepTable", "source", "has no rows", "at least one", "ask for at least one step")
            )
        rows = torch.tensor([row.scalars() for row in self.source], dtype=torch.float64, device="cpu")
        derived: dict[str, object] = {
            "rows": rows,
            "timesteps": tuple(row.timestep for row in self.source),
            "store": tuple(row.store for row in self.source),
            "reads": tuple(_registers_read(row) for row in self.source),
            "draws_noise": tuple(any(form.coefficients[-1] for form in _maps(row)) for row in self.source),
        }
        for name, value in derived.items():
            object.__setattr__(self, name, value)
        self._check_scalars(rows)
        self._check_registers()

    def _check_scalars(self, rows: torch.Tensor) -> None:
        finite = torch.isfinite(rows)
        finite[:, CLIP] = rows[:, CLIP] > 0
        if not bool(finite.all()):
            row, column = (int(i) for i in (~finite).nonzero()[0])
            raise ValueError(
                sentence(
                    "StepTable",
                    f"rows[{row}, {column}]",
                    f"is {float(rows[row, column])}",
                    "a finite number",
                    "the solver divides by zero here: choose another prediction_type, solver or timesteps",
                )
            )

    def _check_registers(self) -> None:
        written: set[int] = set()
        for i, row in enumerate(self.source):
            stores_match = len(row.store) == len(row.keep) <= 2 and len(set(row.store)) == len(row.store)
            if not stores_match or not set(row.store) <= set(range(NUM_REGISTERS)):
                raise ValueError(
                    sentence(
                        "StepTable",
                        f"source[{i}].store",
                        f"is {row.store} for {len(row.keep)} kept tensors",
                        f"a different register from 0 to {NUM_REGISTERS - 1} for each, two at most",
                        "name one register a kept tensor",
                    )
                )
            unwritten = set(self.reads[i]) - written
            if unwritten:
                raise ValueError(
                    sentence(
                        "StepTable",
                        f"source[{i}]",
                        f"reads register {min(unwritten)}",
                        "a register that an earlier row has stored to",
                        "keep a tensor there first",
                    )
                )
            written |= set(row.store)

    def __len__(self) -> int:
        return len(self.source)

    def __iter__(self) -> Iterator[Row]:
        return iter(self.source)

    def rows_as(self, dtype: torch.dtype, device: torch.device | str = "cpu") -> torch.Tensor:
        """The rows for samples of `dtype`: float64 for float64, else float32; rounded once."""
        return to_device(self.rows.to(compute_dtype(dtype)), device).contiguous()

    def shared_rows(self, dtype: torch.dtype, device: torch.device, *, prediction: bool = False) -> torch.Tensor:
        """The rows of `rows_as`, made once for a dtype and a device and read by every loop: not to be written.

        With `prediction` those of `prediction_rows` instead.
        """
        source = self.prediction_rows if prediction else lambda: self.rows
        if torch.compiler.is_compiling():
            return source().to(device=device, dtype=compute_dtype(dtype)).contiguous()
        key = compute_dtype(dtype), device, prediction
        shared = self._shared.get(key)
        if shared is None:
            with torch.inference_mode(False):  # an inference tensor could not be saved by a later loop's autograd
                shared = OnDevice(source().to(compute_dtype(dtype)).contiguous(), device)
            if type(shared.get()) is torch.Tensor:  # a tracer's stand-in would outlive the trace
                self._shared[key] = shared
        return shared.get()

    def __getstate__(self) -> dict[str, object]:
        """A copy, or a pickle, brings its rows to devices itself."""
        return {**self.__dict__, "_shared": {}}

    def prediction_rows(self) -> torch.Tensor:
        """Rows that return d itself, unclipped, as the previous sample: what dynamic thresholding measures."""
        return prediction_rows(self.rows)


def prediction_rows(rows: torch.Tensor) -> torch.Tensor:
    """Of rows ``[R, 32]`` those that return d itself, unclipped, as the previous sample."""
    found = torch.tensor([blank_row()], dtype=rows.dtype, device=rows.device).repeat(len(rows), 1)
    found[:, [PREDICTION_SAMPLE, PREDICTION_OUTPUT]] = rows[:, [PREDICTION_SAMPLE, PREDICTION_OUTPUT]]
    found[:, PREV_SAMPLE + COLUMNS.index("prediction")] = 1.0
    return found


def _maps(row: Row) -> Sequence[Affine]:
    return (row.prev_sample, *row.keep)


def _registers_read(row: Row) -> tuple[int, ...]:
    first = COLUMNS.index("history_0")
    return tuple(j for j in range(NUM_REGISTERS) if any(form.coefficients[first + j] for form in _maps(row)))
