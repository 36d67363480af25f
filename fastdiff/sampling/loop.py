# SPDX-License-Identifier: MIT
"""The sampling loop: call the model, take the step, until the table ends."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import math
from collections.abc import Generator
from typing import Any

import torch
from torch import Tensor

from ..device_copy import to_device
from ..errors import error_message, require
from ..guidance import GuidedModel, write_model_input
from ..noise.generators import Generators
from ..ops.checks import DTYPES
from .guided_run import GuidedRun
from .interrupts import DeferredInterrupt
from .reference_counts import reference_counts
from .result import Callback, SamplingResult, StepContext, StepInfo
from .stepper import Stepper
from .timing import Stopwatch, peak_memory
from .trajectory import Trajectory

__all__ = [
    "Callback",
    "SamplingLoop",
    "SamplingResult",
    "StepInfo",
    "check_latents",
    "checked_samples",
    "finish",
    "progress_bar",
    "run_loop",
    "start_measuring",
]


class SamplingLoop:
    """One run over a stepper's table.  Iterating takes the steps: it calls the model, takes the step, and yields.

    Between two steps the consumer may edit or replace `sample`, where the loop is `watched`.

    Args:
        model: the model with its conditions.
        stepper: a fresh one.
        timesteps: the model's time arguments, one a row, int64 or float32.
        latents: standard normal noise, ``[B, ...]``; not written to.
        generator: as in `fastdiff.samplers.BaseSampler.sample`.
        sigmas: the noise level of each row and of the end, for `StepInfo` and the result.
        watched: yield a `StepInfo` and leave its tensors to the consumer; else yield None and write over the sample.
        every: the number of steps between the frames of a trajectory, 0 for none.
        trajectory_device: where the frames are kept; None for the device of the latents.

    Attributes:
        sample: the sample after the last finished step, ``[B, ...]``.
    """

    def __init__(
        self,
        model: GuidedModel | GuidedRun,
        stepper: Stepper | GuidedRun,
        timesteps: Tensor,
        latents: Tensor,
        *,
        generator: Generators = None,
        sigmas: tuple[float, ...] = (),
        watched: bool = False,
        every: int = 0,
        trajectory_device: torch.device | str | None = None,
    ) -> None:
        self.stopwatch = start_measuring(latents.device)
        self.stepper = stepper
        self.sigmas = sigmas
        self._model = model
        self._timesteps = timesteps
        self._generator = generator
        self._watched = watched
        scale = stepper.table.initial_scale
        self.sample = latents.clone() if scale == 1.0 else latents * scale
        self.recorded: Trajectory | None = None
        if every:
            self.recorded = Trajectory(latents, every, len(stepper.table), trajectory_device)
            self.recorded.add(0, self.sample)

    def __iter__(self) -> Generator[StepInfo | None, None, None]:
        model, stepper, stopwatch, watched = self._model, self.stepper, self.stopwatch, self._watched
        table = stepper.table
        total = len(table)
        scale = model.guidance_scale if model.guided else None
        sample = self.sample
        in_model, in_step = stopwatch.part("model"), stopwatch.part("step")
        started = stopwatch.now() if watched else None
        prepared = model.prepare(sample)
        shown: Tensor | None = None
        for index, timestep in enumerate(to_device(self._timesteps, sample.device)):
            current = sample if prepared is None else prepared
            if current is not shown or index == 1:  # from its first step on, the stepper holds the sample too
                shown = current
                counts = reference_counts(current)
            with in_model:
                output, uncond, variance = model(sample, timestep, prepared)
            kept = counts is None or reference_counts(current) != counts
            if kept and prepared is not None:
                prepared = torch.empty_like(prepared)
            # The loop writes over its own sample, unless a consumer gets it or the model has kept it.
            overwrite = not watched and not (kept and prepared is None)
            last = index + 1 == total
            before = sample
            with in_step:
                sample = stepper.step(
                    sample,
                    output,
                    uncond=uncond,
                    guidance_scale=scale,
                    variance=variance,
                    generator=self._generator,
                    out=sample if overwrite else None,
                    # A consumer may edit the sample: the input is written below.
                    model_input=None if last or watched else prepared,
                )
            self.sample = sample
            if not watched:
                del before
                yield None
                continue
            predict = functools.partial(stepper.predict, index, before, output, uncond=uncond, guidance_scale=scale)
            context = StepContext(stopwatch, started, predict)
            sigma = self.sigmas[index] if self.sigmas else math.nan
            yield StepInfo(index, total, table.timesteps[index], sample, output, sigma, context)
            del before, predict, context
            sample = self.sample
            if prepared is not None and not last:
                write_model_input(prepared, sample, table.source[index].model_input_scale)

    def record(self, *, last: bool = False) -> None:
        """Copy the sample into the trajectory where it is one of its frames; `last` after the loop's last step."""
        if self.recorded is not None:
            self.recorded.add(self.stepper.index, self.sample, last=last)

    def result(self, *, check_finite: bool, seeds: Tensor | None = None) -> SamplingResult:
        """Return the result of the steps taken so far; check the samples where `check_finite` is set."""
        self.record(last=True)
        return finish(
            self.sample,
            self.stepper.index,
            self.stopwatch,
            check_finite,
            complete=self.stepper.done,
            sigmas=self.sigmas,
            timesteps=self.stepper.table.timesteps,
            seeds=seeds,
            recorded=self.recorded,
        )


def run_loop(
    model: GuidedModel | GuidedRun,
    stepper: Stepper | GuidedRun,
    timesteps: Tensor,
    latents: Tensor,
    *,
    generator: Generators = None,
    callback: Callback | None = None,
    progress: bool | None = None,
    check_finite: bool = True,
    sigmas: tuple[float, ...] = (),
    every: int = 0,
    trajectory_device: torch.device | str | None = None,
    seeds: Tensor | None = None,
    interrupt: DeferredInterrupt | None = None,
) -> SamplingResult:
    """Walk a stepper's table to its end, or until the callback returns False or Ctrl-C is pressed.

    Args:
        model, stepper, timesteps, latents, sigmas, every, trajectory_device: as in `SamplingLoop`.
        generator, callback, progress: as in `fastdiff.samplers.BaseSampler.sample`.
        check_finite: check the finished samples, which waits for a GPU; nothing else here does.
        seeds: of the stepper, for the result.
        interrupt: the block that defers Ctrl-C, which the caller has entered; None leaves Ctrl-C alone.

    Returns:
        The result; after Ctrl-C, or a KeyboardInterrupt in `interrupt`, that of the steps taken before, unchecked.

    Raises:
        KeyboardInterrupt: at a second Ctrl-C, or without `interrupt`.
    """
    loop = SamplingLoop(
        model,
        stepper,
        timesteps,
        latents,
        generator=generator,
        sigmas=sigmas,
        watched=callback is not None,
        every=every,
        trajectory_device=trajectory_device,
    )
    with loop.stopwatch.part("loop"), progress_bar(len(stepper.table), progress) as bar:
        try:
            with contextlib.closing(iter(loop)) as steps:
                for info in steps:
                    bar.update()
                    if callback is not None and info is not None:
                        answer = callback(info)
                        if isinstance(answer, Tensor):
                            loop.sample = checked_samples(answer, loop.sample)
                        elif answer is False:
                            break
                    if every:
                        loop.record()
                    if interrupt is not None and interrupt.pending:
                        check_finite = check_finite and stepper.done
                        break
        except KeyboardInterrupt:
            if interrupt is None or interrupt.pending:  # a second Ctrl-C ends more than this loop
                raise
            check_finite = False
    return loop.result(check_finite=check_finite, seeds=seeds)


def checked_samples(returned: Tensor, sample: Tensor) -> Tensor:
    """Return the samples that a callback has returned, outside of autograd's graph.

    Raises:
        TypeError, ValueError: they cannot take the place of `sample`.
    """
    if returned is sample:
        return sample
    for what, got, wanted in (
        ("layout", returned.layout, torch.strided),
        ("dtype", returned.dtype, sample.dtype),
        ("shape", list(returned.shape), list(sample.shape)),
        ("device", returned.device, sample.device),
    ):
        if got != wanted:
            kind = TypeError if what in ("layout", "dtype") else ValueError
            raise kind(
                error_message(
                    "sample",
                    "callback",
                    f"returned a tensor of {what} {got}",
                    f"{what} {wanted} like the samples",
                    "return samples like info.sample, or None to leave them as they are",
                )
            )
    return returned.detach()


def start_measuring(device: torch.device) -> Stopwatch:
    """Return a stopwatch for a loop that begins now, and start counting the peak of the memory."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    return Stopwatch(device)


def finish(samples: Tensor, steps: int, stopwatch: Stopwatch, check_finite: bool, **facts: Any) -> SamplingResult:
    """Return the result of a loop whose last step is enqueued; check it where `check_finite` is set.

    Args:
        samples, steps, stopwatch: of the result.
        check_finite: refuse samples that are NaN or infinite, which waits for a GPU.
        facts: other fields of the result.
    """
    if check_finite and not bool(torch.isfinite(samples).all()):
        raise ValueError(
            error_message(
                "sample",
                "samples",
                "became NaN or infinite",
                "finite numbers",
                "pass check_finite=True to see whether the model did it; else half precision has overflowed",
            )
        )
    return SamplingResult(samples, peak_memory(samples.device), steps, stopwatch, **facts)


def check_latents(latents: object) -> None:
    """Refuse latents that cannot be the first sample of a loop."""
    expected = "a dense tensor [B, ...] of float16, bfloat16, float32 or float64"
    if not isinstance(latents, Tensor):
        got = f"is a {type(latents).__name__}"
    elif latents.dtype not in DTYPES or latents.dim() == 0:
        got = f"has dtype {latents.dtype} and {latents.dim()} dimensions"
    elif latents.layout != torch.strided:
        got = f"has layout {latents.layout}"
    elif latents.is_meta:
        got = "is on the meta device and holds no numbers"
    else:
        if latents.device.type == "cpu" and not bool(torch.isfinite(latents).all()):
            raise ValueError(
                error_message("sample", "latents", "holds NaN or infinity", "finite noise", "draw it with torch.randn")
            )
        return
    raise TypeError(error_message("sample", "latents", got, expected, "draw it with torch.randn, or convert it first"))


class _NoBar:
    """The progress bar of a silent loop."""

    def __enter__(self) -> _NoBar:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def update(self) -> None:
        pass


def progress_bar(total: int, wanted: bool | None, unit: str = "step") -> Any:
    """Return tqdm's bar, or a silent one where `wanted` is False, or None without tqdm."""
    if wanted is None:
        wanted = importlib.util.find_spec("tqdm") is not None
    if not wanted:
        return _NoBar()
    return require("tqdm", "cli", "sample(progress=True)").tqdm(total=total, desc="sampling", unit=unit)
