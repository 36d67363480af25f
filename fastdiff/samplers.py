# SPDX-License-Identifier: MIT
"""Samplers: a noise schedule, a configuration and a model in, samples out.

A sampler compiles its table when it is made and again in `set_timesteps`; `sample` walks it with a
stepper of its own.  So a sampler can be shared: a loop that fails or stops leaves nothing behind in it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from .errors import sentence, unknown_name
from .guidance import GuidedModel, Model
from .levels import Levels, VariancePreservingPath, levels_from_sigmas, levels_from_timesteps
from .loop import Callback, SamplingResult, check_latents, run_loop
from .philox import as_seeds
from .rng import Generators, generator_states
from .sampling_config import SamplingConfig, SamplingMethod, check_guidance_scale
from .schedules import BaseNoiseScheduler, NoiseSchedulerConfig, create_noise_scheduler
from .solvers import Churn, Prediction, ddim, ddpm, dpm_multistep, dpm_singlestep, euler, euler_ancestral, heun
from .stepper import Stepper
from .table import StepTable, Variance
from .timesteps import sigma_schedule, timestep_schedule


class BaseSampler(ABC):
    """A noise scheduler and a configuration, compiled to a step table.

    Args:
        scheduler: the training noise schedule.
        config: how to sample; its method must be the class's own.
        fields: fields of `SamplingConfig`, which take precedence over `config`.

    Raises:
        TypeError, ValueError: a configuration that cannot be compiled; the message names the field.
    """

    method: ClassVar[SamplingMethod]

    def __init__(self, scheduler: BaseNoiseScheduler, config: SamplingConfig | None = None, **fields: Any) -> None:
        if not isinstance(scheduler, BaseNoiseScheduler):
            raise TypeError(
                sentence(
                    type(self).__name__,
                    "scheduler",
                    f"is a {type(scheduler).__name__}",
                    "a noise scheduler",
                    "make one with create_noise_scheduler",
                )
            )
        check_fields(type(self).__name__, fields, SamplingConfig)
        self.scheduler = scheduler
        config = replace(config, **fields) if config else SamplingConfig(**{"method": self.method, **fields})
        if config.method is not self.method:
            raise ValueError(
                sentence(
                    type(self).__name__,
                    "method",
                    f"is {SamplingMethod.parse(config.method).value!r}",
                    repr(self.method.value),
                    "use create_sampler to choose the class by method",
                )
            )
        self.config = config
        self.table = self._compile(config.num_inference_steps)

    @abstractmethod
    def _solve(self, levels: Levels, prediction: Prediction) -> StepTable:
        """Compile the table of this sampler for the given levels."""

    def _compile(self, num_inference_steps: int) -> StepTable:
        return self._solve(self.levels(num_inference_steps), self._prediction())

    def _prediction(self) -> Prediction:
        schedule, config = self.scheduler.config, self.config
        clip = schedule.clip_sample_range if schedule.clip_sample and not config.thresholding else float("inf")
        return Prediction(config.prediction_type, clip, config.thresholding)  # type: ignore[arg-type]

    def levels(self, num_inference_steps: int) -> Levels:
        """The noise levels that a loop of so many steps visits.

        Raises:
            ValueError: fewer than 1 step, or more than the schedule has timesteps.
        """
        schedule, config = self.scheduler.config, self.config
        alphas_cumprod = self.scheduler.alphas_cumprod
        spacing = config.noise_spacing
        if spacing is not None:
            # The same bounds on the number of steps as timesteps have; which ones they would be does not matter.
            timestep_schedule("linspace", num_inference_steps, len(alphas_cumprod))
            low, high = VariancePreservingPath(alphas_cumprod).ratio_range
            sigmas = sigma_schedule(spacing, num_inference_steps, low, high).tolist()
            self._check_end(0.0)
            return levels_from_sigmas(alphas_cumprod, sigmas)
        timesteps = timestep_schedule(
            schedule.timestep_spacing, num_inference_steps, len(alphas_cumprod), schedule.steps_offset
        ).tolist()
        self._check_end(timesteps[-1])
        final = 1.0 if config.set_alpha_to_one else float(alphas_cumprod[0])
        return levels_from_timesteps(alphas_cumprod, timesteps, final_alpha_cumprod=final)

    def _check_end(self, last_timestep: float) -> None:
        """With `set_alpha_to_one=False` a loop ends at timestep 0, so its last model call must lie above it."""
        if not self.config.set_alpha_to_one and last_timestep == 0:
            raise ValueError(
                sentence(
                    type(self).__name__,
                    "set_alpha_to_one",
                    "is False, and the last timestep is 0 already",
                    "a last timestep above the one where the loop ends",
                    "set steps_offset=1 with leading timesteps, or leave set_alpha_to_one at True",
                )
            )

    def set_timesteps(self, num_inference_steps: int) -> None:
        """Compile the table again for another number of steps; on an error the sampler stays as it was."""
        config = replace(self.config, num_inference_steps=num_inference_steps)
        self.table = self._compile(num_inference_steps)
        self.config = config

    @property
    def timesteps(self) -> Tensor:
        """What the model is told, one a model call: int64 where all are whole, else float32."""
        values = torch.tensor(self.table.timesteps, dtype=torch.float64)
        whole = bool((values == values.round()).all())
        return values.to(torch.int64 if whole else torch.float32)

    @property
    def init_noise_sigma(self) -> float:
        """The standard deviation of the first sample; samples stay in the model's coordinates, so 1 as a rule."""
        return self.table.initial_scale

    def stepper(self, backend: str | None = None, *, seeds: int | Sequence[int] | Tensor | None = None) -> Stepper:
        """A fresh walk over the table, for a loop of one's own; `seeds` as in `sample`."""
        return Stepper(
            self.table,
            dynamic_thresholding_ratio=self.config.dynamic_thresholding_ratio,
            sample_max_value=self.scheduler.config.sample_max_value,
            seeds=seeds,
            backend=backend,
        )

    @torch.no_grad()
    def sample(
        self,
        model: Model,
        latents: Tensor,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        *,
        guidance_scale: float | None = None,
        generator: Generators = None,
        seeds: int | Sequence[int] | Tensor | None = None,
        callback: Callback | None = None,
        progress: bool | None = None,
        check_finite: bool | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
        model_dtype: torch.dtype | None = None,
        backend: str | None = None,
    ) -> SamplingResult:
        """Run the whole loop.

        Args:
            model: any callable ``(x, t)`` or ``(x, t, encoder_hidden_states)`` that returns a tensor, a tuple, a dict
                with "sample" or an object with ``.sample``; t has shape ``[B]``.
            latents: standard normal noise, ``[B, ...]``, any floating dtype and strides.  It is not written to.
            prompt_embeds: the condition, ``[B, ...]`` of any dtype (class labels, embeddings), or None.
            negative_prompt_embeds: the condition of the unconditional call of guidance, like `prompt_embeds`.
            guidance_scale: instead of the configuration's.
            generator: of the noise that stochastic samplers add: one, or one a sample.
            seeds: instead of a generator, a seed for each sample (see `fastdiff.randn`): the step draws the noise
                itself, several times faster, and a sample comes out the same alone or in any batch.  Latents of the
                same kind are ``fastdiff.randn(shape, seeds)``.
            callback: called with a `StepInfo` after each step; returning False stops the loop.
            progress: show a progress bar; None shows it where tqdm is installed.
            check_finite: look at every model output for NaN and infinity.  None: on the CPU; on a GPU looking is a
                host sync.  The finished samples are always looked at.
            model_kwargs: passed on with every model call.
            model_dtype: what the model is called in, the latents' own where None: a half model may so work on
                latents in float32.  Its input is written by the step, with no conversion of its own.
            backend: forces one, as in `fastdiff.ops.step`.

        Raises:
            TypeError, ValueError: the latents, the conditions or what the model returned do not fit.  The sampler,
                the latents and the generators are then as they were.
        """
        check_latents(latents)
        if seeds is not None:
            if generator is not None:
                raise ValueError(
                    sentence("sample", "generator", "is given beside seeds", "one source of noise", "leave out one")
                )
            seeds = as_seeds(seeds, latents.shape[0], latents.device)
        config = self.config
        if guidance_scale is None:
            guidance_scale = config.guidance_scale
        check_guidance_scale("sample", guidance_scale)
        guided = GuidedModel(
            model,
            prompt_embeds,
            negative_prompt_embeds,
            guidance_scale,
            config.guidance_mode,  # type: ignore[arg-type]
            channels=1 if self.table.variance is Variance.FIXED else 2,
            check_finite=latents.device.type == "cpu" if check_finite is None else check_finite,
            model_kwargs=model_kwargs or {},
            model_dtype=model_dtype,
        )
        states = generator_states(generator)
        try:
            return run_loop(
                guided,
                self.stepper(backend, seeds=seeds),
                self.timesteps,
                latents,
                generator=generator,
                callback=callback,
                progress=progress,
            )
        except BaseException:
            for one, state in states:
                one.set_state(state)
            raise


class DDPMSampler(BaseSampler):
    """Ancestral sampling of DDPM (arXiv 2006.11239); `variance_type` chooses its noise."""

    method = SamplingMethod.DDPM

    def _solve(self, levels: Levels, prediction: Prediction) -> StepTable:
        return ddpm(levels, prediction, variance_type=self.config.variance_type)


class DDIMSampler(BaseSampler):
    """DDIM (arXiv 2010.02502), deterministic unless `eta` is set."""

    method = SamplingMethod.DDIM

    def _solve(self, levels: Levels, prediction: Prediction) -> StepTable:
        clipped = self.config.use_clipped_model_output
        return ddim(levels, prediction, eta=self.config.eta or 0.0, use_clipped_model_output=clipped)


class DPMSolverSampler(BaseSampler):
    """DPM-Solver and DPM-Solver++ (arXiv 2206.00927, 2211.01095): all orders, both modes, ODE and SDE."""

    method = SamplingMethod.DPM_SOLVER

    def _solve(self, levels: Levels, prediction: Prediction) -> StepTable:
        config = self.config
        if config.solver_mode == "singlestep":
            return dpm_singlestep(
                levels,
                prediction,
                algorithm_type=config.algorithm_type,
                solver_order=config.solver_order,
                solver_type=config.solver_type,
            )
        return dpm_multistep(
            levels,
            prediction,
            algorithm_type=config.algorithm_type,
            solver_order=config.solver_order,
            solver_type=config.solver_type,
            lower_order_final=config.lower_order_final,
            euler_at_final=config.euler_at_final,
            third_order=config.third_order,
        )


class EulerSampler(BaseSampler):
    """Euler's method in σ/α, with churn where `s_churn` is set (arXiv 2206.00364)."""

    method = SamplingMethod.EULER

    def _solve(self, levels: Levels, prediction: Prediction) -> StepTable:
        return euler(levels, prediction, churn=_churn(self.config))


class EulerAncestralSampler(BaseSampler):
    """Euler steps with ancestral noise; `eta` (1 unless set) says how much."""

    method = SamplingMethod.EULER_ANCESTRAL

    def _solve(self, levels: Levels, prediction: Prediction) -> StepTable:
        eta = 1.0 if self.config.eta is None else self.config.eta
        return euler_ancestral(levels, prediction, eta=eta, s_noise=self.config.s_noise)


class HeunSampler(BaseSampler):
    """Heun's method in σ/α (arXiv 2206.00364): two model calls a step, one in the last."""

    method = SamplingMethod.HEUN

    def _solve(self, levels: Levels, prediction: Prediction) -> StepTable:
        return heun(levels, prediction, churn=_churn(self.config))


SAMPLERS: dict[SamplingMethod, type[BaseSampler]] = {
    cls.method: cls
    for cls in (DDPMSampler, DDIMSampler, DPMSolverSampler, EulerSampler, EulerAncestralSampler, HeunSampler)
}


def create_sampler(
    schedule_type: str | NoiseSchedulerConfig | BaseNoiseScheduler, method: str | SamplingMethod, **fields: Any
) -> BaseSampler:
    """A sampler for a kind of noise schedule and a method.

    Args:
        schedule_type: a name of `NoiseScheduleType`, a configuration, or a scheduler.
        method: a `SamplingMethod` or its name.
        fields: fields of `NoiseSchedulerConfig` and `SamplingConfig`, told apart by name.

    Raises:
        ValueError: an unknown name or field, or a value out of range.
    """
    chosen = SamplingMethod.parse(method)
    schedule_fields, sampling_fields = split_fields("create_sampler", fields)
    if isinstance(schedule_type, BaseNoiseScheduler):
        check_fields("create_sampler", schedule_fields, SamplingConfig)
        scheduler = schedule_type
    else:
        scheduler = create_noise_scheduler(schedule_type, **schedule_fields)
    return SAMPLERS[chosen](scheduler, SamplingConfig(method=chosen, **sampling_fields))


def split_fields(operation: str, given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Tell fields of the noise scheduler from fields of the sampler."""
    of_schedule = {field.name for field in fields(NoiseSchedulerConfig)}
    of_sampling = {field.name for field in fields(SamplingConfig)}
    for name in given:
        if name not in of_schedule | of_sampling:
            raise unknown_name(operation, "field", name, of_schedule | of_sampling)
    schedule = {name: value for name, value in given.items() if name in of_schedule}
    return schedule, {name: value for name, value in given.items() if name in of_sampling}


def check_fields(operation: str, given: Mapping[str, Any], config: type[Any]) -> None:
    """Refuse fields that a configuration does not have."""
    known = [field.name for field in fields(config)]
    for name in given:
        if name not in known:
            raise unknown_name(operation, "field", name, known)


def _churn(config: SamplingConfig) -> Churn:
    return Churn(config.s_churn, config.s_tmin, config.s_tmax, config.s_noise)
