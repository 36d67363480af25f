# SPDX-License-Identifier: MIT
"""A noise schedule and a configuration, compiled to a step table: everything of a sampler but its loops.

A sampler compiles its table when it is made and again in `set_timesteps`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..errors import checked_type, error_message, unknown_name
from ..graphs import GraphCache
from ..row_layout import compute_dtype
from ..sampling.config import SamplingConfig
from ..sampling.stepper import Stepper
from ..schedules import BaseNoiseScheduler
from ..schedules.betas import check_floating
from ..schedules.levels import Level, Levels
from ..schedules.timesteps import sigma_schedule, timestep_schedule
from ..solvers import Prediction, SamplingMethod
from ..solvers.table import StepTable
from .grid import Numbers, StepGrid, from_step, given_levels, numbers, step_grid

#: Says at DEBUG what runs where; never the numbers in a tensor.
LOG = logging.getLogger("fastdiff")

#: The method of a configuration that names none.
_USUAL_METHOD = SamplingConfig().method

#: The number of grids of other steps that a sampler keeps.
_GRIDS = 8


class CompiledSampler:
    """A noise scheduler and a configuration, compiled to a step table; subclasses name their `method`.

    Args:
        scheduler: the training noise schedule.
        config: how to sample.  The class decides the method: a config left at the default, DDPM, takes the class's
            own, and one that names yet another method is refused.
        fields: fields of `SamplingConfig`, which take precedence over `config`.

    Raises:
        TypeError, ValueError: a configuration that cannot be compiled; the message names the field.
    """

    method: ClassVar[SamplingMethod]

    def __init__(self, scheduler: BaseNoiseScheduler, config: SamplingConfig | None = None, **fields: Any) -> None:
        if not hasattr(self, "method"):
            raise TypeError(
                error_message(
                    type(self).__name__, "method", "is missing", "a SamplingMethod", "use create_sampler, or a subclass"
                )
            )
        if not isinstance(scheduler, BaseNoiseScheduler):
            raise TypeError(
                error_message(
                    type(self).__name__,
                    "scheduler",
                    f"is a {type(scheduler).__name__}",
                    "a noise scheduler",
                    "make one with create_noise_scheduler",
                )
            )
        check_fields(type(self).__name__, fields, SamplingConfig)
        if config is not None:
            remedy = "pass SamplingConfig(...), or its fields by name"
            checked_type(type(self).__name__, "config", config, SamplingConfig, "a SamplingConfig or None", remedy)
        self.scheduler = scheduler
        config = replace(config, **fields) if config else SamplingConfig(**{"method": self.method, **fields})
        if config.method is _USUAL_METHOD and "method" not in fields:
            config = replace(config, method=self.method)
        if config.method is not self.method:
            raise ValueError(
                error_message(
                    type(self).__name__,
                    "method",
                    f"is {SamplingMethod.parse(config.method).value!r}",
                    repr(self.method.value),
                    "use create_sampler to choose the class by method",
                )
            )
        self.config = config
        self._use(self._compile(self.levels(config.num_inference_steps)))
        self._device = torch.device("cpu")
        self._graphs = GraphCache()

    def _use(self, grid: StepGrid) -> None:
        """Make a compiled grid the sampler's own."""
        self._grid = grid
        self.table = grid.table
        self._other_grids: dict[tuple[Any, ...], StepGrid] = {}

    def _solve(self, levels: Levels, prediction: Prediction) -> StepTable:
        """Compile the table of this sampler for the given levels."""
        entry = self.method.entry
        return entry.table(levels, prediction, **self.config.options(entry.options))

    def _compile(self, levels: Levels, *, from_noise: bool = True) -> StepGrid:
        started = time.perf_counter()
        grid = step_grid(levels, self._solve(levels, self._prediction()), self.scheduler.path, from_noise=from_noise)
        if LOG.isEnabledFor(logging.DEBUG):
            spent = time.perf_counter() - started
            LOG.debug("%s: compiled %d rows in %.6f s", type(self).__name__, len(grid.table), spent)
        return grid

    def _grid_for(self, operation: str, timesteps: Numbers | None, sigmas: Numbers | None, start_step: int) -> StepGrid:
        """Return the sampler's own grid, or one for other levels, compiled once while the sampler keeps its own."""
        if timesteps is None and sigmas is None and type(start_step) is int and start_step == 0:
            return self._grid
        named = (("timesteps", timesteps), ("sigmas", sigmas))
        given = [None if values is None else numbers(operation, name, values) for name, values in named]
        key = *(None if values is None else tuple(values) for values in given), start_step
        grid = self._other_grids.get(key)
        if grid is None:
            levels = self._grid.levels
            if timesteps is not None or sigmas is not None:
                levels = self._given_levels(operation, *given)
            grid = self._compile(from_step(operation, levels, start_step), from_noise=False)
            while len(self._other_grids) >= _GRIDS:
                self._other_grids.pop(next(iter(self._other_grids)))
            self._other_grids[key] = grid
        return grid

    def _prediction(self) -> Prediction:
        schedule, config = self.scheduler.config, self.config
        clip = schedule.clip_sample_range if schedule.clip_sample and not config.thresholding else float("inf")
        return Prediction(config.prediction_type, clip, config.thresholding, config.sigma_data)  # type: ignore[arg-type]

    def levels(self, num_inference_steps: int) -> Levels:
        """Return the noise levels that a loop of so many steps visits.

        Raises:
            ValueError: fewer than 1 step, or more than the schedule has timesteps.
        """
        path, spacing = self.scheduler.path, self.config.noise_spacing
        if spacing is not None:
            # For the bounds on the number of steps, which are those of timesteps.
            timestep_schedule("linspace", num_inference_steps, self.scheduler.num_train_timesteps)
            low, high = path.ratio_range
            sigmas = sigma_schedule(spacing, num_inference_steps, low, high).tolist()
            self._check_end(0.0)
            points = tuple(path.at_ratio(float(sigma)) for sigma in (*sigmas, 0.0))
            return Levels(points, path.at_ratio, path.at_timestep)
        timesteps = self.scheduler.inference_timesteps(num_inference_steps)
        self._check_end(timesteps[-1])
        points = *(path.at_timestep(timestep) for timestep in timesteps), self._end
        return Levels(points, path.at_ratio, path.at_timestep)

    def _given_levels(self, operation: str, timesteps: Numbers | None, sigmas: Numbers | None) -> Levels:
        """Return the levels of timesteps or sigmas that a caller gives."""
        return given_levels(operation, self.scheduler.path, self._end, timesteps, sigmas)

    @property
    def _end(self) -> Level:
        """The level where a loop over timesteps ends."""
        path = self.scheduler.path
        return Level(0.0, 1.0, 0.0) if self.config.set_alpha_to_one else path.lowest

    def _check_end(self, last_timestep: float) -> None:
        """With `set_alpha_to_one=False` a loop ends at timestep 0, so its last model call must be above it."""
        if not self.config.set_alpha_to_one and last_timestep == 0:
            raise ValueError(
                error_message(
                    type(self).__name__,
                    "set_alpha_to_one",
                    "is False, and the last timestep is 0 already",
                    "a last timestep above the one where the loop ends",
                    "set steps_offset=1 with leading timesteps, or leave set_alpha_to_one at True",
                )
            )

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        *,
        timesteps: Numbers | None = None,
        sigmas: Numbers | None = None,
        start_step: int = 0,
        device: torch.device | str | None = None,
    ) -> None:
        """Compile the table again for other steps; on an error the sampler stays as it was.

        Loops that were captured for the steps before are dropped.

        Args:
            num_inference_steps: the number of steps, at the spacing of the configurations; it may be left out where the
                steps are given.
            timesteps: the model's time arguments, descending, whole or not, in place of a spacing.
            sigmas: the noise levels, descending: σ/α, or σ = t on a flow schedule.  A last 0 is the end of the loop.
            start_step: the first step that is taken, 0 to the number of steps − 1.  Latents are then the noisy sample
                at that step's level (see `add_noise`), which goes for given timesteps and sigmas as well.
            device: where `timesteps` is put; None leaves it where it is, at first on the CPU.

        Raises:
            TypeError, ValueError: no number and no steps, both kinds of steps, or steps that do not fit the schedule.
        """
        operation = "set_timesteps"
        placed = self._device if device is None else torch.device(device)
        if timesteps is None and sigmas is None:
            config = replace(self.config, num_inference_steps=num_inference_steps)  # type: ignore[arg-type]
            levels = self.levels(config.num_inference_steps)
        else:
            levels = self._given_levels(operation, timesteps, sigmas)
            if num_inference_steps not in (None, len(levels)):
                got, expected = f"is {num_inference_steps}", f"{len(levels)}, the number of steps given"
                raise ValueError(error_message(operation, "num_inference_steps", got, expected, "leave it out"))
            config = replace(self.config, num_inference_steps=len(levels))
        from_noise = timesteps is None and sigmas is None and start_step == 0
        grid = self._compile(from_step(operation, levels, start_step), from_noise=from_noise)
        self._use(grid)
        self.config = config
        self._device = placed
        self._graphs.clear()

    @property
    def timesteps(self) -> Tensor:
        """The model's time argument, one a model call: int64 where all are whole, else float32."""
        return self._grid.timesteps.to(self._device)

    @property
    def sigmas(self) -> Tensor:
        """The noise level of each model call and of the end, float64: σ/α, or σ = t on a flow schedule."""
        return torch.tensor(self._grid.sigmas, dtype=torch.float64, device="cpu").to(self._device)

    def add_noise(self, original_samples: Tensor, noise: Tensor, start_step: int = 0) -> Tensor:
        """Return the latents of a loop that starts at a step: α·x0 + σ·ε at that step's level.

        Args:
            original_samples: x0 ``[B, ...]``, any floating dtype.
            noise: ε, like `original_samples`.
            start_step: as in `sample`.

        Returns:
            ``[B, ...]``, rounded once to the dtype of the samples.

        Raises:
            TypeError, ValueError: the noise is not like the samples, or there is no such step.
        """
        check_floating("add_noise", "original_samples", original_samples)
        for what, got, wanted in (
            ("shape", list(noise.shape), list(original_samples.shape)),
            ("dtype", noise.dtype, original_samples.dtype),
            ("device", noise.device, original_samples.device),
        ):
            if got != wanted:
                raise ValueError(
                    error_message("add_noise", "noise", f"has {what} {got}", f"{wanted}", "draw it like the samples")
                )
        level = from_step("add_noise", self._grid.levels, start_step)[0]
        dtype = compute_dtype(original_samples.dtype)
        noisy = level.alpha * original_samples.to(dtype) + level.sigma * noise.to(dtype)
        return noisy.to(original_samples.dtype)

    @property
    def init_noise_sigma(self) -> float:
        """The standard deviation of the first sample; samples stay in the model's coordinates, so 1 as a rule."""
        return self.table.initial_scale

    def stepper(self, backend: str | None = None, *, seeds: int | Sequence[int] | Tensor | None = None) -> Stepper:
        """Return a new stepper over the table, for a loop of one's own; `seeds` as in `sample`."""
        return self._stepper(self.table, backend, seeds, self.config.guidance_rescale)

    def _stepper(self, table: StepTable, backend: str | None, seeds: Any, guidance_rescale: float) -> Stepper:
        return Stepper(
            table,
            dynamic_thresholding_ratio=self.config.dynamic_thresholding_ratio,
            sample_max_value=self.scheduler.config.sample_max_value,
            seeds=seeds,
            backend=backend,
            guidance_rescale=guidance_rescale,
        )


def check_fields(operation: str, given: Mapping[str, Any], config: type[Any]) -> None:
    """Refuse fields that a configuration does not have."""
    known = [field.name for field in fields(config)]
    for name in given:
        if name not in known:
            raise unknown_name(operation, "field", name, known)
