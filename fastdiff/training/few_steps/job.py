# SPDX-License-Identifier: MIT
"""A distillation by name: teacher, rounds and objectives of ``fastdiff train --distill``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from ...errors import checked_float, checked_integer, error_message, unknown_name
from ..config import DiffusionConfig
from ..losses.objectives import Objective
from ..model.from_checkpoint import load_folder_weights, round_folder
from ..model.trained_parts import check_configured_schedule, noise_schedule
from ..trainer.job import Job
from .consistency import ConsistencyObjective, ConsistencyOptions
from .progressive import ProgressiveObjective, Teacher, progressive_rounds

#: Methods that train from the data alone.
WITHOUT_TEACHER = ("consistency_training", "plain_consistency_training")
DISTILLATIONS = ("progressive", "consistency", *WITHOUT_TEACHER)

#: Fields of the configuration that say what a model's output means.
_OF_OUTPUT = ("prediction_type", "beta_schedule", "num_train_timesteps", "beta_start", "beta_end")

#: Steps of the first teacher, or intervals of the grid, where they are left out.
_TEACHER_STEPS = 32
#: Intervals of improved consistency training at its start and at its end (arXiv 2310.14189, section 3.4).
_FIRST_INTERVALS, _LAST_INTERVALS = 10, 1280


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
            of the grid elsewhere, at the end of the training.  32 where None; for ``consistency_training`` 1280, or T
            where that is less.
        guidance_scale: of the teacher; the student is sampled without guidance.
    """

    method: str
    teacher: Path | None = None
    student_steps: int = 4
    teacher_steps: int | None = None
    guidance_scale: float = 1.0

    def validate(self) -> DistillOptions:
        """Check all fields and return a copy; `teacher_steps` of it is None for ``consistency_training`` alone.

        Raises:
            TypeError, ValueError: a field has the wrong type or is out of range.
        """
        if self.method not in DISTILLATIONS:
            raise unknown_name("train", "--distill", self.method, DISTILLATIONS)
        checked_integer("train", "--student-steps", self.student_steps, 1)
        steps = self.teacher_steps
        if steps is None and self.method != "consistency_training":
            steps = _TEACHER_STEPS
        if steps is not None:
            checked_integer("train", "--teacher-steps", steps, 2)
        checked_float("train", "--teacher-guidance-scale", self.guidance_scale, 0.0)
        if self.method == "progressive":
            progressive_rounds(steps or _TEACHER_STEPS, self.student_steps)
        if self.method in WITHOUT_TEACHER and (self.teacher is not None or self.guidance_scale != 1.0):
            name = "--teacher" if self.teacher is not None else "--teacher-guidance-scale"
            remedy = "leave it out, or pass --distill consistency"
            raise ValueError(error_message("train", name, "is given for a training without a teacher", "none", remedy))
        return replace(self, teacher_steps=steps)

    def rounds(self, out: Path) -> list[Round]:
        """Return the rounds in order: of ``progressive`` each in a folder of its own, such as ``steps-0008``."""
        if self.method != "progressive":
            return [Round(out, self.student_steps)]
        steps = progressive_rounds(self.teacher_steps or _TEACHER_STEPS, self.student_steps)
        return [Round(round_folder(out, n), n) for n in steps]

    def grid(self, num_train_timesteps: int) -> ConsistencyOptions:
        """Return the grid, draws, weights and loss of a consistency method; of a checked copy.

        ``consistency_training`` has those of arXiv 2310.14189, ``plain_consistency_training`` one grid, equal draws and
        weights, and the squared error (arXiv 2303.01469, algorithm 3), ``consistency`` the defaults.
        """
        intervals = self.teacher_steps or _TEACHER_STEPS
        if self.method == "plain_consistency_training":
            return ConsistencyOptions(intervals, weighting="uniform", loss="l2")
        if self.method == "consistency":
            return ConsistencyOptions(intervals)
        last = self.teacher_steps or min(_LAST_INTERVALS, num_train_timesteps)
        return ConsistencyOptions(
            last,
            min(_FIRST_INTERVALS, last),
            index_sampling="lognormal",
            log_mean=-1.1,
            log_std=2.0,
            weighting="inverse_gap",
            loss="huber",
        )


def prepare_student(job: Job, data: str, options: DistillOptions) -> Job:
    """Load the teacher's weights into the job's model, and return the job with the student's configuration.

    The student's configuration has trailing timesteps, no guidance, no condition dropout, and the method of its
    samples: LCM for a consistency model, else DDIM without noise.

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
    if options.method not in WITHOUT_TEACHER:
        _load_teacher(job, data, options.teacher)
    few = replace(
        job.config,
        timestep_spacing="trailing",
        guidance_scale=1.0,
        eta=0.0,
        condition_dropout=0.0,
        sampling_method="ddim" if options.method == "progressive" else "lcm",
    )
    return job._replace(config=few)


def prepare_round(job: Job, current: Round) -> Job:
    """Return the job with the number of steps of a round's student."""
    return job._replace(config=replace(job.config, num_inference_steps=current.steps))


def _load_teacher(job: Job, data: str, teacher: Path | None) -> None:
    if teacher is None:
        from ...digits import DigitUNet, load_digit_unet

        if not isinstance(job.model, DigitUNet):
            expected = "a folder of fastdiff train with the same configuration"
            raise ValueError(
                error_message("train", "--teacher", f"is left out for {data!r}", expected, "train one first")
            )
        job.model.load_state_dict(load_digit_unet().state_dict())
        return
    folder, state = load_folder_weights(teacher, {"model": job.model}, "train")
    _check_same_output(folder, state, job.config.validate())


def _check_same_output(folder: Path, state: Mapping[str, Any], config: DiffusionConfig) -> None:
    """Refuse a teacher whose output means something else than the student's.

    Raises:
        ValueError: its configuration has another prediction type or noise schedule.
    """
    if "config" not in state:  # `save_checkpoint` wrote the model alone
        return
    found = DiffusionConfig.from_dict(state["config"])
    for name in _OF_OUTPUT:
        theirs, ours = getattr(found, name), getattr(config, name)
        if theirs != ours:
            got, remedy = f"is {str(folder)!r} with {name} {theirs!r}", "pass the --config that it was trained with"
            raise ValueError(error_message("train", "--teacher", got, f"{ours!r} like the student", remedy))
    check_configured_schedule(state, config, folder, "train", "--teacher")


def round_objective(job: Job, options: DistillOptions, current: Round) -> Objective:
    """Return the objective of a round, whose teacher is the job's model as it is now."""
    config = job.config.validate()
    schedule, prediction = noise_schedule(job.model, config), config.prediction_type
    if options.method == "progressive":
        # The guidance of the first teacher is part of its student, which teaches the next one.
        scale = options.guidance_scale if 2 * current.steps == options.teacher_steps else 1.0
        return ProgressiveObjective(Teacher(job.model, scale, job.null_label), schedule, current.steps, prediction)
    teacher = None
    if options.method not in WITHOUT_TEACHER:
        teacher = Teacher(job.model, options.guidance_scale, job.null_label)
    grid = options.grid(schedule.num_train_timesteps)
    return ConsistencyObjective(schedule, prediction, grid, teacher=teacher, total_steps=config.max_train_steps)


def finish_round(job: Job, current: Round) -> None:
    """Load the averaged weights of a finished round into the job's model, for the next one."""
    load_folder_weights(current.folder, {"model": job.model}, "train")
