# SPDX-License-Identifier: MIT
"""The base of all samplers: a noise schedule and a configuration, compiled to a table, and the loops over it.

A sampler compiles its table when it is made and again in `set_timesteps`; `sample` walks it with a new stepper, or
replays a captured loop.  A sampler can be shared: a loop that fails or stops leaves it unchanged.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..errors import checked_callable, checked_type, error_message, unknown_name
from ..graphs import CapturedLoop, GraphCache, check_can_capture, check_can_show, check_graph_options
from ..graphs.static_inputs import signature
from ..guidance import GuidedModel, Model
from ..noise.generators import Generators, generator_states
from ..ops import backend_for
from ..philox import as_seeds
from ..row_layout import Variance
from ..sampling.config import SamplingConfig, check_guidance_scale
from ..sampling.loop import Callback, SamplingResult, check_latents, finish, run_loop, start_measuring
from ..sampling.stepper import Stepper
from ..schedules import BaseNoiseScheduler
from ..schedules.levels import Levels, VariancePreservingPath, levels_from_sigmas, levels_from_timesteps
from ..schedules.timesteps import sigma_schedule, timestep_schedule
from ..solvers import Prediction, SamplingMethod
from ..solvers.table import StepTable


class BaseSampler:
    """A noise scheduler and a configuration, compiled to a step table; subclasses name their `method`.

    Args:
        scheduler: the training noise schedule.
        config: how to sample; its method must be the class's own.
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
        self.table = self._compile(config.num_inference_steps)
        self._graphs = GraphCache()

    def _solve(self, levels: Levels, prediction: Prediction) -> StepTable:
        """Compile the table of this sampler for the given levels."""
        entry = self.method.entry
        return entry.table(levels, prediction, **{name: getattr(self.config, name) for name in entry.options})

    def _compile(self, num_inference_steps: int) -> StepTable:
        return self._solve(self.levels(num_inference_steps), self._prediction())

    def _prediction(self) -> Prediction:
        schedule, config = self.scheduler.config, self.config
        clip = schedule.clip_sample_range if schedule.clip_sample and not config.thresholding else float("inf")
        return Prediction(config.prediction_type, clip, config.thresholding, config.sigma_data)  # type: ignore[arg-type]

    def levels(self, num_inference_steps: int) -> Levels:
        """Return the noise levels that a loop of so many steps visits.

        Raises:
            ValueError: fewer than 1 step, or more than the schedule has timesteps.
        """
        schedule, config = self.scheduler.config, self.config
        alphas_cumprod = self.scheduler.alphas_cumprod
        spacing = config.noise_spacing
        if spacing is not None:
            # For the bounds on the number of steps, which are those of timesteps.
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

    def set_timesteps(self, num_inference_steps: int) -> None:
        """Compile the table again for another number of steps; on an error the sampler stays as it was.

        Loops that were captured for the one before are dropped.
        """
        config = replace(self.config, num_inference_steps=num_inference_steps)
        self.table = self._compile(num_inference_steps)
        self.config = config
        self.clear_graphs()

    @property
    def timesteps(self) -> Tensor:
        """The model's time argument, one a model call: int64 where all are whole, else float32."""
        whole = all(timestep.is_integer() for timestep in self.table.timesteps)
        # In one conversion from float64: int64 cannot be read from numbers that are no ints.
        values = torch.tensor(self.table.timesteps, dtype=torch.float64, device="cpu")
        return values.to(torch.int64 if whole else torch.float32)

    @property
    def init_noise_sigma(self) -> float:
        """The standard deviation of the first sample; samples stay in the model's coordinates, so 1 as a rule."""
        return self.table.initial_scale

    def stepper(self, backend: str | None = None, *, seeds: int | Sequence[int] | Tensor | None = None) -> Stepper:
        """Return a new stepper over the table, for a loop of one's own; `seeds` as in `sample`."""
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
        guidance_scale: float | Tensor | None = None,
        generator: Generators = None,
        seeds: int | Sequence[int] | Tensor | None = None,
        callback: Callback | None = None,
        progress: bool | None = None,
        check_finite: bool | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
        model_dtype: torch.dtype | None = None,
        backend: str | None = None,
        cuda_graph: bool | str = False,
    ) -> SamplingResult:
        """Run the whole loop.

        Args:
            model: any callable ``(x, t)`` or ``(x, t, encoder_hidden_states)`` that returns a tensor, a tuple, a dict
                with "sample" or an object with ``.sample``; t has shape ``[B]``.
            latents: standard normal noise, ``[B, ...]``, any floating dtype and strides.  It is not written to.
            prompt_embeds: the condition, ``[B, ...]`` of any dtype (class labels, embeddings), or None.
            negative_prompt_embeds: the condition of the unconditional call of guidance, like `prompt_embeds`.
            guidance_scale: instead of the configuration's; or a scale a sample, as in `fastdiff.ops.step`.
            generator: of the noise that stochastic samplers add: one, or one a sample.
            seeds: instead of a generator, a seed for each sample (see `fastdiff.randn`): the step draws the noise
                itself, several times faster, and a sample comes out the same alone or in any batch.  Latents of the
                same kind are ``fastdiff.randn(shape, seeds)``.
            callback: called with a `StepInfo` after each step.  It may edit ``info.sample`` in place or return a tensor
                like it, which becomes the samples: the loop continues from them.  Returning False stops the loop.
            progress: show a progress bar; None shows it where tqdm is installed.
            check_finite: look at every model output for NaN and infinity.  None: on the CPU; on a GPU looking is a
                host sync.  The finished samples are looked at too, unless it is False: the loop then has no host sync
                at all, and may return before a GPU has finished (see `SamplingResult`).
            model_kwargs: passed on with every model call.
            model_dtype: what the model is called in, the latents' own where None: a half model may so work on
                latents in float32.  Its input is written by the step, with no conversion of its own.
            backend: forces one, as in `fastdiff.ops.step`.
            cuda_graph: run the loop as a CUDA graph, captured at the first call and kept for later ones of the same
                form (docs/graphs.md): "loop" or True, all steps in one launch; "step", a launch a step.  Noise then
                comes from `seeds`; where there are none they are drawn from torch's default generator of the CPU.

        Raises:
            TypeError, ValueError: the latents, the conditions or what the model returned do not fit.  The sampler,
                the latents and the generators are then as they were.
            RuntimeError: the model does what a CUDA graph cannot hold.
        """
        check_latents(latents)
        if callback is not None:
            checked_callable("sample", "callback", callback, "a callable or None", "pass a function of a StepInfo")
        if seeds is not None:
            if generator is not None:
                raise ValueError(
                    error_message(
                        "sample", "generator", "is given beside seeds", "one source of noise", "leave out one"
                    )
                )
            seeds = as_seeds(seeds, latents.shape[0], latents.device)
        look = not cuda_graph and (latents.device.type == "cpu" if check_finite is None else check_finite)
        conditions = prompt_embeds, negative_prompt_embeds
        guided = self._guided(model, *conditions, guidance_scale, model_kwargs, model_dtype, check_finite=look)
        if cuda_graph:
            mode = "loop" if cuda_graph is True else cuda_graph
            check_graph_options(generator, check_finite)
            check_can_show(mode, callback, progress)
            loop = self._kept_loop(guided, latents, mode, backend)
            stopwatch = start_measuring(latents.device)
            with stopwatch.part("loop"):
                samples, steps = loop.run(
                    latents,
                    *conditions,
                    guidance_scale=guided.guidance_scale,
                    seeds=seeds,
                    model_kwargs=model_kwargs,
                    callback=callback,
                    progress=progress,
                )
            return finish(samples, steps, stopwatch, check_finite is not False)
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
                check_finite=check_finite is not False,
            )
        except BaseException:
            for one, state in states:
                one.set_state(state)
            raise

    @torch.no_grad()
    def capture(
        self,
        model: Model,
        latents: Tensor,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        *,
        guidance_scale: float | Tensor | None = None,
        mode: str = "loop",
        model_kwargs: Mapping[str, Any] | None = None,
        model_dtype: torch.dtype | None = None,
        backend: str | None = None,
    ) -> CapturedLoop:
        """Capture the loop as a CUDA graph, to replay it with other inputs.

        Arguments are those of `sample`, `mode` being its cuda_graph.  The loop is the caller's: it holds the model, and
        later changes of the sampler do not reach it.

        Raises:
            TypeError, ValueError: an argument does not fit, or the latents are on no CUDA device.
            RuntimeError: the model does what a CUDA graph cannot hold.
        """
        check_latents(latents)
        conditions = prompt_embeds, negative_prompt_embeds
        guided = self._guided(model, *conditions, guidance_scale, model_kwargs, model_dtype, check_finite=False)
        return self._captured(guided, latents, mode, backend)

    def clear_graphs(self) -> None:
        """Drop the loops that `sample` has captured, and their memory."""
        self._graphs.clear()

    def _guided(
        self,
        model: Model,
        prompt_embeds: Tensor | None,
        negative_prompt_embeds: Tensor | None,
        guidance_scale: float | Tensor | None,
        model_kwargs: Mapping[str, Any] | None,
        model_dtype: torch.dtype | None,
        *,
        check_finite: bool,
    ) -> GuidedModel:
        if guidance_scale is None:
            guidance_scale = self.config.guidance_scale
        if not isinstance(guidance_scale, Tensor):
            check_guidance_scale("sample", guidance_scale)
        return GuidedModel(
            model,
            prompt_embeds,
            negative_prompt_embeds,
            guidance_scale,
            self.config.guidance_mode,  # type: ignore[arg-type]
            channels=1 if self.table.variance is Variance.FIXED else 2,
            check_finite=check_finite,
            model_kwargs={} if model_kwargs is None else model_kwargs,
            model_dtype=model_dtype,
        )

    def _captured(self, guided: GuidedModel, latents: Tensor, mode: str, backend: str | None) -> CapturedLoop:
        return CapturedLoop(
            guided,
            self.table,
            self.timesteps,
            latents,
            mode=mode,
            ratio=self.config.dynamic_thresholding_ratio,
            max_value=self.scheduler.config.sample_max_value,
            backend=backend,
        )

    def _kept_loop(self, guided: GuidedModel, latents: Tensor, mode: str, backend: str | None) -> CapturedLoop:
        check_can_capture(mode, latents)
        bounds = self.config.dynamic_thresholding_ratio, self.scheduler.config.sample_max_value
        fixed = mode, id(self.table), bounds, signature(latents), backend_for(latents, backend)
        return self._graphs.get(guided, fixed, lambda: self._captured(guided, latents, mode, backend))


def check_fields(operation: str, given: Mapping[str, Any], config: type[Any]) -> None:
    """Refuse fields that a configuration does not have."""
    known = [field.name for field in fields(config)]
    for name in given:
        if name not in known:
            raise unknown_name(operation, "field", name, known)
