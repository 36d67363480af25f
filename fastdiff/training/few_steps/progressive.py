# SPDX-License-Identifier: MIT
"""Progressive distillation: a student takes two steps of its teacher in one.

Everything that is done to samples here is a row of a step table, one a sample: the noise, the teacher's steps and the
student's target are passes of `fastdiff.ops.step`.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import checked_float, checked_integer, checked_type, error_message, unknown_name
from ...ops import step
from ...philox import Purpose
from ...row_layout import COLUMNS
from ...samplers import create_sampler
from ...schedules import BaseNoiseScheduler, create_noise_scheduler
from ...schedules.levels import Level, Levels
from ...solvers import Prediction, PredictionType
from ...solvers.affine import MODEL_OUTPUT, NOISE, SAMPLE
from ...solvers.ddim import ddim
from ...solvers.table import Row, StepTable
from ..data.batches import TrainingBatch
from ..losses.objectives import LossTerms, Predict
from ..losses.timestep_draws import draw_timesteps
from ..model.conditioning import output_tensor

#: Weights of the squared error of x0 over the SNR S: max(S, 1), S + 1 (arXiv 2202.00512, section 4), or 1.
DISTILLATION_WEIGHTINGS = ("truncated_snr", "snr_plus_one", "uniform")


class Teacher:
    """A model that is not trained, in evaluation mode, with classifier-free guidance at one scale.

    Distilled from a guided teacher, a student needs no guidance: one call a step (arXiv 2210.03142, at one scale).

    Args:
        model: as `fastdiff.training.Trainer` takes it; it is copied.
        guidance_scale: 1 for no guidance.
        null_label: the label for no class, where conditions are labels; else zeros are the null condition.

    Raises:
        TypeError, ValueError: an argument does not fit.
    """

    def __init__(self, model: nn.Module, guidance_scale: float = 1.0, null_label: int | None = None) -> None:
        checked_type("Teacher", "model", model, nn.Module, "a torch.nn.Module", "pass the network")
        checked_float("Teacher", "guidance_scale", guidance_scale, 0.0)
        self._model = copy.deepcopy(model).eval().requires_grad_(False)
        self._guidance_scale, self._null_label = guidance_scale, null_label
        self._device: torch.device | None = None

    @torch.no_grad()
    def __call__(self, sample: Tensor, timestep: Tensor, condition: Tensor | None = None) -> Tensor:
        """Return the guided output ``[B, C, ...]`` for noisy samples at timesteps ``[B]``; without gradients."""
        if self._device != sample.device:
            self._model.to(sample.device)
            self._device = sample.device
        if condition is None:
            return output_tensor(self._model(sample, timestep))
        conditional = output_tensor(self._model(sample, timestep, condition))
        if self._guidance_scale == 1.0:
            return conditional
        null = torch.zeros_like(condition)
        if self._null_label is not None:
            null.fill_(self._null_label)
        free = output_tensor(self._model(sample, timestep, null))
        return torch.lerp(free, conditional, self._guidance_scale)


def trailing_schedule(schedule: Any) -> BaseNoiseScheduler:
    """Return a noise schedule whose loops start at the last timestep: few steps then start from noise alone.

    Args:
        schedule: a noise schedule of fastdiff; it is not changed.

    Raises:
        TypeError: it is another's.
    """
    remedy = "make one with fastdiff.create_noise_scheduler"
    checked_type("distillation", "schedule", schedule, BaseNoiseScheduler, "a noise schedule of fastdiff", remedy)
    return create_noise_scheduler(schedule.config, timestep_spacing="trailing")


def ddim_sampler(schedule: Any, prediction_type: str, steps: int) -> Any:
    """Return the DDIM sampler of a teacher: its ``levels(steps)`` and its ``table``."""
    return create_sampler(
        trailing_schedule(schedule), "ddim", num_inference_steps=steps, prediction_type=prediction_type
    )


@dataclass(frozen=True)
class RowTable:
    """Rows with the timesteps of their model calls, one row a sample of a batch."""

    rows: tuple[Row, ...]

    @cached_property
    def _table(self) -> StepTable:
        return StepTable(self.rows)

    @cached_property
    def timesteps(self) -> Tensor:
        """Timesteps ``[R]`` of the rows on the CPU: int64 where all are whole, else float32."""
        whole = all(float(row.timestep).is_integer() for row in self.rows)
        values = torch.tensor([row.timestep for row in self.rows], dtype=torch.float64)
        return values.to(torch.int64 if whole else torch.float32)

    def apply(self, sample: Tensor, output: Tensor, index: Tensor, **noise: Any) -> Tensor:
        """Return the next sample, with the row of `index` ``[B]`` for each sample; differentiable in both tensors."""
        dtype = torch.promote_types(sample.dtype, output.dtype)
        coefficients = self._table.shared_coefficients(dtype, sample.device)
        return step(sample, output, coefficients, index, **noise)[0]


def noising_rows(levels: Levels) -> RowTable:
    """Return the rows α·x0 + σ·z of the levels of model calls."""
    return RowTable(tuple(Row(t.timestep, t.alpha * SAMPLE + t.sigma * NOISE, (0.0, 0.0)) for t in levels.points[:-1]))


def noisy_samples(rows: RowTable, batch: TrainingBatch, index: Tensor) -> Tensor:
    """Return noisy samples of a batch at levels `index` ``[B]``, with the noise of the samples' seeds."""
    images = batch.images
    return rows.apply(images, images, index, seeds=batch.seeds, purpose=Purpose.FORWARD)


def inverse_rows(table: StepTable) -> RowTable:
    """Return rows that give the model output with which a row of `table` steps from x to the "output".

    ``prev = a·x + b·m`` is solved for m: ``m = (prev − a·x)/b``.
    """
    sample, output = COLUMNS.index("sample"), COLUMNS.index("model_output")
    rows = []
    for row in table.source:
        a, b = row.prev_sample.coefficients[sample], row.prev_sample.coefficients[output]
        rows.append(Row(row.timestep, (MODEL_OUTPUT - a * SAMPLE) / b, (0.0, 0.0)))
    return RowTable(tuple(rows))


def _distillation_weight(weighting: str, level: Level) -> float:
    """Return the weight of the squared error of x0 at a level."""
    if weighting == "uniform":
        return 1.0
    ratio = (level.alpha / level.sigma) ** 2
    return max(ratio, 1.0) if weighting == "truncated_snr" else ratio + 1.0


class ProgressiveObjective:
    """Loss of one round of progressive distillation (arXiv 2202.00512, algorithm 2).

    A sample is noised to one of the student's levels, each as likely.  The teacher takes two DDIM steps of a loop of
    twice as many.  The target is the output with which the student gets there in one DDIM step; the loss is the squared
    error of the x0 that it means, weighted.

    Args:
        teacher: called with ``(sample, timestep, condition)``, such as a `Teacher`.
        schedule: the noise schedule of fastdiff; its loops are spaced "trailing".
        student_steps: steps of the student's loop, 1 to T/2.
        prediction_type: of teacher and student.
        weighting: a name of `DISTILLATION_WEIGHTINGS`.

    Raises:
        TypeError, ValueError: an argument does not fit.
    """

    def __init__(
        self,
        teacher: Predict,
        schedule: BaseNoiseScheduler,
        student_steps: int,
        prediction_type: str,
        *,
        weighting: str = "truncated_snr",
    ) -> None:
        operation = "ProgressiveObjective"
        checked_integer(operation, "student_steps", student_steps, 1)
        if weighting not in DISTILLATION_WEIGHTINGS:
            raise unknown_name(operation, "weighting", weighting, DISTILLATION_WEIGHTINGS)
        self._teacher, self._steps = teacher, student_steps
        sampler = ddim_sampler(schedule, prediction_type, 2 * student_steps)
        levels: Levels = sampler.levels(2 * student_steps)
        self._teacher_rows = RowTable(sampler.table.source)
        prediction = Prediction(PredictionType.parse(prediction_type))
        student = Levels(levels.points[::2], levels.locate, levels.locate_timestep)
        self._noising = noising_rows(student)
        self._target = inverse_rows(ddim(student, prediction))
        weights = []
        for level in student.points[:-1]:
            _, by_output = prediction.at(level).scalars
            weights.append(_distillation_weight(weighting, level) * by_output**2)
        self._weights = torch.tensor(weights, dtype=torch.float64)

    def __call__(self, predict: Predict, batch: TrainingBatch) -> LossTerms:
        """Return the losses of a batch; their timesteps are the student's."""
        device = batch.images.device
        index = draw_timesteps(len(batch.images), self._steps, seeds=batch.seeds)
        with torch.no_grad():
            noisy = reached = noisy_samples(self._noising, batch, index)
            for row in (2 * index, 2 * index + 1):
                t = self._teacher_rows.timesteps.to(device)[row]
                output = self._teacher(reached, t, batch.condition)
                reached = self._teacher_rows.apply(reached, output, row)
            target = self._target.apply(noisy, reached, index)
        t = self._noising.timesteps.to(device)[index]
        error = (predict(noisy, t, batch.condition) - target).flatten(1).square().mean(1)
        return LossTerms(error * self._weights.to(device, error.dtype)[index], t.long())


def progressive_rounds(teacher_steps: int, student_steps: int) -> list[int]:
    """Return the steps of the students of all rounds: half the teacher's, half of that, …, `student_steps`.

    Raises:
        TypeError, ValueError: `teacher_steps` is not `student_steps` times 2, 4, 8, ….
    """
    checked_integer("train", "student_steps", student_steps, 1)
    checked_integer("train", "teacher_steps", teacher_steps, 2)
    rounds = [teacher_steps]
    while rounds[-1] > student_steps and rounds[-1] % 2 == 0:
        rounds.append(rounds[-1] // 2)
    if rounds[-1] != student_steps or len(rounds) < 2:
        expected = f"{student_steps} (student_steps) times 2, 4, 8, ..."
        raise ValueError(
            error_message("train", "teacher_steps", f"is {teacher_steps}", expected, f"take {8 * student_steps}")
        )
    return rounds[1:]
