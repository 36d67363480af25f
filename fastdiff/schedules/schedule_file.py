# SPDX-License-Identifier: MIT
"""Schedules as files: published, learned or measured numbers, checked when they are made and when they are read."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from itertools import pairwise
from pathlib import Path

from ..data_files import (
    MalformedError,
    brief,
    finite_number,
    listed,
    malformed_in_one_sentence,
    object_fields,
    parse_json,
    read_document,
    write_json,
)
from ..errors import error_message, parse_choice

FORMAT, VERSION = "fastdiff-schedule", 1


class ScheduleKind(str, Enum):
    """The meaning of a schedule's numbers, in the order of the list."""

    #: β_0 … β_{T−1}, each in [0, 1): of a training schedule.
    BETAS = "betas"
    #: ᾱ_0 … ᾱ_{T−1}, in [0, 1], never rising.
    ALPHAS_CUMPROD = "alphas_cumprod"
    #: The timesteps that a loop visits, 0 or more, descending.
    TIMESTEPS = "timesteps"
    #: The noise levels σ/α that a loop visits, 0 or more, descending; a last 0 is the clean sample.
    SIGMAS = "sigmas"


@dataclass(frozen=True)
class ScheduleValues:
    """The numbers of a schedule, with their meaning and their source.

    Pass ``values`` on: ``custom_betas=`` and ``custom_alphas_cumprod=`` of a noise scheduler take the first two kinds,
    `levels_from_timesteps` and `levels_from_sigmas` the others.

    Args:
        kind: a `ScheduleKind` or its name.
        values: the numbers, one or more; any iterable of numbers, kept as a tuple of floats.
        source: where they come from: a paper, a model, a fit.

    Raises:
        ValueError: the kind is unknown, or the numbers are no such schedule.
    """

    kind: ScheduleKind | str
    values: Iterable[float]
    source: str = ""

    def __post_init__(self) -> None:
        kind = parse_choice(ScheduleKind, "ScheduleValues", "kind", self.kind)
        object.__setattr__(self, "kind", kind)
        try:
            numbers = list(self.values.tolist() if hasattr(self.values, "tolist") else self.values)
            object.__setattr__(self, "values", _checked(kind, numbers))
        except (MalformedError, TypeError) as error:
            got, remedy = f"cannot be taken: {error}", "correct them, or choose the kind that they are"
            raise ValueError(
                error_message("ScheduleValues", "values", got, f"the numbers of {kind.value}", remedy)
            ) from None

    def save(self, path: str | Path) -> None:
        """Write a JSON file, whole; `load` gives each number back to the bit.

        Raises:
            OSError: the file cannot be written; an existing one is then unchanged.
        """
        fields = {"kind": ScheduleKind(self.kind).value, "source": self.source, "values": list(self.values)}
        write_json(path, FORMAT, VERSION, fields, operation="ScheduleValues.save")

    @classmethod
    def load(cls, path: str | Path) -> ScheduleValues:
        """Read a schedule from a JSON file.  It holds numbers and no code.

        Raises:
            ValueError: the file is malformed or of another version; one sentence says where.
            OSError: the file cannot be read.
        """
        operation = "ScheduleValues.load"
        with malformed_in_one_sentence(operation, path, f"a schedule of version {VERSION}"):
            document = parse_json(read_document(path, operation=operation), FORMAT, VERSION)
            fields = object_fields(document, "the file", {"kind", "values"}, {"source"})
            kind, source = fields["kind"], fields.get("source", "")
            known = [each.value for each in ScheduleKind]
            if not isinstance(kind, str) or kind not in known:
                raise MalformedError(f"kind is {brief(kind)}, expected one of {', '.join(known)}")
            if not isinstance(source, str):
                raise MalformedError(f"source is {brief(source)}, expected text")
            return cls(kind, _checked(ScheduleKind(kind), listed(fields["values"], "values")), source)


def _checked(kind: ScheduleKind, values: list[object]) -> tuple[float, ...]:
    """Return numbers as floats, after checking that they are a schedule of a kind."""
    numbers = tuple(finite_number(value, f"values[{i}]") for i, value in enumerate(values))
    if not numbers:
        raise MalformedError("values is empty, expected one number or more")
    training = kind in (ScheduleKind.BETAS, ScheduleKind.ALPHAS_CUMPROD)
    for i, number in enumerate(numbers):
        if number < 0.0 or (training and number > 1.0) or (kind is ScheduleKind.BETAS and number == 1.0):
            bounds = {ScheduleKind.BETAS: "in [0, 1)", ScheduleKind.ALPHAS_CUMPROD: "in [0, 1]"}.get(kind, "from 0")
            raise MalformedError(f"values[{i}] is {number!r}, expected {kind.value} {bounds}")
    for i, (before, after) in enumerate(pairwise(numbers), start=1):
        if kind is not ScheduleKind.BETAS and (after > before or (after == before and not training)):
            raise MalformedError(f"values[{i}] is {after!r} after {before!r}, expected descending {kind.value}")
    return numbers
