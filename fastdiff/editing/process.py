# SPDX-License-Identifier: MIT
"""The process that edits share: levels, solver and prediction, and the walk over a part of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from .. import ops
from ..errors import as_float, checked_type, error_message
from ..guidance import GuidedModel, Model
from ..noise.generators import Generators, draw
from ..philox import Purpose, as_seeds
from ..row_layout import compute_dtype
from ..samplers import BaseSampler
from ..sampling.stepper import Stepper
from ..schedules.levels import Level, Levels
from ..solvers import Prediction, ddim
from ..solvers.affine import MODEL_OUTPUT, SAMPLE
from ..solvers.table import Row, StepTable

#: Halvings of an interval of log σ̂ of at most 80 that leave less than 2⁻⁵³ of it.
_HALVINGS = 60


@dataclass(frozen=True)
class Process:
    """The levels of a whole loop, and the solver and prediction that compile any part of them.

    Args:
        levels: from noise to the clean sample.
        solver: a function ``(levels, prediction)`` that returns a `StepTable`; DDIM unless given.
        prediction: how the model's output is read.
    """

    levels: Levels
    solver: Callable[[Levels, Prediction], StepTable] = ddim
    prediction: Prediction = field(default_factory=Prediction)

    @classmethod
    def of(cls, process: Process | BaseSampler) -> Process:
        """Return the process of a sampler, with its number of steps and all its options; a process as it is.

        Raises:
            TypeError: it is neither.
        """
        if isinstance(process, Process):
            return process
        remedy = "make one with fastdiff.create_sampler(...)"
        checked_type("editing", "process", process, BaseSampler, "a sampler or a Process", remedy)
        return cls(process.levels(process.config.num_inference_steps), process._solve, process._prediction())

    def table(self, first: int = 0) -> StepTable:
        """Compile the table of the loop that starts at level `first`: higher orders start anew there."""
        levels = self.levels if first == 0 else replace(self.levels, points=self.levels.points[first:])
        return self.solver(levels, self.prediction)

    def first_level(self, strength: float) -> int:
        """Return the index of the level that so large a part of the loop starts at, from the end.

        Args:
            strength: 0 to 1; ``int(strength·n)`` of n steps are taken, as in diffusers' image-to-image pipelines.

        Raises:
            TypeError, ValueError: it is no number from 0 to 1.
        """
        value = as_float("editing", "strength", strength)
        if not 0.0 <= value <= 1.0:
            remedy = "take 1 for the whole loop, less to keep more"
            raise ValueError(error_message("editing", "strength", f"is {strength}", "a number from 0 to 1", remedy))
        return len(self.levels) - min(int(len(self.levels) * value), len(self.levels))

    def level_at(self, timestep: float) -> Level:
        """Return the level of a timestep that a table of this process visits, between those of `levels` too."""
        for point in self.levels.points[:-1]:
            if point.timestep == timestep:
                return point
        low, high = -40.0, 40.0  # log σ̂, in which timesteps ascend
        for _ in range(_HALVINGS):
            middle = 0.5 * (low + high)
            low, high = (middle, high) if self.levels.locate(math.exp(middle)).timestep < timestep else (low, middle)
        return self.levels.locate(math.exp(high))

    def reached(self, table: StepTable) -> list[tuple[float, float]]:
        """Return α and σ of the level that each row of a table reaches: that of the next model call, or the end."""
        levels = [self.level_at(timestep) for timestep in table.timesteps[1:]] + [self.levels.points[-1]]
        return [(level.alpha, level.sigma) for level in levels]


def noised(image: Tensor, noise: Tensor, level: Level, *, backend: str | None = None) -> Tensor:
    """Return α·image + σ·noise, in one pass.

    Args:
        image: x0, ``[B, ...]``, any of the four dtypes, which the result has.
        noise: ε, like `image`.
        level: where.
        backend: forces one, as in `fastdiff.ops.step`.
    """
    row = Row(level.timestep, level.alpha * SAMPLE + level.sigma * MODEL_OUTPUT, (0.0, 0.0))
    table = StepTable((row,)).coefficients_as(compute_dtype(image.dtype, noise.dtype), image.device)
    return ops.step(image, noise, table, 0, backend=backend)[0]


def noise_for(
    image: Tensor, noise: Tensor | None, seeds: int | Sequence[int] | Tensor | None, generator: Generators
) -> tuple[Tensor, Tensor | None]:
    """Return the noise of an edit, given or drawn like the image, and its seeds as a tensor.

    Raises:
        TypeError, ValueError: the image or the noise does not fit, or there are two sources of noise.
    """
    remedy = "pass images as [B, ...]"
    checked_type("editing", "image", image, Tensor, "a tensor [B, ...]", remedy)
    if image.dim() == 0 or not image.is_floating_point():
        got = f"has dtype {image.dtype} and {image.dim()} dimensions"
        raise TypeError(error_message("editing", "image", got, "a floating-point tensor [B, ...]", remedy))
    if seeds is not None and generator is not None:
        raise ValueError(
            error_message("editing", "generator", "is given beside seeds", "one source of noise", "leave out one")
        )
    keys = None if seeds is None else as_seeds(seeds, image.shape[0], image.device)
    if noise is None:
        if keys is None:
            return draw(image.shape, generator, dtype=image.dtype, device=image.device), None
        purpose = Purpose.LATENTS
        return ops.randn(image.shape, keys, purpose=purpose, dtype=image.dtype, device=image.device), keys
    checked_type("editing", "noise", noise, Tensor, "a tensor like image", "draw it with torch.randn_like(image)")
    if noise.shape != image.shape or noise.device != image.device:
        got = f"has shape {list(noise.shape)} on {noise.device}"
        expected = f"{list(image.shape)} on {image.device} like image"
        raise ValueError(error_message("editing", "noise", got, expected, "draw it with torch.randn_like(image)"))
    return noise, keys


def guided(model: Model | GuidedModel) -> GuidedModel:
    """Return a model with its conditions; a plain callable has none."""
    return model if isinstance(model, GuidedModel) else GuidedModel(model)


#: Called with the index of a row and the samples after its step; returns samples to go on with, or None.
AfterStep = Callable[[int, Tensor], Tensor | None]


def walk(
    stepper: Stepper,
    model: GuidedModel,
    sample: Tensor,
    *,
    mask: Tensor | None = None,
    generator: Generators = None,
    after_step: AfterStep | None = None,
) -> Tensor:
    """Take all steps of a stepper; the samples are written over.

    Args:
        stepper: over a table whose first level the samples are at.
        model: the model with its conditions.
        sample: ``[B, ...]``, dense; the loop's own.
        mask: of every step, for a stepper with a target.
        generator: of noise that the steps add, where the stepper has no seeds.
        after_step: called after each step.
    """
    scale = model.guidance_scale if model.guided else None
    timesteps = timesteps_of(stepper.table.timesteps, sample.device)
    prepared = model.prepare(sample)
    last = len(timesteps) - 1
    for index in range(len(timesteps)):
        output, uncond, variance = model(sample, timesteps[index], prepared)
        sample = stepper.step(
            sample,
            output,
            uncond=uncond,
            guidance_scale=scale,
            variance=variance,
            mask=mask,
            generator=generator,
            out=None if output is sample else sample,
            model_input=None if index == last or after_step is not None else prepared,
        )
        if after_step is not None:
            changed = after_step(index, sample)
            sample = sample if changed is None else changed
            prepared = model.prepare(sample)
    return sample


def timesteps_of(values: Sequence[float], device: torch.device) -> Tensor:
    """Return the model's time arguments: int64 where all are whole, else float32."""
    whole = all(float(value).is_integer() for value in values)
    numbers = torch.tensor(values, dtype=torch.float64, device="cpu")
    return numbers.to(torch.int64 if whole else torch.float32).to(device)
