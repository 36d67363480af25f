# SPDX-License-Identifier: MIT
"""The noise schedule and the sampler of a `DiffusionConfig`, called as diffusers' schedulers are.

`AdvancedScheduler` is for loops of one's own, `DiffusionScheduler` belongs to `DiffusionModel`.  They differ in what
`add_noise` returns: the noisy samples, or these and the noise.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import ops
from ...errors import checked_type, error_message
from ...noise.generators import Generators, draw
from ...samplers import BaseSampler
from ...schedules import create_noise_scheduler
from ...schedules.betas import check_floating
from ...solvers import SamplingMethod
from ..config import DiffusionConfig
from .sampling import configured_sampler

__all__ = ["AdvancedScheduler", "DiffusionScheduler", "StepOutput"]


class StepOutput(NamedTuple):
    """What a step returns.

    Attributes:
        prev_sample: the sample at the next visited timestep, like the sample that was given.
    """

    prev_sample: Tensor


class ConfiguredScheduler:
    """The schedule of a configuration, and DDIM steps over it with the configuration's `eta` (1 is DDPM).

    Samples stay in the model's coordinates, x = α·x0 + σ·ε.  `set_timesteps` chooses the visited timesteps; before it
    every training timestep is visited.

    Args:
        config: it is settled here; later changes of it do not reach the scheduler.

    Attributes:
        config: the settled configuration.
        schedule: the `fastdiff.schedules.BaseNoiseScheduler`; `fastdiff.ops.diffusion_loss` takes either.

    Raises:
        TypeError, ValueError: the configuration is refused by `DiffusionConfig.validate`.
    """

    def __init__(self, config: DiffusionConfig) -> None:
        operation = type(self).__name__
        checked_type(operation, "config", config, DiffusionConfig, "a DiffusionConfig", "pass DiffusionConfig(...)")
        self.config = config.validate()
        self.schedule = create_noise_scheduler(self.config.noise_scheduler_config())
        self.num_inference_steps: int | None = None
        self._device = torch.device("cpu")

    @property
    def num_train_timesteps(self) -> int:
        """T."""
        return self.schedule.num_train_timesteps

    @property
    def betas(self) -> Tensor:
        """β, float64 ``[T]`` on the CPU."""
        return self.schedule.betas

    @property
    def alphas_cumprod(self) -> Tensor:
        """ᾱ, float64 ``[T]`` on the CPU."""
        return self.schedule.alphas_cumprod

    @property
    def forward_scales(self) -> Tensor:
        """α and σ of the forward process, float64 ``[2, T]`` on the CPU."""
        return self.schedule.forward_scales

    @property
    def times(self) -> Tensor:
        """The times of a flow schedule; other schedules have no such attribute."""
        times: Tensor = self.schedule.times  # type: ignore[attr-defined]
        return times

    def sampler(
        self, method: str | SamplingMethod | None = None, num_inference_steps: int | None = None, **fields: Any
    ) -> BaseSampler:
        """Return a sampler over the schedule; arguments and errors as in `configured_sampler`."""
        return configured_sampler(self.config, self.schedule, method, num_inference_steps, **fields)

    @functools.cached_property
    def _sampler(self) -> BaseSampler:
        return self.sampler("ddim", self.num_train_timesteps)

    @functools.cached_property
    def timesteps(self) -> Tensor:
        """The visited timesteps, descending, int64 (float32 on a flow schedule)."""
        return self._sampler.timesteps.to(self._device)

    @functools.cached_property
    def _rows(self) -> dict[float, int]:
        """The rows of the visited timesteps, also as float32 rounds them in `timesteps`."""
        visited = self._sampler.table.timesteps, self._sampler.timesteps.tolist()
        return {t: row for timesteps in visited for row, t in enumerate(timesteps)}

    @property
    def init_noise_sigma(self) -> float:
        """The standard deviation of the first sample: 1 as a rule, since samples stay in the model's coordinates."""
        return self._sampler.init_noise_sigma

    def set_timesteps(self, num_inference_steps: int | None = None, device: torch.device | str | None = None) -> None:
        """Choose the timesteps to visit.

        Args:
            num_inference_steps: 1 to T; the configuration's where None.
            device: of `timesteps`; the CPU where None.

        Raises:
            TypeError, ValueError, RuntimeError: the number is out of range, or torch has no such device.  The scheduler
                stays as it was.
        """
        sampler = self.sampler("ddim", num_inference_steps)
        place = torch.device("cpu" if device is None else device)
        timesteps = sampler.timesteps.to(place)  # fails where there is no such device
        self._device, self.num_inference_steps = place, sampler.config.num_inference_steps
        self.__dict__.pop("_rows", None)
        self.__dict__.update(_sampler=sampler, timesteps=timesteps)

    def scale_model_input(self, sample: Tensor, timestep: Tensor | float | None = None) -> Tensor:
        """Return the sample: a model takes it as it is."""
        return sample

    def get_velocity(self, x_start: Tensor, noise: Tensor, timesteps: Tensor | int) -> Tensor:
        """Return the target of v-prediction, α·ε − σ·x0; on a flow schedule ε − x0.

        Args:
            x_start: x0 ``[B, ...]``.
            noise: ε, like `x_start`.
            timesteps: integers, one or ``[B]``.

        Raises:
            TypeError, ValueError: as `fastdiff.schedules.BaseNoiseScheduler.get_velocity`.
        """
        return self.schedule.get_velocity(x_start, noise, timesteps)

    def _noised(
        self, samples: Tensor, timesteps: Tensor | int, noise: Tensor | None, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor]:
        return self.schedule.q_sample(samples, timesteps, noise, generator)

    def step(
        self,
        model_output: Tensor,
        timestep: Tensor | float,
        sample: Tensor,
        *,
        eta: float | None = None,
        generator: Generators = None,
    ) -> StepOutput:
        """Take the step from a visited timestep to the next visited one, in one pass.

        Args:
            model_output: the model's prediction ``[B, C, ...]``; with a learned variance ``[B, 2C, ...]``, whose second
                half a DDIM step does not use.
            timestep: an element of `timesteps`, which is found without a host sync, or its number.
            sample: x_t, ``[B, C, ...]``.
            eta: must be the configuration's where it is given; the table is compiled for it.
            generator: of the noise, one or one a sample, where eta is above 0.

        Returns:
            The previous sample, also under the name ``prev_sample``.

        Raises:
            TypeError, ValueError: a tensor does not fit, or the timestep is not visited.
        """
        operation = f"{type(self).__name__}.step"
        check_floating(operation, "sample", sample)
        check_floating(operation, "model_output", model_output)
        if eta is not None and eta != self.config.eta:
            got, remedy = f"is {eta}", "set config.eta and make the scheduler again"
            raise ValueError(error_message(operation, "eta", got, f"the configuration's {self.config.eta}", remedy))
        row, table = self._row(operation, timestep), self._sampler.table
        if self.config.learned_variance and model_output.dim() > 1 and model_output.shape[1] == 2 * sample.shape[1]:
            model_output = model_output.chunk(2, dim=1)[0]
        if model_output.shape != sample.shape:  # before noise is drawn
            got, expected = f"has shape {list(model_output.shape)}", f"{list(sample.shape)} like sample"
            raise ValueError(error_message(operation, "model_output", got, expected, "pass what the model returned"))
        noise = None
        if table.draws_noise[row]:
            noise = draw(sample.shape, generator, dtype=sample.dtype, device=sample.device)
        coefficients = table.shared_coefficients(sample.dtype, sample.device)
        return StepOutput(ops.step(sample, model_output, coefficients, row, noise=noise)[0])

    def _row(self, operation: str, timestep: Any) -> int:
        """Return the row of a visited timestep."""
        if isinstance(timestep, Tensor) and timestep.numel() == 1:
            own = self.timesteps
            if timestep.dtype == own.dtype and timestep.device == own.device:
                # An element of `timesteps` is a view of it: its place needs no reading.
                offset, size = timestep.data_ptr() - own.data_ptr(), own.element_size()
                if offset % size == 0 and 0 <= offset // size < len(own):
                    return offset // size
            timestep = timestep.item()
        if not isinstance(timestep, Hashable) or isinstance(timestep, Tensor) or timestep not in self._rows:
            got = f"has shape {list(timestep.shape)}" if isinstance(timestep, Tensor) else f"is {timestep!r}"
            expected, remedy = f"one of {len(self.timesteps)} visited timesteps", "take it from scheduler.timesteps"
            raise ValueError(error_message(operation, "timestep", got, expected, remedy))
        return self._rows[timestep]

    def __len__(self) -> int:
        return self.num_train_timesteps


class AdvancedScheduler(ConfiguredScheduler):
    """A scheduler whose `add_noise` returns the noisy samples alone.

    Arguments, attributes and errors are those of `ConfiguredScheduler`.
    """

    def add_noise(
        self,
        samples: Tensor,
        timesteps: Tensor | int,
        noise: Tensor | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Return noisy samples α·x0 + σ·ε.

        Args:
            samples: x0 ``[B, ...]``.
            timesteps: integers, one or ``[B]``.
            noise: ε, like `samples`; drawn where None.
            generator: of the drawn noise.

        Returns:
            ``[B, ...]``, like `samples`.

        Raises:
            TypeError, ValueError: as `fastdiff.schedules.BaseNoiseScheduler.q_sample`.
        """
        return self._noised(samples, timesteps, noise, generator)[0]


class DiffusionScheduler(ConfiguredScheduler):
    """A scheduler whose `add_noise` returns the noisy samples and the noise.

    Arguments, attributes and errors are those of `ConfiguredScheduler`.
    """

    def add_noise(
        self,
        samples: Tensor,
        timesteps: Tensor | int,
        noise: Tensor | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return noisy samples and their noise; arguments and errors as in `AdvancedScheduler.add_noise`."""
        return self._noised(samples, timesteps, noise, generator)
