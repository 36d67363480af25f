# SPDX-License-Identifier: MIT
"""A sampling loop as an iterator: one `StepInfo` a step, and the result of the steps taken."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from types import TracebackType

import torch
from torch import Tensor

from ..noise.generators import GeneratorStates, restore_generators
from .loop import SamplingLoop, SamplingResult, StepInfo
from .model_mode import evaluating


class SampleStream(Iterator[StepInfo]):
    """The steps of one loop, taken when they are asked for; made by `BaseSampler.stream`.

    A consumer may edit ``info.sample`` in place: the loop continues from it.  A stream that ends before its last step,
    by `close`, by leaving its ``with`` block, by an error or when it is dropped, puts the generators back; the model
    is in evaluation mode from the first step to the end of the stream.

    Args:
        loop: the loop, watched.
        model: the caller's model.
        states: of the generators, before the loop.
        keep_mode: leave the model's mode as it is.
        seeds: of the loop, for the result.
        check_finite: check the finished samples.
    """

    def __init__(
        self,
        loop: SamplingLoop,
        model: object,
        states: GeneratorStates,
        *,
        keep_mode: bool,
        seeds: Tensor | None,
        check_finite: bool,
    ) -> None:
        self._loop = loop
        self._seeds = seeds
        self._check_finite = check_finite
        self._steps = _steps(loop, model, states, keep_mode)

    def __next__(self) -> StepInfo:
        with self._loop.stopwatch.part("loop"):
            return next(self._steps)

    def close(self) -> None:
        """End the loop here; a stream that has ended already stays as it is."""
        self._steps.close()

    def __enter__(self) -> SampleStream:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    @property
    def result(self) -> SamplingResult:
        """The result of the steps taken so far, ``complete`` after the last one; its time leaves the consumer's out.

        Raises:
            ValueError: the finished samples are NaN or infinite.
        """
        done = self._loop.stepper.done
        return self._loop.result(check_finite=self._check_finite and done, seeds=self._seeds)


@torch.no_grad()
def _steps(
    loop: SamplingLoop, model: object, states: GeneratorStates, keep_mode: bool
) -> Generator[StepInfo, None, None]:
    """Yield the steps; a generator of its own, so that gradients are off in the steps and not between them."""
    try:
        with evaluating(model, keep_mode):
            for info in loop:
                assert info is not None
                yield info
                loop.record()
    finally:
        if not loop.stepper.done:
            restore_generators(states)
