# SPDX-License-Identifier: MIT
"""One object for schedule, sampler and loop."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from ..errors import checked_type, error_message
from ..guidance import Model
from ..noise.generators import generator_states, restore_generators
from ..sampling.config import SamplingConfig, SamplingMethod
from ..sampling.loop import SamplingResult
from ..sampling.stream import SampleStream
from ..schedules import NoiseSchedulerConfig, NoiseScheduleType, create_noise_scheduler
from .samplers import SAMPLERS, BaseSampler, check_fields, split_fields, with_prediction_type


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

    def stream(
        self,
        model: Model,
        latents: Tensor,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        **options: Any,
    ) -> SampleStream:
        """Return the loop as an iterator; arguments and errors as `fastdiff.samplers.BaseSampler.stream`."""
        return self.sampler.stream(model, latents, prompt_embeds, negative_prompt_embeds, **options)

    def compare_sampling_methods(
        self,
        model: Model,
        latents: Tensor,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        methods: Sequence[SamplingMethod | str] | None = None,
        **options: Any,
    ) -> dict[SamplingMethod, SamplingResult]:
        """Sample with several methods from the same latents and the same noise.

        Each method has the manager's configuration but for the method itself, and the generators in the state in which
        the first one finds them.

        Args:
            model, latents, prompt_embeds, negative_prompt_embeds: of all loops, as in `sample`.
            methods: members of `SamplingMethod` or their names; None for all.
            options: other arguments of `sample`, of all loops.

        Returns:
            A result a method, in the order of `methods`; found by member and by name, ``results["ddim"]``.  A loop that
            Ctrl-C or a callback has stopped is the last.

        Raises:
            TypeError, ValueError: an unknown method, before any loop; and as `sample`.
        """
        if isinstance(methods, str):
            got, remedy = f"is {methods!r}", "pass a list of methods"
            raise TypeError(error_message("compare_sampling_methods", "methods", got, "a list", remedy))
        chosen = [SamplingMethod.parse(method) for method in (SamplingMethod if methods is None else methods)]
        samplers = {method: self._make_sampler(replace(self.sampling_config, method=method)) for method in chosen}
        states = generator_states(options.get("generator"), getattr(latents, "device", None))
        results: dict[SamplingMethod, SamplingResult] = {}
        for method, sampler in samplers.items():
            restore_generators(states)
            results[method] = sampler.sample(model, latents, prompt_embeds, negative_prompt_embeds, **options)
            if not results[method].complete:
                break
        return results


def create_advanced_sampling_manager(
    schedule_type: str | NoiseScheduleType = "linear", method: str | SamplingMethod = SamplingMethod.DDPM, **fields: Any
) -> AdvancedSamplingManager:
    """Make a manager from names and fields of both configurations, which are distinguished by name.

    On a flow schedule the prediction type is ``flow_prediction`` where none is given.

    Raises:
        ValueError: an unknown name or field, or a value out of range.
    """
    schedule, sampling = split_fields("create_advanced_sampling_manager", fields)
    scheduler_config = NoiseSchedulerConfig(schedule_type=schedule_type, **schedule)
    sampling = with_prediction_type(scheduler_config, sampling)
    return AdvancedSamplingManager(scheduler_config, SamplingConfig(method=method, **sampling))
