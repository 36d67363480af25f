# SPDX-License-Identifier: MIT
"""One object for schedule, sampler and loop."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from ..errors import checked_type
from ..guidance import Model
from ..sampling.config import SamplingConfig, SamplingMethod
from ..sampling.loop import SamplingResult
from ..schedules import NoiseSchedulerConfig, NoiseScheduleType, create_noise_scheduler
from .samplers import SAMPLERS, BaseSampler, check_fields, split_fields


class AdvancedSamplingManager:
    """Holds a noise scheduler and a sampler, made from their configurations, and samples with them.

    Args:
        scheduler_config: the training noise schedule; the defaults where None.
        sampling_config: how to sample; the defaults where None.

    Raises:
        TypeError, ValueError: a configuration that cannot be compiled.
    """

    def __init__(
        self, scheduler_config: NoiseSchedulerConfig | None = None, sampling_config: SamplingConfig | None = None
    ) -> None:
        for name, config, kind in (
            ("scheduler_config", scheduler_config, NoiseSchedulerConfig),
            ("sampling_config", sampling_config, SamplingConfig),
        ):
            if config is not None:
                remedy = f"pass {kind.__name__}(...)"
                checked_type("AdvancedSamplingManager", name, config, kind, f"a {kind.__name__} or None", remedy)
        self.scheduler = create_noise_scheduler(scheduler_config or NoiseSchedulerConfig())
        self.sampler = self._make_sampler(sampling_config or SamplingConfig())

    def _make_sampler(self, config: SamplingConfig) -> BaseSampler:
        return SAMPLERS[SamplingMethod.parse(config.method)](self.scheduler, config)

    @property
    def scheduler_config(self) -> NoiseSchedulerConfig:
        return self.scheduler.config

    @property
    def sampling_config(self) -> SamplingConfig:
        return self.sampler.config

    @property
    def timesteps(self) -> Tensor:
        """The model's time arguments, one a model call."""
        return self.sampler.timesteps

    def configure(self, **fields: Any) -> None:
        """Change fields of the sampling configuration, the method too; on an error nothing changes."""
        check_fields("configure", fields, SamplingConfig)
        self.sampler = self._make_sampler(replace(self.sampling_config, **fields))

    def get_info(self) -> dict[str, Any]:
        """The schedule's facts and the sampler's: its method, model calls and first and last timesteps."""
        timesteps = self.sampler.table.timesteps
        return {
            **self.scheduler.get_schedule_info(),
            "method": SamplingMethod.parse(self.sampling_config.method).value,
            "num_inference_steps": self.sampling_config.num_inference_steps,
            "model_calls": len(timesteps),
            "timesteps_range": (timesteps[-1], timesteps[0]),
        }

    def sample(
        self,
        model: Model,
        latents: Tensor,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        **options: Any,
    ) -> SamplingResult:
        """Run the loop; arguments and errors as `fastdiff.samplers.BaseSampler.sample`."""
        return self.sampler.sample(model, latents, prompt_embeds, negative_prompt_embeds, **options)


def create_advanced_sampling_manager(
    schedule_type: str | NoiseScheduleType = "linear", method: str | SamplingMethod = "ddim", **fields: Any
) -> AdvancedSamplingManager:
    """Make a manager from names and fields of both configurations, which are distinguished by name.

    Raises:
        ValueError: an unknown name or field, or a value out of range.
    """
    schedule, sampling = split_fields("create_advanced_sampling_manager", fields)
    scheduler_config = NoiseSchedulerConfig(schedule_type=schedule_type, **schedule)
    return AdvancedSamplingManager(scheduler_config, SamplingConfig(method=method, **sampling))
