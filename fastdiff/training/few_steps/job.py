# SPDX-License-Identifier: MIT
"""A distillation by name: teacher, rounds and objectives of ``fastdiff train --distill``."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from ...errors import checked_float, checked_integer, error_message, unknown_name
from ..checkpoints import latest_checkpoint, list_checkpoints, load_checkpoint
from ..config import DiffusionConfig
from ..losses.objectives import Objective
from ..model.trained_parts import noise_schedule
from ..trainer.job import Job
from .consistency import ConsistencyObjective, ConsistencyOptions
from .progressive import ProgressiveObjective, Teacher, progressive_rounds

DISTILLATIONS = ("progressive", "consistency", "consistency_training")


class Round(NamedTuple):
    """One training of a distillation: its folder, and the steps of the student's loop."""

    folder: Path
    steps: int


@dataclass(frozen=True)
class DistillOptions:
    """Options of ``fastdiff train --distill``.

    Args:
        method: a name of `DISTILLATIONS`.
        teacher: a folder of ``fastdiff train`` or one of its checkpoints, whose averaged weights are taken where there
            are any; None for the packaged digits' model.
        student_steps: steps of the last student's loop.
        teacher_steps: of the first teacher's loop for ``progressive``: `student_steps` times 2, 4, 8, …; the intervals
            of the grid elsewhere.
        guidance_scale: of the teacher; the student is sampled without guidance.
    """

    method: str
    teacher: Path | None = None
    student_steps: int = 4
    teacher_steps: int = 32
    guidance_scale: float = 1.0

    def validate(self) -> DistillOptions:
        """Check all fields and return a copy.

        Raises:
            TypeError, ValueError: a field has the wrong type or is out of range.
        """
        if self.method not in DISTILLATIONS:
            raise unknown_name("train", "--distill", self.method, DISTILLATIONS)
        checked_integer("train", "--student-steps", self.student_steps, 1)
        checked_integer("train", "--teacher-steps", self.teacher_steps, 2)
        checked_float("train", "--teacher-guidance-scale", self.guidance_scale, 0.0)
        if self.method == "progressive":
            progressive_rounds(self.teacher_steps, self.student_steps)
        if self.method == "consistency_training" and (self.teacher is not None or self.guidance_scale != 1.0):
            name = "--teacher" if self.teacher is not None else "--teacher-guidance-scale"
            remedy = "leave it out, or pass --distill consistency"
            raise ValueError(error_message("train", name, "is given for a training without a teacher", "none", remedy))
        return replace(self)

    def rounds(self, out: Path) -> list[Round]:
        """Return the rounds in order: of ``progressive`` each in a folder of its own, such as ``steps-0008``."""
        if self.method != "progressive":
            return [Round(out, self.student_steps)]
        return [Round(out / f"steps-{n:04d}", n) for n in progressive_rounds(self.teacher_steps, self.student_steps)]


def prepare_student(job: Job, data: str, options: DistillOptions) -> Job:
    """Load the teacher's weights into the job's model, and return the job with the student's configuration.

    The student's configuration has its steps, no guidance and no condition dropout.

    Raises:
        OSError, ValueError: the teacher cannot be read, or is another model; or the job cannot be distilled.
    """
    config = job.config.validate()
    for unfit, got in (
        (config.use_spatial_transformer, "is trained with a text encoder"),
        (config.learned_variance, "learns its variance"),
    ):
        if unfit:
            expected = "a model of images alone or of labels, with a fixed variance"
            remedy = "pass a Trainer an objective with a Teacher of your own"
            raise ValueError(error_message("train", "--distill", f"is given for a model that {got}", expected, remedy))
    if options.method != "consistency_training":
        _load_teacher(job, data, config, options.teacher)
    few = replace(job.config, guidance_scale=1.0, num_inference_steps=options.student_steps, condition_dropout=0.0)
    return job._replace(config=few)


def _load_teacher(job: Job, data: str, config: DiffusionConfig, teacher: Path | None) -> None:
    if teacher is None:
        from ...digits import DigitUNet, load_digit_unet

        if not isinstance(job.model, DigitUNet):
            expected = "a folder of fastdiff train with the same configuration"
            raise ValueError(
                error_message("train", "--teacher", f"is left out for {data!r}", expected, "train one first")
            )
        job.model.load_state_dict(load_digit_unet().state_dict())
        return
    folder = latest_checkpoint(teacher / "checkpoints") or latest_checkpoint(teacher) or teacher
    load_checkpoint(folder, job.model, ema=(folder / "ema.safetensors").is_file())


def round_objective(job: Job, options: DistillOptions, current: Round) -> Objective:
    """Return the objective of a round, whose teacher is the job's model as it is now."""
    config = job.config.validate()
    schedule, prediction = noise_schedule(job.model, config), config.prediction_type
    if options.method == "consistency_training":
        grid = ConsistencyOptions(options.teacher_steps)
        return ConsistencyObjective(schedule, prediction, grid, total_steps=config.max_train_steps)
    first = options.method == "consistency" or current.steps == options.teacher_steps // 2
    teacher = Teacher(job.model, options.guidance_scale if first else 1.0, job.null_label)
    if options.method == "progressive":
        return ProgressiveObjective(teacher, schedule, current.steps, prediction)
    grid = ConsistencyOptions(options.teacher_steps)
    return ConsistencyObjective(schedule, prediction, grid, teacher=teacher, total_steps=config.max_train_steps)


def finish_round(job: Job, current: Round) -> None:
    """Load the averaged weights of a finished round into the job's model, for the next one."""
    folder = list_checkpoints(current.folder / "checkpoints")[-1]
    load_checkpoint(folder, job.model, ema=(folder / "ema.safetensors").is_file())
