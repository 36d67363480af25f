# SPDX-License-Identifier: MIT
"""Whole sampling loops as CUDA graphs: the model and the step are captured once and replayed for other inputs.

One row is ``timesteps[row_index] → model → step_rows(row_index) → row_index += 1``, and everything that a replay
depends on is in tensors that the graph reads, the index of the row too, so that one body serves all rows.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..device_copy import to_device
from ..errors import error_message
from ..guidance import GuidanceMode, GuidedModel, rescaling_of, rows_with_scaled_output, write_model_input
from ..ops.fallback import backend_to_run
from ..ops.thresholding import dynamic_threshold
from ..philox import as_seeds
from ..row_layout import NUM_REGISTERS, Variance, compute_dtype
from ..sampling.config import check_guidance_scale
from ..sampling.loop import Callback, StepInfo, checked_samples, progress_bar
from ..sampling.single_steps import cfg_combine
from ..solvers.table import StepTable
from .recorder import ONE_CAPTURE, RECORDERS, WARM_UPS, check_can_capture, check_can_show, without_autocast_cache
from .static_inputs import StaticInput, StaticTree


class CapturedLoop:
    """A sampling loop that was captured for one model and one form of inputs; made by `BaseSampler.capture`.

    Latents, conditions, tensors among the model's keyword arguments, guidance scales and seeds are copied into memory
    of the loop's own at each replay.  Fixed are the table, their shapes and dtypes, whether there is guidance, all
    other keyword arguments, and whatever Python the model runs: it does not run again.  Weights are read at their
    addresses, so they may change in place but not be replaced.

    It serves one caller at a time: others wait for their turn, the host for the host, and streams for each other.

    Args:
        model: the model with its conditions; it is called here and not by replays.
        table, timesteps: of the sampler.
        latents: what the loop is captured for; only shape, dtype, device and strides matter.
        mode: one of `fastdiff.graphs.GRAPH_MODES`.
        ratio, max_value: of `fastdiff.ops.thresholding.dynamic_threshold`.
        backend: forces one, as in `fastdiff.ops.step`.
        guidance_rescale: as in `fastdiff.Stepper`.
        sigmas: the noise level of each row, for callbacks.

    Raises:
        ValueError: there are no graphs on this device, or an argument does not fit.
        RuntimeError: the model does what a CUDA graph cannot hold; the message has the cause.
    """

    def __init__(
        self,
        model: GuidedModel,
        table: StepTable,
        timesteps: Tensor,
        latents: Tensor,
        *,
        mode: str = "loop",
        ratio: float = 0.995,
        max_value: float = 1.0,
        backend: str | None = None,
        guidance_rescale: float = 0.0,
        sigmas: tuple[float, ...] = (),
    ) -> None:
        check_can_capture(mode, latents)
        self.mode = mode
        self.table = table
        self._threshold_options = ratio, max_value
        self._rescale = guidance_rescale
        self._negative_is_zeros = model.negative_is_zeros
        self._sigmas = sigmas
        self._backend = backend_to_run(latents, backend)
        self._lock = threading.RLock()
        self._replaying = False
        self._output: Tensor | None = None
        # Neither inference tensors, which nobody could write to outside of inference mode, nor tensors of a graph.
        with torch.inference_mode(False), torch.no_grad():
            self._allocate(model, timesteps, latents)
            self._recorder = RECORDERS[latents.device.type](latents.device)
            self._record()

    def replay(
        self,
        latents: Tensor,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        *,
        guidance_scale: float | Tensor | None = None,
        seeds: int | Sequence[int] | Tensor | None = None,
        model_kwargs: Any = None,
        callback: Callback | None = None,
        progress: bool | None = False,
    ) -> Tensor:
        """Run the loop on other inputs, without waiting for the device.

        Args:
            latents, prompt_embeds, negative_prompt_embeds, model_kwargs: of the shapes and dtypes that the loop was
                captured with, any strides; not written to.  What was given then has to be given again, and a keyword
                argument that is no tensor has to be the same.
            guidance_scale: a number, or ``[B]`` where it was captured with a tensor; None for the captured one.  A loop
                with guidance takes 1 too, as u + 1·(c − u).
            seeds: a seed for each sample, where the table adds noise; None draws them from torch's default generator
                of the CPU, so that ``torch.manual_seed`` repeats them.
            callback, progress: as in `BaseSampler.sample`; in mode "step" only.  A callback is shown copies; the
                loop continues from the values that it leaves in them, or returns.

        Returns:
            The samples, ``[B, ...]``, a new tensor.

        Raises:
            TypeError, ValueError: an argument does not fit what was captured.  Nothing has been run then.
            RuntimeError: a callback replays the loop that calls it.
        """
        return self.run(
            latents,
            prompt_embeds,
            negative_prompt_embeds,
            guidance_scale=guidance_scale,
            seeds=seeds,
            model_kwargs=model_kwargs,
            callback=callback,
            progress=progress,
        )[0]

    @torch.no_grad()
    def run(
        self,
        latents: Tensor,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        *,
        guidance_scale: float | Tensor | None = None,
        seeds: int | Sequence[int] | Tensor | None = None,
        model_kwargs: Any = None,
        callback: Callback | None = None,
        progress: bool | None = False,
    ) -> tuple[Tensor, int]:
        """`replay`, and how many steps were taken."""
        check_can_show(self.mode, callback, progress)
        self._latents.check(latents)
        self._check_guidance(guidance_scale)
        if not self.guided:
            negative_prompt_embeds = None  # as in a loop without graphs: there is no call that would take it
        elif negative_prompt_embeds is None and self._negative_is_zeros and isinstance(prompt_embeds, Tensor):
            negative_prompt_embeds = torch.zeros_like(prompt_embeds)  # as at the capture
        conditions = {"prompt_embeds": prompt_embeds, "negative_prompt_embeds": negative_prompt_embeds}
        self._conditions.check(conditions)
        self._kwargs.check(dict(model_kwargs or {}))
        given_seeds = self.drawn_seeds(seeds)
        with self._lock:
            if self._replaying:
                raise RuntimeError(
                    error_message(
                        "replay",
                        "callback",
                        "replays the loop that calls it",
                        "a loop of its own",
                        "capture another one for it",
                    )
                )
            self._replaying = True
            try:
                with self._recorder.turn(self._buffers):
                    self._begin(latents)
                    self._conditions.fill(conditions)
                    self._kwargs.fill(dict(model_kwargs or {}))
                    self._fill_guidance(guidance_scale)
                    if given_seeds is not None and self._seeds is not None:
                        self._seeds.copy_(given_seeds, non_blocking=True)
                    steps = self._walk(callback, progress)
                    return self._x.clone(), steps
            finally:
                self._replaying = False

    def _walk(self, callback: Callback | None, progress: bool | None) -> int:
        total = len(self.table)
        if self.mode == "loop":
            self._recorder.replay()
            return total
        with progress_bar(total, progress) as bar:
            for index in range(total):
                self._recorder.replay()
                bar.update()
                if callback is None:
                    continue
                assert self._output is not None
                row, shown = self.table.source[index], self._x.clone()
                sigma = self._sigmas[index] if self._sigmas else math.nan
                answer = callback(StepInfo(index, total, row.timestep, shown, self._output.clone(), sigma))
                # The graph continues from its own memory, which has to hold the values that the callback has left.
                self._x.copy_(checked_samples(answer, shown) if isinstance(answer, Tensor) else shown)
                if self._prepared is not None:
                    write_model_input(self._prepared, self._x, row.model_input_scale)
                if answer is False:
                    return index + 1
        return total

    # --- What the graph reads and writes -----------------------------------------------------------------------------

    def _allocate(self, model: GuidedModel, timesteps: Tensor, latents: Tensor) -> None:
        device, table = latents.device, self.table
        self._latents = StaticInput("latents", latents)
        self._x = self._latents.buffer
        self.guided = model.guided
        self._allocate_conditions(model)
        self._allocate_guidance(model)
        # The model is held for its weights: a graph knows addresses only.
        self._model: GuidedModel | None = replace(
            model, model_kwargs=self._kwargs.buffers(), check_finite=False, **self._conditions.buffers()
        )
        if self.guided and model.mode is GuidanceMode.BATCHED:
            negative, prompt = self._model.both_embeds.chunk(2)
            self._conditions.move("negative_prompt_embeds", negative)
            self._conditions.move("prompt_embeds", prompt)
        self._prepared = self._model.prepare(self._x)
        used = {slot for slots in table.kept_slots for slot in slots}
        self._history = [torch.empty_like(self._x) if j in used else None for j in range(NUM_REGISTERS)]
        stochastic = any(table.draws_noise)
        self._seeds = torch.zeros(latents.shape[0], dtype=torch.int64, device=device) if stochastic else None
        self._row_index = torch.zeros(1, dtype=torch.int64, device=device)
        self._timesteps = to_device(timesteps, device)
        self._coefficients = table.shared_coefficients(latents.dtype, device)
        self._prediction_coefficients = (
            table.shared_coefficients(latents.dtype, device, prediction=True) if table.thresholding else None
        )
        own = [self._x, self._prepared, *self._history, self._seeds, self._row_index, self._timesteps, self._guidance]
        held = [*own, *self._conditions.tensors(), *self._kwargs.tensors()]
        self._buffers = [buffer for buffer in held if buffer is not None]

    def _allocate_conditions(self, model: GuidedModel) -> None:
        # The unconditional condition is read where there is guidance.
        negative = model.negative_prompt_embeds if model.guided else None
        device = self._x.device
        self._conditions = StaticTree(
            {"prompt_embeds": model.prompt_embeds, "negative_prompt_embeds": negative}, device
        )
        self._kwargs = StaticTree(dict(model.model_kwargs), device, "model_kwargs")

    def _allocate_guidance(self, model: GuidedModel) -> None:
        self._guidance: Tensor | None = None
        scale = model.guidance_scale
        self._captured_scale = scale.clone() if isinstance(scale, Tensor) else scale
        if not self.guided:
            return
        size = self._x.shape[0] if isinstance(scale, Tensor) else 1
        self._guidance = torch.empty(size, dtype=compute_dtype(self._x.dtype), device=self._x.device)
        self._check_guidance(scale)
        self._fill_guidance(scale)

    def _begin(self, latents: Tensor) -> None:
        """Write the state before the first row of a loop."""
        self._x.copy_(latents)
        if self.table.initial_scale != 1.0:
            self._x.mul_(self.table.initial_scale)
        if self._prepared is not None:
            write_model_input(self._prepared, self._x)
        self._row_index.zero_()

    def _check_guidance(self, scale: float | Tensor | None) -> None:
        if scale is None or not self._conditions.given("prompt_embeds"):
            return
        if isinstance(scale, Tensor):
            held = 0 if self._guidance is None else self._guidance.numel()
            if not isinstance(self._captured_scale, Tensor) or list(scale.shape) != [held]:
                raise ValueError(
                    error_message(
                        "replay",
                        "guidance_scale",
                        f"is a tensor of shape {list(scale.shape)}",
                        f"shape [{held}]" if isinstance(self._captured_scale, Tensor) else "a number",
                        "capture the loop with a tensor [B] to have a scale a sample",
                    )
                )
            return
        check_guidance_scale("replay", scale)
        if not self.guided and scale != 1.0:
            raise ValueError(
                error_message(
                    "replay",
                    "guidance_scale",
                    f"is {scale:g}",
                    "1, for the loop was captured without guidance",
                    "capture it with a guidance_scale other than 1",
                )
            )

    def _fill_guidance(self, scale: float | Tensor | None) -> None:
        if self._guidance is None:
            return
        scale = self._captured_scale if scale is None else scale
        if isinstance(scale, Tensor):
            self._guidance.copy_(to_device(scale, self._guidance.device))
        else:
            self._guidance.fill_(scale)

    def drawn_seeds(self, seeds: int | Sequence[int] | Tensor | None) -> Tensor | None:
        """Return the seeds of a replay, int64 ``[B]`` on its device, drawn where there are none.

        None for a table that adds no noise.
        """
        if self._seeds is None:
            return None
        batch = self._x.shape[0]
        if seeds is None:
            seeds = torch.randint(-(2**63), 2**63 - 1, (batch,), dtype=torch.int64, device="cpu")
        return as_seeds(seeds, batch, self._x.device)

    # --- The body ----------------------------------------------------------------------------------------------------

    def _take_row(self) -> None:
        """One row: what it depends on is read from the buffers, and so is which one it is."""
        assert self._model is not None
        timestep = self._timesteps.index_select(0, self._row_index).squeeze(0)
        output, uncond, variance = self._model(self._x, timestep, self._prepared)
        if self.mode == "step":  # for callbacks: held, lest the graph put something else there
            self._output = output.clone() if _share_storage(output, self._x, self._prepared) else output
        guided: dict[str, Any] = {"uncond": uncond, "guidance_scale": self._guidance, "backend": self._backend}
        threshold, factor = None, None
        if self._rescale and uncond is not None:
            assert self._guidance is not None
            whole = cfg_combine(output, uncond, self._guidance, backend=self._backend)
            factor = rescaling_of(whole, output, self._rescale)
        if self._prediction_coefficients is not None:
            rows = self._rows(self._prediction_coefficients, factor)
            (x0,) = ops.step(self._x, output, *rows, **guided)
            threshold = dynamic_threshold(x0, *self._threshold_options)
        ops.step_rows(
            self._x,
            output,
            *self._rows(self._coefficients, factor),
            self._history,
            seeds=self._seeds,
            noise_step=self._row_index,
            variance=variance,
            threshold=threshold,
            variance_kind=int(Variance.FIXED if variance is None else self.table.variance),
            out=self._x,
            model_input=self._prepared,
            **guided,
        )
        self._row_index.add_(1)

    def _rows(self, coefficients: Tensor, factor: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return coefficients and row index of this row, with the model's output multiplied by a factor a sample."""
        if factor is None:
            return coefficients, self._row_index
        return rows_with_scaled_output(coefficients.index_select(0, self._row_index), factor)

    def _record(self) -> None:
        def body() -> None:
            for _ in range(len(self.table) if self.mode == "loop" else 1):
                self._take_row()

        with ONE_CAPTURE, without_autocast_cache(), self._recorder.turn(self._buffers):
            first = self._x.clone()
            for _ in range(WARM_UPS):
                self._begin(first)
                self._recorder.warm_up(self._take_row)
            self._begin(first)
            try:
                self._recorder.capture(body)
            except RuntimeError as error:
                raise RuntimeError(
                    error_message(
                        "sample",
                        "model",
                        f"cannot be captured as a CUDA graph ({error})",
                        "work for the device alone, the same at every call",
                        "take host syncs, random draws and shapes that depend on values out of the model, or leave out "
                        "cuda_graph",
                    )
                ) from error

    def let_model_go(self) -> None:
        """Hold the model no longer; whoever replays the loop then sees to it that the weights stay where they are."""
        self._model = None


def _share_storage(tensor: Tensor, *others: Tensor | None) -> bool:
    storage = tensor.untyped_storage().data_ptr()
    return any(other is not None and other.untyped_storage().data_ptr() == storage for other in others)
