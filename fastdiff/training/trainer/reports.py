# SPDX-License-Identifier: MIT
"""Reports of a training run: the progress bar, the history file and accelerate's trackers."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from ...errors import error_message, require

if TYPE_CHECKING:
    from .trainer import Trainer

#: The reports of a run, one JSON object a line.
HISTORY = "history.jsonl"


class DivergedError(RuntimeError):
    """Gradients that are not finite; the weights are those before the first such step."""


class Reports:
    """A context in which a trainer reports.

    Args:
        trainer: who reports.
        last_step: the last optimizer step, where it is known.

    Attributes:
        written: the reports so far.
    """

    def __init__(self, trainer: Trainer, last_step: int | None) -> None:
        self._trainer, self._last_step = trainer, last_step
        self._bar: Any = None
        self._last_written = trainer.step
        self.written: list[dict[str, float]] = []

    def __enter__(self) -> Reports:
        trainer = self._trainer
        options, accelerator = trainer.options, trainer.accelerator
        if options.output_dir is not None and accelerator.is_main_process:
            folder = Path(options.output_dir)
            try:
                folder.mkdir(parents=True, exist_ok=True)
                _cut_history(folder / HISTORY, trainer.step)
            except OSError as error:
                raise _explained(error, folder) from error
        if options.trackers and not accelerator.trackers:
            plain = {name: _plain(value) for name, value in trainer.config.to_dict().items()}
            accelerator.init_trackers("fastdiff", config=plain, init_kwargs={"wandb": {"dir": options.output_dir}})
        if options.progress and accelerator.is_main_process:
            tqdm = require("tqdm", "training", "train").tqdm
            self._bar = tqdm(initial=trainer.step, total=self._last_step, desc="train", unit="step", dynamic_ncols=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()
        if kind is None:
            for tracker in self._trainer.accelerator.trackers:
                flush = getattr(getattr(tracker, "writer", None), "flush", None)
                if flush is not None:
                    flush()

    def advance(self) -> None:
        """Move the progress bar by a step."""
        if self._bar is not None:
            self._bar.update()

    def write(self, more: dict[str, float] | None = None) -> None:
        """Report what has happened since the last report, and check that it was finite; this waits for the device.

        Raises:
            DivergedError: every step since the last report had gradients that are not finite.
            OSError: the history cannot be written.
        """
        trainer = self._trainer
        if trainer.step == self._last_written:
            return
        trainer.check_finite()
        found = trainer.read_monitor()
        steps, self._last_written = trainer.step - self._last_written, trainer.step
        trainer.last_loss = found["loss"] if found["loss"] == found["loss"] else trainer.last_loss
        report = {
            "step": trainer.step,
            "epoch": trainer.epoch,
            **found,
            "learning_rate": trainer.learning_rate.get_last_lr()[0],
            "skipped_steps": trainer.skipped_steps,
            **(more or {}),
        }
        self.written.append(report)
        self._send(report)
        if found["bad_steps"] >= steps:
            got = f"are not finite in any of the steps {trainer.step - steps + 1} to {trainer.step}"
            remedy = "check the data, or lower learning_rate"
            raise DivergedError(error_message("train", "the gradients", got, "finite numbers", remedy))

    def _send(self, report: dict[str, float]) -> None:
        options, accelerator = self._trainer.options, self._trainer.accelerator
        if self._bar is not None:
            self._bar.set_postfix(loss=f"{report['loss']:.4f}", lr=f"{report['learning_rate']:.2g}")
        if options.output_dir is not None and accelerator.is_main_process:
            path = Path(options.output_dir) / HISTORY
            # JSON has no NaN: what is not finite is a string there.
            line = json.dumps({name: value if value - value == 0 else repr(value) for name, value in report.items()})
            try:
                with path.open("a", encoding="utf-8") as stream:
                    stream.write(line + "\n")
            except OSError as error:
                raise _explained(error, path) from error
        if accelerator.trackers:
            values = {name: value for name, value in report.items() if name != "step"}
            accelerator.log(values, step=int(report["step"]))


def _cut_history(path: Path, step: int) -> None:
    """Remove the reports after a step, which a run that resumes there makes again."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            report = json.loads(line)
        except ValueError:  # the line that was being written when the process ended
            continue
        if isinstance(report, dict) and isinstance(report.get("step"), int) and report["step"] <= step:
            kept.append(line)
    partial = path.with_name(f".partial-{path.name}")  # renamed: a process that ends here leaves the old reports
    partial.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
    os.replace(partial, path)


def _plain(value: Any) -> Any:
    return value if isinstance(value, (bool, int, float, str)) else json.dumps(value)


def _explained(error: OSError, path: Path) -> OSError:
    got = f"is {str(path)!r}, which cannot be written: {error.strerror or error}"
    remedy = "free some space, or choose another folder; checkpoints are whole"
    explained = type(error)(error_message("train", "output_dir", got, "a folder that can be written to", remedy))
    explained.errno = error.errno
    return explained
