# SPDX-License-Identifier: MIT
"""The sampling loop: call the model, take the step, until the table ends."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..device_copy import to_device
from ..errors import error_message, require
from ..guidance import GuidedModel, write_model_input
from ..noise.generators import Generators
from ..ops.checks import DTYPES
from .reference_counts import reference_counts
from .stepper import Stepper
from .timing import Stopwatch, peak_memory


@dataclass(frozen=True)
class StepInfo:
    """The argument of a callback, after each step.

    Attributes:
        index: the index of the step, from 0, of `total` steps.
        timestep: the model's time argument.
        sample: the sample after the step, ``[B, ...]``.  The loop does not write to it later and continues
            from the values that the callback leaves in it.
        model_output: the conditional output of the step; the loop does not write to it.
    """

    index: int
    total: int
    timestep: float
    sample: Tensor
    model_output: Tensor


#: Called after each step.  Returning False stops the loop, returning a tensor makes it the samples.
Callback = Callable[[StepInfo], object]


@dataclass(frozen=True)
class SamplingResult:
    """The result of `sample`.

    Where the finished samples were not checked (``check_finite=False``), a GPU may still be computing them: use them on
    the same stream.  The times below wait for it when they are first read.

    Attributes:
        samples: ``[B, ...]``, dtype and device of the latents.
        peak_memory: bytes; see `fastdiff.sampling.timing.peak_memory`.
        steps: the number of steps taken, fewer than planned where a callback stopped the loop.
        stopwatch: the source of the times: the clock on the CPU, the device's own on a GPU.
    """

    samples: Tensor
    peak_memory: int
    steps: int
    stopwatch: Stopwatch = field(repr=False, compare=False)

    @property
    def processing_time(self) -> float:
        """Seconds of the whole loop."""
        return self.stopwatch.seconds()["loop"]

    @property
    def model_time(self) -> float:
        """Seconds spent in the model; NaN for a loop that ran as a CUDA graph, which times them together."""
        return self.stopwatch.seconds().get("model", math.nan)

    @property
    def step_time(self) -> float:
        """Seconds spent in the step; NaN likewise."""
        return self.stopwatch.seconds().get("step", math.nan)

    @property
    def step_share(self) -> float:
        """The step's share of the whole time."""
        return self.step_time / self.processing_time if self.processing_time else 0.0


def run_loop(
    model: GuidedModel,
    stepper: Stepper,
    timesteps: Tensor,
    latents: Tensor,
    *,
    generator: Generators = None,
    callback: Callback | None = None,
    progress: bool | None = None,
    check_finite: bool = True,
) -> SamplingResult:
    """Walk a stepper's table to its end, or until the callback returns False.

    Args:
        model: the model with its conditions.
        stepper: a fresh one.
        timesteps: the model's time arguments, one a row, int64 or float32.
        latents: standard normal noise, ``[B, ...]``; not written to.
        generator, callback, progress: as in `fastdiff.samplers.BaseSampler.sample`.
        check_finite: check the finished samples, which waits for a GPU; nothing else here does.
    """
    stopwatch = start_measuring(latents.device)
    total = len(stepper.table)
    scale = model.guidance_scale if model.guided else None
    with stopwatch.part("loop"), progress_bar(total, progress) as bar:
        sample = latents.clone() if stepper.table.initial_scale == 1.0 else latents * stepper.table.initial_scale
        prepared = model.prepare(sample)
        shown: Tensor | None = None
        for index, timestep in enumerate(to_device(timesteps, latents.device)):
            current = sample if prepared is None else prepared
            if current is not shown or index == 1:  # from its first step on, the stepper holds the sample too
                shown = current
                counts = reference_counts(current)
            with stopwatch.part("model"):
                output, uncond, variance = model(sample, timestep, prepared)
            kept = counts is None or reference_counts(current) != counts
            if kept and prepared is not None:
                prepared = torch.empty_like(prepared)
            # The loop writes over its own sample, unless a callback gets it or the model has kept it.
            overwrite = callback is None and not (kept and prepared is None)
            last = index + 1 == total
            with stopwatch.part("step"):
                sample = stepper.step(
                    sample,
                    output,
                    uncond=uncond,
                    guidance_scale=scale,
                    variance=variance,
                    generator=generator,
                    out=sample if overwrite else None,
                    # After a callback, which may edit the sample, the input is written below.
                    model_input=None if last or callback is not None else prepared,
                )
            bar.update()
            if callback is not None:
                answer = callback(StepInfo(index, total, stepper.table.timesteps[index], sample, output))
                if answer is False:
                    break
                if answer is not None and isinstance(answer, Tensor):
                    sample = checked_samples(answer, sample)
                if prepared is not None and not last:
                    write_model_input(prepared, sample, stepper.table.source[index].model_input_scale)
    return finish(sample, stepper.index, stopwatch, check_finite)


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


def finish(samples: Tensor, steps: int, stopwatch: Stopwatch, check_finite: bool) -> SamplingResult:
    """Return the result of a loop whose last step is enqueued; check it where `check_finite` is set."""
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
    return SamplingResult(samples, peak_memory(samples.device), steps, stopwatch)


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


def progress_bar(total: int, wanted: bool | None) -> Any:
    """Return tqdm's bar, or a silent one where `wanted` is False, or None without tqdm."""
    if wanted is None:
        wanted = importlib.util.find_spec("tqdm") is not None
    if not wanted:
        return _NoBar()
    return require("tqdm", "cli", "sample(progress=True)").tqdm(total=total, desc="sampling", unit="step")
