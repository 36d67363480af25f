# SPDX-License-Identifier: MIT
"""Forms of the steps that fastdiff ships, for the list of kernels that CUDA compiles for them.

A form names the tensors that a step has, not its coefficients: see csrc/cuda/step_form.h.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
from torch import Tensor

from fastdiff.ops import backends
from fastdiff.ops.call import StepCall
from fastdiff.row_layout import Variance
from fastdiff.solvers import Prediction
from fastdiff.solvers.table import StepTable
from support import affine_cases
from support.affine_cases import Call
from support.solver_loops import PREDICTION_TYPES, SOLVERS

#: The list, and what each of its entries begins with.
LIST = Path(__file__).resolve().parents[2] / "csrc" / "cuda" / "step_forms.inc"
PREFIX = "FASTDIFF_STEP_FORM("
ROWS = ("kByValue", "kByIndex")
NOISES = ("kNone", "kGiven", "kDrawn")

#: A form with more tensors runs on the general kernel, which is then as fast as a copy of them: on an H100 it makes
#: 170·10⁹ elements a second, and 9 tensors of 2 bytes each are 3.1 TB/s where a copy moves 2.9.
MOST_TENSORS = 8


class StepForm(NamedTuple):
    """A form by the names of csrc/cuda/step_form.h."""

    row: str  # one of ROWS
    noise: str  # one of NOISES
    guided: bool
    histories: int
    outputs: int

    @property
    def tensors(self) -> int:
        """The number of tensors that are read or written."""
        written = self.outputs if self.row == "kByValue" else 1 + min(self.histories, 2)
        return 2 + self.guided + (self.noise == "kGiven") + self.histories + written

    @property
    def key(self) -> int:
        """The number of the form, as `key_of` in csrc/cuda/step_form.h computes it."""
        sources = ROWS.index(self.row) * len(NOISES) + NOISES.index(self.noise)
        return ((sources * 2 + self.guided) * 5 + self.histories) * 3 + self.outputs - 1

    def __str__(self) -> str:
        """The form as the arguments of FASTDIFF_STEP_FORM."""
        return f"{self.row}, {self.noise}, {str(self.guided).lower()}, {self.histories}, {self.outputs}"


def listed(content: str) -> dict[StepForm, str]:
    """The forms of a list, each with the group that its comment names."""
    entries = re.findall(rf"^{re.escape(PREFIX)}(\w+), (\w+), (\w+), (\d), (\d)\)  // (.*)$", content, re.MULTILINE)
    return {
        StepForm(row, noise, guided == "true", int(h), int(o)): group for row, noise, guided, h, o, group in entries
    }


def row_forms(histories: int, outputs: int, noisy: bool) -> set[StepForm]:
    """Forms of a step with a row by value: with and without guidance, noise given or drawn."""
    sources = ("kGiven", "kDrawn") if noisy else ("kNone",)
    return {StepForm("kByValue", n, g, histories, outputs) for n in sources for g in (False, True)}


def captured_forms(table: StepTable) -> set[StepForm]:
    """Forms of the steps of a captured loop: rows by index, all history slots of the table, drawn noise."""
    histories = len({slot for slots in table.kept_slots for slot in slots})
    noise = "kDrawn" if any(table.draws_noise) else "kNone"
    return {StepForm("kByIndex", noise, g, histories, 3 if histories else 1) for g in (False, True)}


def table_forms(table: StepTable) -> set[StepForm]:
    """Forms of all steps of a loop over a table, captured or not; none with a learned variance or a threshold."""
    if table.thresholding:
        return set()
    found = set() if table.variance is not Variance.FIXED and any(table.draws_noise) else captured_forms(table)
    for row, noisy in zip(table.source, table.draws_noise, strict=True):
        if not noisy or table.variance is Variance.FIXED:
            found |= row_forms(len(row.slots_read), 1 + len(row.kept), noisy)
    return found


def solver_forms() -> dict[str, set[StepForm]]:
    """Forms of every solver with every option that changes its formula."""
    found: dict[str, set[StepForm]] = {}
    levels = affine_cases.named_levels()
    for (_, level), kind, bound in itertools.product(levels, PREDICTION_TYPES, ({}, {"clip_range": 1.0})):
        for name, make in SOLVERS.items():
            try:
                table = make(level, Prediction(kind, **bound))
            except ValueError:  # a solver of ε cannot reach the clean sample
                continue
            found.setdefault(name, set()).update(table_forms(table))
    return found


def call_forms(call: StepCall) -> set[StepForm]:
    """Forms of a canonical call and of its like with and without guidance, noise given or drawn."""
    targets = [target for target in call.targets if isinstance(target, Tensor)]
    inputs = (call.sample, call.model_output, call.uncond, call.noise, *call.history, *targets)
    noisy = call.noise is not None or call.seeds is not None
    learned = noisy and call.variance_kind != Variance.FIXED
    if call.threshold is not None or learned or len({t.dtype for t in inputs if t is not None}) > 1:
        return set()
    histories = sum(history is not None for history in call.history)
    if not isinstance(call.row_index, Tensor):
        return row_forms(histories, 1 + call.keeps, noisy)
    if histories or call.keeps or noisy:
        return set()
    return {StepForm("kByIndex", "kNone", guided, 0, 1) for guided in (False, True)}


def recorded_forms(calls: Iterable[Call]) -> dict[str, set[StepForm]]:
    """Make the calls on the CPU backend and return the forms of each by its name."""
    found: dict[str, set[StepForm]] = {}
    run, name = backends.RUN["cpu"], ""

    def record(call: StepCall) -> object:
        found.setdefault(name, set()).update(call_forms(call))
        return run(call)

    # A forced backend keeps drop-ins from the native executor, which `backends.RUN` does not see.
    with mock.patch.dict(backends.RUN, cpu=record), backends.use_backend("cpu"), torch.no_grad():
        for name, call in calls:  # noqa: B007  # `record` reads the name
            call()
    return found


def groups() -> dict[str, Callable[[], dict[str, set[StepForm]]]]:
    """The forms in groups, each by the names of its calls: solvers, single steps, guiders, drop-in schedulers."""

    def dropin(name: str) -> dict[str, set[StepForm]]:
        return recorded_forms(affine_cases.dropin_calls(name, most=1))

    found: dict[str, Callable[[], dict[str, set[StepForm]]]] = {"solvers": solver_forms}
    for name, calls in affine_cases.groups().items():
        if name in ("single_steps", "guiders"):
            found[name] = partial(_recorded, calls)
        elif name != "solvers":
            found[name] = partial(dropin, name)
    return found


def _recorded(calls: Callable[[], Iterator[Call]]) -> dict[str, set[StepForm]]:
    return recorded_forms(calls())
