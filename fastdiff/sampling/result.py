# SPDX-License-Identifier: MIT
"""What a sampling loop tells: a `StepInfo` after each step and a `SamplingResult` at its end."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from ..errors import error_message
from .timing import Stopwatch, memory_in_use, peak_memory, span_seconds
from .trajectory import Trajectory


class StepTimes(NamedTuple):
    """Seconds: of the step's model call, of the step itself, and since the loop began."""

    model: float
    step: float
    loop: float


class StepContext:
    """The tensors and the clock of one step, for the figures of a `StepInfo` that are computed when they are read."""

    __slots__ = ("_ended", "_latest", "_predict", "_started", "_x0")

    def __init__(self, stopwatch: Stopwatch, started: Any, predict: Callable[[], Tensor]) -> None:
        self._latest = stopwatch.latest()
        self._started = started
        self._ended = stopwatch.now()
        self._predict: Callable[[], Tensor] | None = predict
        self._x0: Tensor | None = None

    def x0(self) -> Tensor:
        if self._predict is not None:
            self._x0 = self._predict()
            self._predict = None
        assert self._x0 is not None
        return self._x0

    def times(self) -> StepTimes:
        ended: Any = self._ended
        loop = ended - self._started if isinstance(ended, float) else (self._started, ended)
        return StepTimes(*(span_seconds(span) for span in (self._latest["model"], self._latest["step"], loop)))


@dataclass(frozen=True)
class StepInfo:
    """One step of a loop: the argument of a callback and the item of a stream.

    Attributes:
        index: the index of the step, from 0, of `total` steps.
        timestep: the model's time argument.
        sample: the sample after the step, ``[B, ...]``.  The loop does not write to it later and continues
            from the values that the callback leaves in it.
        model_output: the conditional output of the step; the loop does not write to it.
        sigma: the noise level of the model call: σ/α, or σ = t on a flow schedule; NaN where the loop has no grid.
    """

    index: int
    total: int
    timestep: float
    sample: Tensor
    model_output: Tensor
    sigma: float = math.nan
    context: StepContext | None = field(default=None, repr=False, compare=False)

    @property
    def x0(self) -> Tensor:
        """The clean sample that this step predicted, guided and bounded as in the step, like `sample`.

        Computed in a pass of its own when it is first read, and kept.

        Raises:
            RuntimeError: the step was one of a captured loop, which keeps no earlier sample.
        """
        if self.context is None:
            raise RuntimeError(
                error_message(
                    "StepInfo",
                    "x0",
                    "is not known for a captured step",
                    "a loop without cuda_graph",
                    "leave cuda_graph out",
                )
            )
        return self.context.x0()

    @property
    def times(self) -> StepTimes:
        """The times of this step in seconds; on a GPU, reading them waits for the step.  NaN in a captured loop."""
        return StepTimes(math.nan, math.nan, math.nan) if self.context is None else self.context.times()

    @property
    def memory(self) -> int:
        """Bytes in use when it is read; see `fastdiff.sampling.timing.memory_in_use`."""
        return memory_in_use(self.sample.device)

    @property
    def peak_memory(self) -> int:
        """Bytes at the peak of the loop so far; see `fastdiff.sampling.timing.peak_memory`."""
        return peak_memory(self.sample.device)


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
        steps: the number of steps taken, fewer than planned where the loop was stopped.
        stopwatch: the source of the times: the clock on the CPU, the device's own on a GPU.
        complete: False where a callback, Ctrl-C or a closed stream stopped the loop before its end.
        sigmas: the noise level of each model call and of the end, as `sample(sigmas=)` names them.
        timesteps: the model's time argument of each model call.
        seeds: int64 ``[B]``, on the device of the latents; None for a loop without them.
        recorded: the frames of `return_trajectory`, or None.
    """

    samples: Tensor
    peak_memory: int
    steps: int
    stopwatch: Stopwatch = field(repr=False, compare=False)
    complete: bool = True
    sigmas: tuple[float, ...] = field(default=(), repr=False)
    timesteps: tuple[float, ...] = field(default=(), repr=False)
    seeds: Tensor | None = field(default=None, repr=False, compare=False)
    recorded: Trajectory | None = field(default=None, repr=False, compare=False)

    @property
    def trajectory(self) -> Tensor | None:
        """The frames of `return_trajectory`, ``[F, B, ...]``: the first sample, every n-th step's and the last.

        Frames that were moved off a GPU are waited for.  None without `return_trajectory`.
        """
        return None if self.recorded is None else self.recorded.tensor()

    @property
    def trajectory_steps(self) -> tuple[int, ...]:
        """The number of steps taken before each frame of `trajectory`."""
        return () if self.recorded is None else tuple(self.recorded.steps)

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
