# SPDX-License-Identifier: MIT
"""The base of all samplers: the loops over a compiled table.

`sample` walks the table with a new stepper, or replays a captured loop.  A sampler can be shared: a loop that fails or
stops leaves it unchanged.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import checked_callable, error_message
from ..graphs import CapturedLoop, check_can_capture, check_can_show, check_graph_options
from ..graphs.static_inputs import signature
from ..guidance import Guidance, GuidedModel, MixedGuidance, Model, PlainGuidance
from ..guidance.gradients import Term
from ..noise.generators import Generators, GeneratorStates, generator_states, restore_generators
from ..ops import backend_for
from ..philox import as_seeds
from ..row_layout import Variance
from ..sampling.config import check_guidance_rescale, check_guidance_scale
from ..sampling.guided_run import Branch, GuidedRun
from ..sampling.guided_stepper import GuidedStepper
from ..sampling.interrupts import DeferredInterrupt
from ..sampling.loop import (
    Callback,
    SamplingLoop,
    SamplingResult,
    check_latents,
    finish,
    run_loop,
    start_measuring,
)
from ..sampling.model_mode import evaluating
from ..sampling.stream import SampleStream
from ..sampling.trajectory import frames_every
from .compiled import LOG, CompiledSampler, check_fields
from .grid import Numbers, StepGrid

__all__ = ["BaseSampler", "check_fields"]


class BaseSampler(CompiledSampler):
    """A compiled sampler with its loops; subclasses name their `method`.

    Arguments, fields and errors are those of `CompiledSampler`.
    """

    @torch.no_grad()
    def sample(
        self,
        model: Model,
        latents: Tensor,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        *,
        guidance_scale: float | Tensor | None = None,
        guidance_rescale: float | None = None,
        guidance: Guidance | MixedGuidance | None = None,
        guidance_terms: Sequence[Term] = (),
        branches: Mapping[str, Branch] | None = None,
        generator: Generators = None,
        seeds: int | Sequence[int] | Tensor | None = None,
        timesteps: Numbers | None = None,
        sigmas: Numbers | None = None,
        start_step: int = 0,
        callback: Callback | None = None,
        progress: bool | None = None,
        return_trajectory: bool | int = False,
        trajectory_device: torch.device | str | None = None,
        check_finite: bool | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
        model_dtype: torch.dtype | None = None,
        keep_mode: bool = False,
        backend: str | None = None,
        cuda_graph: bool | str = False,
    ) -> SamplingResult:
        """Run the whole loop.

        Ctrl-C ends the loop after the step that is under way; the result then has the samples of the steps taken and is
        not ``complete``, and the generators are put back, as where a callback stops the loop.  A second Ctrl-C during
        that step raises KeyboardInterrupt at once.  That holds in the main thread, for Python's own handler of Ctrl-C,
        and without `cuda_graph`.

        Args:
            model: any callable ``(x, t)`` or ``(x, t, encoder_hidden_states)`` that returns a tensor, a tuple, a dict
                with "sample" or an object with ``.sample``; t has shape ``[B]``.
            latents: standard normal noise, ``[B, ...]``, any floating dtype and strides.  It is not written to.  With
                `timesteps`, `sigmas` or `start_step`: the noisy sample at the first level (see `add_noise`).
            prompt_embeds: the condition, ``[B, ...]`` of any dtype (class labels, embeddings), or None, which means no
                guidance.
            negative_prompt_embeds: the condition of the unconditional call of guidance, like `prompt_embeds`.  None
                means zeros for embeddings, said once by a warning; labels have no such default.
            guidance_scale: instead of the configuration's; or a scale a sample, as in `fastdiff.ops.step`.
            guidance_rescale: instead of the configuration's.
            guidance: a method of `fastdiff.guidance`, or a `MixedGuidance` with one a sample; the method has its scale
                and rescaling.  Each step calls the model for the branches and samples that it needs.
            guidance_terms: gradients of a classifier or of a loss, in the same step.
            branches: what a method's branches other than ``cond`` and ``uncond`` are, by name: a condition like
                `prompt_embeds`, another model (called with `prompt_embeds`), or for ``reference`` a clean sample.
            generator: of the noise that stochastic samplers add: one, or one a sample.
            seeds: instead of a generator, a seed for each sample (see `fastdiff.randn`): the step draws the noise
                itself, several times faster, and a sample comes out the same alone or in any batch.  Latents of the
                same kind are ``fastdiff.randn(shape, seeds)``.
            timesteps, sigmas, start_step: other steps for this loop, as in `set_timesteps`; the sampler keeps its own.
            callback: called with a `StepInfo` after each step.  It may edit ``info.sample`` in place or return a tensor
                like it, which becomes the samples: the loop continues from them.  Returning False stops the loop.
            progress: show a progress bar; None shows it where tqdm is installed.
            return_trajectory: keep a frame every so many model calls, True for every one: ``result.trajectory``.  The
                memory of all frames is allocated before the loop.
            trajectory_device: where the frames are kept, for example "cpu"; None for the device of the latents.
            check_finite: look at every model output for NaN and infinity.  None: on the CPU; on a GPU looking is a
                host sync.  The finished samples are looked at too, unless it is False: the loop then has no host sync
                at all, and may return before a GPU has finished (see `SamplingResult`).
            model_kwargs: passed on with every model call.
            model_dtype: what the model is called in, the latents' own where None: a half model may so work on
                latents in float32.  Its input is written by the step, with no conversion of its own.
            keep_mode: leave a torch.nn.Module in the mode it is in; else it is in evaluation mode during the loop, and
                each of its modules is put back afterwards, also after an error.
            backend: forces one, as in `fastdiff.ops.step`.
            cuda_graph: run the loop as a CUDA graph, captured at the first call and kept for later ones of the same
                form (docs/graphs.md): "loop" or True, all steps in one launch; "step", a launch a step.  Noise then
                comes from `seeds`; where there are none they are drawn from torch's default generator of the CPU.

        Raises:
            TypeError, ValueError: the latents, the conditions or what the model returned do not fit.  The sampler,
                the latents and the generators are then as they were.
            RuntimeError: the model does what a CUDA graph cannot hold.
        """
        if callback is not None:
            checked_callable("sample", "callback", callback, "a callable or None", "pass a function of a StepInfo")
        seeds = checked_noise(latents, generator, seeds)
        every = frames_every(return_trajectory)
        grid = self._grid_for("sample", timesteps, sigmas, start_step)
        rescale = self._rescale(guidance_rescale)
        look = not cuda_graph and (latents.device.type == "cpu" if check_finite is None else check_finite)
        conditions = prompt_embeds, negative_prompt_embeds
        scale = _scale_of_model(guidance, prompt_embeds, guidance_scale)
        guided = self._guided(model, *conditions, scale, model_kwargs, model_dtype, check_finite=look)
        own = guidance, guidance_terms, branches
        run = self._guided_run(grid, guided, *own, rescale, seeds, backend)
        started = self._log_start(grid, guided, latents, generator, seeds, backend, cuda_graph)
        if cuda_graph:
            if run is not None:
                remedy = "leave cuda_graph out, or use guidance_scale"
                raise ValueError(error_message("sample", "guidance", "is given", "no method in a graph", remedy))
            mode = "loop" if cuda_graph is True else cuda_graph
            check_graph_options(generator, check_finite, every)
            check_can_show(mode, callback, progress)
            with evaluating(model, keep_mode):
                loop = self._kept_loop(guided, grid, latents, mode, backend, rescale)
                seeds = loop.drawn_seeds(seeds)
                stopwatch = start_measuring(latents.device)
                with stopwatch.part("loop"):
                    samples, steps = loop.run(
                        latents,
                        guided.prompt_embeds,
                        guided.negative_prompt_embeds,
                        guidance_scale=guided.guidance_scale,
                        seeds=seeds,
                        model_kwargs=model_kwargs,
                        callback=callback,
                        progress=progress,
                    )
                result = finish(
                    samples,
                    steps,
                    stopwatch,
                    check_finite is not False,
                    complete=steps == len(grid.table),
                    sigmas=grid.sigmas,
                    timesteps=grid.table.timesteps,
                    seeds=seeds,
                )
            _log_end(result, started)
            return result
        with DeferredInterrupt() as interrupt, evaluating(model, keep_mode):
            states = self._generator_states(grid, latents, generator, seeds)
            try:
                result = run_loop(
                    run or guided,
                    run or self._stepper(grid.table, backend, seeds, rescale),
                    grid.timesteps,
                    latents,
                    generator=generator,
                    callback=callback,
                    progress=progress,
                    check_finite=check_finite is not False,
                    sigmas=grid.sigmas,
                    every=every,
                    trajectory_device=trajectory_device,
                    seeds=seeds,
                    interrupt=interrupt,
                )
            except BaseException:
                restore_generators(states)
                raise
            if not result.complete:
                restore_generators(states)
        _log_end(result, started)
        return result

    @torch.no_grad()
    def stream(
        self,
        model: Model,
        latents: Tensor,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        *,
        guidance_scale: float | Tensor | None = None,
        guidance_rescale: float | None = None,
        guidance: Guidance | MixedGuidance | None = None,
        guidance_terms: Sequence[Term] = (),
        branches: Mapping[str, Branch] | None = None,
        generator: Generators = None,
        seeds: int | Sequence[int] | Tensor | None = None,
        timesteps: Numbers | None = None,
        sigmas: Numbers | None = None,
        start_step: int = 0,
        return_trajectory: bool | int = False,
        trajectory_device: torch.device | str | None = None,
        check_finite: bool | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
        model_dtype: torch.dtype | None = None,
        keep_mode: bool = False,
        backend: str | None = None,
    ) -> SampleStream:
        """Return the loop as an iterator of `StepInfo`, one a step, taken when it is asked for.

        Arguments and errors as in `sample`; they are checked here, and the first step is taken by the first ``next``.
        `SampleStream.result` gives the result of the steps taken.  Ctrl-C raises KeyboardInterrupt as usual: closing
        the stream puts the generators back.
        """
        seeds = checked_noise(latents, generator, seeds)
        grid = self._grid_for("stream", timesteps, sigmas, start_step)
        rescale = self._rescale(guidance_rescale)
        look = latents.device.type == "cpu" if check_finite is None else check_finite
        conditions = prompt_embeds, negative_prompt_embeds
        scale = _scale_of_model(guidance, prompt_embeds, guidance_scale)
        guided = self._guided(model, *conditions, scale, model_kwargs, model_dtype, check_finite=look)
        own = guidance, guidance_terms, branches
        run = self._guided_run(grid, guided, *own, rescale, seeds, backend)
        self._log_start(grid, guided, latents, generator, seeds, backend, False)
        loop = SamplingLoop(
            run or guided,
            run or self._stepper(grid.table, backend, seeds, rescale),
            grid.timesteps,
            latents,
            generator=generator,
            sigmas=grid.sigmas,
            watched=True,
            every=frames_every(return_trajectory),
            trajectory_device=trajectory_device,
        )
        states = self._generator_states(grid, latents, generator, seeds)
        finite = check_finite is not False
        return SampleStream(loop, model, states, keep_mode=keep_mode, seeds=seeds, check_finite=finite)

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
        keep_mode: bool = False,
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
        with evaluating(model, keep_mode):
            return self._captured(guided, self._grid, latents, mode, backend, self.config.guidance_rescale)

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

    def _guided_run(
        self,
        grid: StepGrid,
        guided: GuidedModel,
        guidance: Guidance | MixedGuidance | None,
        terms: Sequence[Term],
        branches: Mapping[str, Branch] | None,
        rescale: float,
        seeds: Tensor | None,
        backend: str | None,
    ) -> GuidedRun | None:
        """Return model and stepper of a loop under a guidance method; None without one."""
        if guidance is None and not terms:
            if branches:
                remedy = "pass guidance=, or leave branches out"
                raise ValueError(error_message("sample", "branches", "is given", "a guidance method for it", remedy))
            return None
        if guidance is None:
            scale = guided.guidance_scale if guided.guided else 1.0
            guidance = PlainGuidance(scale, rescale)
        stepper = GuidedStepper(
            grid.table,
            guidance,
            terms=terms,
            levels=grid.levels if len(grid.levels) == len(grid.table) else None,
            dynamic_thresholding_ratio=self.config.dynamic_thresholding_ratio,
            sample_max_value=self.scheduler.config.sample_max_value,
            seeds=seeds,
            backend=backend,
        )
        return GuidedRun(guided, stepper, branches)

    def _rescale(self, guidance_rescale: float | None) -> float:
        if guidance_rescale is None:
            return self.config.guidance_rescale
        check_guidance_rescale("sample", guidance_rescale)
        return guidance_rescale

    def _generator_states(
        self, grid: StepGrid, latents: Tensor, generator: Generators, seeds: Tensor | None
    ) -> GeneratorStates:
        """Return the states of the generators that a loop draws from."""
        draws = seeds is None and any(grid.table.draws_noise)
        return generator_states(generator, latents.device if draws else None)

    def _captured(
        self, guided: GuidedModel, grid: StepGrid, latents: Tensor, mode: str, backend: str | None, rescale: float
    ) -> CapturedLoop:
        started = time.perf_counter()
        loop = CapturedLoop(
            guided,
            grid.table,
            grid.timesteps,
            latents,
            mode=mode,
            ratio=self.config.dynamic_thresholding_ratio,
            max_value=self.scheduler.config.sample_max_value,
            backend=backend,
            guidance_rescale=rescale,
            sigmas=grid.sigmas,
        )
        LOG.debug("capture: %d rows, mode %s, in %.6f s", len(grid.table), mode, time.perf_counter() - started)
        return loop

    def _kept_loop(
        self, guided: GuidedModel, grid: StepGrid, latents: Tensor, mode: str, backend: str | None, rescale: float
    ) -> CapturedLoop:
        check_can_capture(mode, latents)
        bounds = self.config.dynamic_thresholding_ratio, self.scheduler.config.sample_max_value, rescale
        fixed = mode, id(grid.table), bounds, signature(latents), backend_for(latents, backend)
        return self._graphs.get(guided, fixed, lambda: self._captured(guided, grid, latents, mode, backend, rescale))

    def _log_start(
        self,
        grid: StepGrid,
        guided: GuidedModel,
        latents: Tensor,
        generator: Generators,
        seeds: Tensor | None,
        backend: str | None,
        cuda_graph: bool | str,
    ) -> float:
        """Log what runs where, at DEBUG; return the time on the clock."""
        if LOG.isEnabledFor(logging.DEBUG):
            LOG.debug(
                "%s: %d model calls on %s %s on %s, %s backend, guidance %s, noise from %s, cuda_graph %s",
                type(self).__name__,
                len(grid.table),
                list(latents.shape),
                latents.dtype,
                latents.device,
                backend_for(latents, backend),
                guided.mode.value if guided.guided else "off",
                "seeds" if seeds is not None else "torch" if generator is None else "a generator",
                cuda_graph,
            )
        return time.perf_counter()


def _scale_of_model(
    guidance: Guidance | MixedGuidance | None, prompt_embeds: Tensor | None, guidance_scale: float | Tensor | None
) -> float | Tensor | None:
    """Return the scale that says whether a loop needs an unconditional condition.

    Raises:
        ValueError: a method is given beside a scale, or asks for an unconditional output of a model without conditions.
    """
    if guidance is None:
        return guidance_scale
    if guidance_scale is not None:
        remedy = "give the method its scale"
        raise ValueError(error_message("sample", "guidance_scale", "is given beside guidance", "one scale", remedy))
    if "uncond" not in guidance.branches:
        return 1.0
    if prompt_embeds is None:
        got, remedy = "is missing", "pass the condition, or a method without an unconditional branch"
        raise ValueError(error_message("sample", "prompt_embeds", got, "a condition for guidance", remedy))
    return guidance_scale


def _log_end(result: SamplingResult, started: float) -> None:
    """Log how far a loop went and how long the host took, at DEBUG; waits for no device."""
    if LOG.isEnabledFor(logging.DEBUG):
        planned, spent = len(result.timesteps), time.perf_counter() - started
        LOG.debug("sample: %d of %d steps, %.6f s on the host", result.steps, planned, spent)


def checked_noise(latents: Tensor, generator: Generators, seeds: int | Sequence[int] | Tensor | None) -> Tensor | None:
    """Check latents and sources of noise; return the seeds as a tensor on the device of the latents, or None.

    Raises:
        TypeError, ValueError: the latents cannot be a first sample, the seeds do not fit, or both sources are given.
    """
    check_latents(latents)
    if seeds is None:
        return None
    if generator is not None:
        raise ValueError(
            error_message("sample", "generator", "is given beside seeds", "one source of noise", "leave out one")
        )
    return as_seeds(seeds, latents.shape[0], latents.device)
