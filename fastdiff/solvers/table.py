# SPDX-License-Identifier: MIT
"""The step table: a sampler, compiled to one row of scalars a model call.

A row holds everything that the fused step needs besides the tensors::

    m    = u + g·(c − u)                                        guidance
    d    = p·x + q·m,  clipped to ±clip, or thresholded         prediction of x0
    prev = a_x·x + a_m·m + a_d·d + Σ_j a_j·h_j + a_z·s·z        s = 1, or the learned standard deviation
    kept = up to two more sums of the same form, written to history slots

History is up to four tensors, in **slots**.  A row names the slot of each output that it keeps, so a ring buffer is a
permutation of coefficients, made here once, and the loop moves no tensor.  A row may write to a slot that it reads: it
reads first.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from .. import row_layout
from ..data_files import MalformedError, malformed_in_one_sentence
from ..deprecated import renamed_attribute, renamed_fields, warn_renamed
from ..device_copy import OnDevice, to_device
from ..errors import checked_type, error_message
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
from .table_file import StoredTable, read_table, write_table


def __getattr__(name: str) -> Any:
    """Give the constants of a row, which have moved to `fastdiff.row_layout`, with a warning for one release."""
    if name.isupper() and hasattr(row_layout, name):
        warn_renamed(f"fastdiff.table.{name}", f"fastdiff.row_layout.{name}")
        return getattr(row_layout, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@renamed_fields(keep="kept", store="slots")
@dataclass(frozen=True)
class Row:
    """One model call and the update after it, in float64.

    Args:
        timestep: the model's time argument.
        prev_sample: the map that gives the next sample.
        prediction: (p, q) with d = p·x + q·m, the prediction of x0.
        clip: d is clamped to ±clip; inf leaves it unclamped.
        kept: up to two maps whose values go to history slots.
        slots: a slot (0 to 3) for each map of `kept`.
        variance_offset, variance_slope: of `Variance.LEARNED_RANGE`.
        model_input_scale: the next model input is this times the previous sample.
    """

    timestep: float
    prev_sample: Affine
    prediction: tuple[float, float]
    clip: float = float("inf")
    kept: tuple[Affine, ...] = ()
    slots: tuple[int, ...] = ()
    variance_offset: float = 0.0
    variance_slope: float = 0.0
    model_input_scale: float = 1.0

    def scalars(self) -> list[float]:
        """The row as `ROW_WIDTH` numbers, in the layout that the backends read."""
        kept_0, kept_1 = (*self.kept, ZERO, ZERO)[:2]
        slots = [float(slot) for slot in (*self.slots, -1, -1)[:2]]  # -1: nothing is kept
        head = [*self.prediction, self.clip, self.variance_offset, self.variance_slope, self.model_input_scale, *slots]
        return [*head, *self.prev_sample.coefficients, *kept_0.coefficients, *kept_1.coefficients]

    @classmethod
    def from_scalars(cls, timestep: float, scalars: Sequence[float]) -> Row:
        """Return the row of a timestep that has these `ROW_WIDTH` numbers: the inverse of `scalars`."""
        width, layout = len(COLUMNS), row_layout
        maps = [Affine(scalars[at : at + width]) for at in (layout.PREV_SAMPLE, layout.KEEP_0, layout.KEEP_1)]
        slots = tuple(int(slot) for slot in (scalars[layout.STORE_0], scalars[layout.STORE_1]) if slot >= 0)
        return cls(
            timestep,
            maps[0],
            (scalars[layout.PREDICTION_SAMPLE], scalars[layout.PREDICTION_OUTPUT]),
            scalars[layout.CLIP],
            tuple(maps[1 : 1 + len(slots)]),
            slots,
            scalars[layout.VARIANCE_OFFSET],
            scalars[layout.VARIANCE_SLOPE],
            scalars[layout.MODEL_INPUT_SCALE],
        )

    @property
    def slots_read(self) -> tuple[int, ...]:
        """The history slots with a coefficient in one of the maps."""
        first = COLUMNS.index("history_0")
        maps = (self.prev_sample, *self.kept)
        return tuple(j for j in range(NUM_REGISTERS) if any(form.coefficients[first + j] for form in maps))

    keep = renamed_attribute("Row.keep", "kept")
    store = renamed_attribute("Row.store", "slots")


@dataclass(frozen=True)
class StepTable:
    """A compiled sampler: its rows in float64 on the host, and the facts of each row that a loop needs.

    Args:
        source: the rows.
        initial_scale: the standard deviation of the first sample.
        variance: how the noise coefficient is scaled by the model's second output.
        thresholding: the loop computes a threshold for d a sample (dynamic thresholding).
        drop_unread: leave out of the rows the kept outputs that no later row reads, each a pass over memory; False for
            a caller that reads them itself.
        provided_slots: history slots that the caller fills before each step with a tensor of its own, see
            `Stepper.provide`; no row writes to them.

    Attributes:
        coefficients: float64 ``[R, 32]`` on the CPU.
        timesteps: R timesteps, one a model call.
        kept_slots: for each row, the history slots that it writes (0, 1 or 2 of them).
        read_slots: for each row, the history slots that it reads.
        draws_noise: for each row, True where it adds noise.

    Raises:
        ValueError: there is no row, a scalar is NaN or infinite (`clip` may be infinite), or a slot is misused.
    """

    source: tuple[Row, ...]
    initial_scale: float = 1.0
    variance: Variance = Variance.FIXED
    thresholding: bool = False
    drop_unread: bool = field(default=True, compare=False, repr=False)
    provided_slots: tuple[int, ...] = ()
    coefficients: torch.Tensor = field(init=False, compare=False, repr=False)
    timesteps: tuple[float, ...] = field(init=False, compare=False, repr=False)
    kept_slots: tuple[tuple[int, ...], ...] = field(init=False, compare=False, repr=False)
    read_slots: tuple[tuple[int, ...], ...] = field(init=False, compare=False, repr=False)
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
                error_message("StepTable", "source", "has no rows", "at least one", "ask for at least one step")
            )
        self._check_slots()
        coefficients = _coefficients(self.source)
        self._check_scalars(coefficients)
        if self.drop_unread:
            kept = _without_unread(self.source)
            if kept != self.source:
                object.__setattr__(self, "source", kept)
                coefficients = _coefficients(kept)
        derived: dict[str, object] = {
            "coefficients": coefficients,
            "timesteps": tuple(row.timestep for row in self.source),
            "kept_slots": tuple(row.slots for row in self.source),
            "read_slots": tuple(row.slots_read for row in self.source),
            "draws_noise": tuple(
                any(form.coefficients[-1] for form in (row.prev_sample, *row.kept)) for row in self.source
            ),
        }
        for name, value in derived.items():
            object.__setattr__(self, name, value)

    def _check_scalars(self, coefficients: torch.Tensor) -> None:
        finite = torch.isfinite(coefficients)
        finite[:, CLIP] = coefficients[:, CLIP] > 0
        if not bool(finite.all()):
            row, column = (int(i) for i in (~finite).nonzero()[0])
            raise ValueError(
                error_message(
                    "StepTable",
                    f"coefficients[{row}, {column}]",
                    f"is {float(coefficients[row, column])}",
                    "a finite number",
                    "the solver divides by zero here: choose another prediction_type, solver or timesteps",
                )
            )

    def _check_slots(self) -> None:
        written: set[int] = set(self.provided_slots)
        own = set(range(NUM_REGISTERS)) - written
        for i, row in enumerate(self.source):
            one_each = len(row.slots) == len(row.kept) <= 2 and len(set(row.slots)) == len(row.slots)
            if not one_each or not set(row.slots) <= own:
                raise ValueError(
                    error_message(
                        "StepTable",
                        f"source[{i}].slots",
                        f"is {row.slots} for {len(row.kept)} kept outputs",
                        f"a different history slot of {sorted(own)} for each, two at most",
                        "name one slot a kept output",
                    )
                )
            unwritten = set(row.slots_read) - written
            if unwritten:
                raise ValueError(
                    error_message(
                        "StepTable",
                        f"source[{i}]",
                        f"reads history slot {min(unwritten)}",
                        "a slot that an earlier row has written",
                        "keep an output there first",
                    )
                )
            written |= set(row.slots)

    def __len__(self) -> int:
        return len(self.source)

    def __iter__(self) -> Iterator[Row]:
        return iter(self.source)

    def save(self, path: str | Path) -> None:
        """Write the table to a file, whole: JSON to read and edit, or safetensors; `load` gives it back to the bit.

        Args:
            path: a file ending in ``.json`` or ``.safetensors``; see `fastdiff.solvers.table_file` for both forms.

        Raises:
            ValueError: another ending, or the table has `provided_slots`, which a file does not hold.
            OSError: the file cannot be written; an existing one is then unchanged.
            ImportError: safetensors is missing.
        """
        if self.provided_slots:
            got, remedy = f"is {self.provided_slots}", "compile the table again where it is used"
            raise ValueError(error_message("StepTable.save", "provided_slots", got, "no such slots", remedy))
        write_table(
            path,
            StoredTable(
                self.coefficients.tolist(), list(self.timesteps), self.initial_scale, self.variance, self.thresholding
            ),
        )

    @classmethod
    def load(cls, path: str | Path) -> StepTable:
        """Read a table from a file that `save` wrote, or that somebody else did.  It holds numbers and no code.

        Kept outputs that no row reads stay in the table.

        Raises:
            ValueError: the file is malformed, of another version, or misuses a slot; one sentence says where.
            OSError: the file cannot be read.
            ImportError: safetensors is missing.
        """
        stored = read_table(path)
        with malformed_in_one_sentence("StepTable.load", path, "rows that fit each other"):
            try:
                rows = map(Row.from_scalars, stored.timesteps, stored.rows)
                return cls(tuple(rows), stored.initial_scale, stored.variance, stored.thresholding, drop_unread=False)
            except ValueError as error:
                raise MalformedError(str(error).removeprefix("StepTable: ")) from None

    def coefficients_as(self, dtype: torch.dtype, device: torch.device | str = "cpu") -> torch.Tensor:
        """Return the coefficients for samples of `dtype`: float64 for float64, else float32; rounded once."""
        return to_device(self.coefficients.to(compute_dtype(dtype)), device).contiguous()

    def shared_coefficients(
        self, dtype: torch.dtype, device: torch.device, *, prediction: bool = False
    ) -> torch.Tensor:
        """Return the coefficients of `coefficients_as`, one tensor for all loops: do not write to it.

        Args:
            dtype: of the samples.
            device: of the samples.
            prediction: those of `prediction_rows` instead.
        """
        source = self.prediction_rows if prediction else lambda: self.coefficients
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
        """Leave out the tensors of `shared_coefficients`: a copy, or a pickle, makes its own."""
        return {**self.__dict__, "_shared": {}}

    def prediction_rows(self) -> torch.Tensor:
        """Return rows with d itself, unclipped, as the previous sample: dynamic thresholding measures it."""
        return prediction_rows(self.coefficients)

    rows = renamed_attribute("StepTable.rows", "coefficients")
    rows_as = renamed_attribute("StepTable.rows_as", "coefficients_as")
    shared_rows = renamed_attribute("StepTable.shared_rows", "shared_coefficients")
    store = renamed_attribute("StepTable.store", "kept_slots")
    reads = renamed_attribute("StepTable.reads", "read_slots")


def prediction_rows(rows: torch.Tensor) -> torch.Tensor:
    """Return rows like `rows`, ``[R, 32]``, with d itself, unclipped, as the previous sample."""
    found = torch.tensor([blank_row()], dtype=rows.dtype, device=rows.device).repeat(len(rows), 1)
    found[:, [PREDICTION_SAMPLE, PREDICTION_OUTPUT]] = rows[:, [PREDICTION_SAMPLE, PREDICTION_OUTPUT]]
    found[:, PREV_SAMPLE + COLUMNS.index("prediction")] = 1.0
    return found


def _coefficients(rows: Sequence[Row]) -> torch.Tensor:
    return torch.tensor([row.scalars() for row in rows], dtype=torch.float64, device="cpu")


def _without_unread(rows: Sequence[Row]) -> tuple[Row, ...]:
    """Leave out the kept outputs that no later row reads before another row writes to their slot."""
    found: list[Row] = []
    wanted: set[int] = set()  # the slots that later rows read as this one leaves them
    for row in reversed(rows):
        read = [j for j, slot in enumerate(row.slots) if slot in wanted]
        wanted -= set(row.slots)
        if len(read) < len(row.slots):
            row = replace(row, kept=tuple(row.kept[j] for j in read), slots=tuple(row.slots[j] for j in read))
        wanted |= set(row.slots_read)
        found.append(row)
    return tuple(reversed(found))
