# SPDX-License-Identifier: MIT
"""The sampling loop: call the model, take the step, until the table ends."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .errors import require, sentence
from .guidance import GuidedModel
from .measure import Stopwatch, peak_memory
from .rng import Generators
from .stepper import Stepper


@dataclass(frozen=True)
class StepInfo:
    """What a callback is told after each step.

    Attributes:
        index: which step has been taken, from 0; `total` how many there are.
        timestep: what the model was told.
        sample: the sample after the step, ``[B, ...]``; not written to later.
        model_output: the conditional output of the step.
    """

    index: int
    total: int
    timestep: float
    sample: Tensor
    model_output: Tensor


#: Called after each step; returning False stops the loop.
Callback = Callable[[StepInfo], object]


@dataclass(frozen=True)
class SamplingResult:
    """What `sample` returns.

    Attributes:
        samples: ``[B, ...]``, dtype and device of the latents.
        processing_time: seconds of the whole loop.
        peak_memory: bytes; see `fastdiff.measure.peak_memory`.
        model_time, step_time: seconds spent in the model and in the step.
        steps: how many steps were taken, fewer than planned where a callback stopped the loop.
    """

    samples: Tensor
    processing_time: float
    peak_memory: int
    model_time: float
    step_time: float
    steps: int

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
) -> SamplingResult:
    """Walk a stepper's table to its end, or until the callback returns False.

    Args:
        model: the model with its conditions.
        stepper: a fresh one.
        timesteps: what to tell the model, one a row, int64 or float32.
        latents: standard normal noise, ``[B, ...]``; not written to.
        generator, callback, progress: as in `fastdiff.samplers.BaseSampler.sample`.
    """
    stopwatch = Stopwatch(latents.device)
    if latents.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(latents.device)
    started = time.perf_counter()
    sample = latents.clone() if stepper.table.initial_scale == 1.0 else latents * stepper.table.initial_scale
    timesteps = timesteps.to(latents.device)
    total = len(stepper.table)
    scale = model.guidance_scale if model.guided else None
    prepared = model.prepare(sample)
    with progress_bar(total, progress) as bar:
        for index, timestep in enumerate(timesteps):
            with stopwatch.part("model"):
                output, uncond, variance = model(sample, timestep, prepared)
            with stopwatch.part("step"):
                sample = stepper.step(
                    sample,
                    output,
                    uncond=uncond,
                    guidance=scale,
                    variance=variance,
                    generator=generator,
                    # A callback may keep what it is shown; without one the loop's own copy is written over.
                    out=None if callback else sample,
                    model_input=prepared if index + 1 < total else None,
                )
            bar.update()
            if callback is not None:
                info = StepInfo(index, total, stepper.table.timesteps[index], sample, output)
                if callback(info) is False:
                    break
    seconds = stopwatch.seconds()
    if not bool(torch.isfinite(sample).all()):
        raise ValueError(
            sentence(
                "sample",
                "samples",
                "became NaN or infinite",
                "finite numbers",
                "pass check_finite=True to see whether the model did it; else half precision has overflowed",
            )
        )
    return SamplingResult(
        sample,
        time.perf_counter() - started,
        peak_memory(latents.device),
        seconds["model"],
        seconds["step"],
        stepper.index,
    )


def check_latents(latents: object) -> None:
    """Refuse what cannot be the first sample of a loop."""
    if not isinstance(latents, Tensor) or not latents.is_floating_point() or latents.dim() == 0:
        got = (
            f"has dtype {latents.dtype} and {latents.dim()} dimensions"
            if isinstance(latents, Tensor)
            else f"is a {type(latents).__name__}"
        )
        raise TypeError(
            sentence("sample", "latents", got, "a floating-point tensor [B, ...]", "draw it with torch.randn")
        )
    if latents.device.type == "cpu" and not bool(torch.isfinite(latents).all()):
        raise ValueError(
            sentence("sample", "latents", "holds NaN or infinity", "finite noise", "draw it with torch.randn")
        )


class _NoBar:
    """The progress bar of a silent loop."""

    def __enter__(self) -> _NoBar:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def update(self) -> None:
        pass


def progress_bar(total: int, wanted: bool | None) -> Any:
    """tqdm's bar; one that shows nothing where it is not wanted, or not installed and not insisted on."""
    if wanted is None:
        wanted = importlib.util.find_spec("tqdm") is not None
    if not wanted:
        return _NoBar()
    return require("tqdm", "cli", "sample(progress=True)").tqdm(total=total, desc="sampling", unit="step")
