# SPDX-License-Identifier: MIT
"""Options of a training run that are not of the model: reports, files, validation, what follows from bad numbers."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ...errors import checked_bool, checked_integer, checked_type, error_message, require, unknown_name
from ...json_fields import fields_from_json, fields_to_json

#: Packages that loss curves can be sent to, by the names of accelerate.
TRACKERS = {"tensorboard": "tensorboard", "wandb": "wandb"}


@dataclass
class RunOptions:
    """Options of a training run.

    Args:
        output_dir: folder of ``checkpoints/``, ``samples/``, ``logs/`` and ``history.jsonl``; None writes no files.
        log_every: optimizer steps between two reports.  A report waits for the device once; no other step does.
        checkpoint_every: optimizer steps between two checkpoints; 0 for one at the end alone.
        keep_checkpoints: the latest ones that are kept.
        validate_every: optimizer steps between two validations; 0 for none.
        sample_every: optimizer steps between two grids of samples; 0 for none.
        sample_count: images of a grid.
        sample_labels, sample_prompts: conditions of the grid's images, in turn.
        on_nan: a step with gradients that are not finite never changes the weights.  ``"stop"`` ends the training with
            an error; ``"skip"`` counts it and goes on, until every step of a report was such.
        trackers: names of `TRACKERS`, where reports are sent.
        progress: show a progress bar on stderr.
        cpu: train on the CPU where there is an accelerator.
    """

    output_dir: str | os.PathLike[str] | None = None
    log_every: int = 50
    checkpoint_every: int = 0
    keep_checkpoints: int = 2
    validate_every: int = 0
    sample_every: int = 0
    sample_count: int = 16
    sample_labels: Sequence[int] = ()
    sample_prompts: Sequence[str] = ()
    on_nan: str = "stop"
    trackers: Sequence[str] = ()
    progress: bool = False
    cpu: bool = False

    def validate(self) -> RunOptions:
        """Check all fields and return a copy.

        Raises:
            TypeError, ValueError: a field has the wrong type or is out of range.
            ImportError: a tracker is not installed.
        """
        operation = type(self).__name__
        numbers: dict[str, Any] = {}
        for name, least in (
            ("log_every", 1),
            ("checkpoint_every", 0),
            ("keep_checkpoints", 1),
            ("validate_every", 0),
            ("sample_every", 0),
            ("sample_count", 1),
        ):
            numbers[name] = checked_integer(operation, name, getattr(self, name), least)
        for name in ("progress", "cpu"):
            checked_bool(operation, name, getattr(self, name))
        if self.on_nan not in ("stop", "skip"):
            raise unknown_name(operation, "on_nan", self.on_nan, ("stop", "skip"))
        for name in ("sample_labels", "sample_prompts", "trackers"):
            if isinstance(getattr(self, name), str):
                got, remedy = f"is the string {getattr(self, name)!r}", f"pass {name}=({getattr(self, name)!r},)"
                raise TypeError(error_message(operation, name, got, "a sequence", remedy))
        for tracker in self.trackers:
            if tracker not in TRACKERS:
                raise unknown_name(operation, "trackers", tracker, TRACKERS)
            require(TRACKERS[tracker], "training", operation)
        folder = self.output_dir
        if folder is not None:
            checked_type(operation, "output_dir", folder, (str, os.PathLike), "a path", "pass the folder's path")
            folder = os.fspath(folder)
        return replace(self, output_dir=folder, **numbers)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as values of standard JSON."""
        return fields_to_json(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> RunOptions:
        """Make options of what `to_dict` gave; fields may be left out.

        Raises:
            ValueError: a field is unknown.
        """
        return cls(**fields_from_json(cls, values))
