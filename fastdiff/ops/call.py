# SPDX-License-Identifier: MIT
"""One call of the fused step, as the checks hand it to a backend."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..philox import Purpose
from ..row_layout import Variance

#: What becomes of one output: it is written to a tensor, made in a dtype, or made in the sample's.
Target = Tensor | torch.dtype | None


def stored_as(target: Target, sample: Tensor) -> torch.dtype:
    """The dtype of an output."""
    if target is None:
        return sample.dtype
    return target if isinstance(target, torch.dtype) else target.dtype


@dataclass(frozen=True)
class StepCall:
    """The arguments of one step, as `fastdiff.ops.step` describes them; scalars are tensors already."""

    sample: Tensor
    model_output: Tensor
    table: Tensor
    row: int | Tensor
    uncond: Tensor | None = None
    guidance: Tensor | None = None
    history: tuple[Tensor | None, ...] = ()
    noise: Tensor | None = None
    variance: Tensor | None = None
    threshold: Tensor | None = None
    variance_kind: int = Variance.FIXED
    keeps: int = 0
    seeds: Tensor | None = None
    noise_step: int | Tensor = 0
    purpose: int = Purpose.STEP
    model_input: Tensor | None = None
    #: Whether kept tensors go to the registers in `history` that the rows name, instead of to outputs of their own.
    scatter: bool = False
    #: The tensors to write; empty until `fastdiff.ops.layout.make_plain` has allocated them.
    outputs: tuple[Tensor, ...] = ()

    def model_tensors(self) -> Iterator[tuple[str, Tensor]]:
        yield "model_output", self.model_output
        for name in ("uncond", "variance"):
            tensor = getattr(self, name)
            if tensor is not None:
                yield name, tensor

    def state_tensors(self) -> Iterator[tuple[str, Tensor]]:
        for j, tensor in enumerate(self.history):
            if tensor is not None:
                yield f"history[{j}]", tensor
        if self.noise is not None:
            yield "noise", self.noise

    def inputs(self) -> Iterator[tuple[str, Tensor]]:
        yield "sample", self.sample
        yield from self.model_tensors()
        yield from self.state_tensors()

    def output_dtypes(self, out: Sequence[Target] | None) -> list[torch.dtype]:
        """Of prev_sample and of each kept tensor that has an output of its own."""
        return [stored_as(target, self.sample) for target in out or (None,) * (self.keeps + 1)]

    def scalars(self) -> Iterator[tuple[str, Tensor]]:
        yield "table", self.table
        if self.guidance is not None:
            yield "guidance", self.guidance
        if self.threshold is not None:
            yield "threshold", self.threshold

    def counters(self) -> Iterator[tuple[str, Tensor]]:
        """The integer tensors; without seeds a step of noise means nothing."""
        for name in ("row",) if self.seeds is None else ("row", "seeds", "noise_step"):
            tensor = getattr(self, name)
            if isinstance(tensor, Tensor):
                yield name, tensor

    @property
    def model_input_copies(self) -> int:
        """How many times the model input holds the samples: 0 where none is asked for."""
        if self.model_input is None:
            return 0
        return 1 if self.model_input.shape == self.sample.shape else 2

    @property
    def tells_samples_apart(self) -> bool:
        """Whether anything but the elements differs from sample to sample."""
        one_each = (self.row, self.guidance)
        return (
            self.threshold is not None
            or self.seeds is not None
            or any(isinstance(value, Tensor) and value.numel() > 1 for value in one_each)
        )

    def blocks(self) -> tuple[int, int, int]:
        """Of a plain call: how many samples must be told apart, elements a sample, and the model tensors' stride.

        Where nothing differs from sample to sample, all elements are one run.
        """
        total = self.sample.numel()
        if not self.tells_samples_apart and self.model_output.stride() == self.sample.stride():
            return 1, total, total
        batch = self.sample.shape[0] if self.sample.dim() > 0 else 1
        return batch, total // batch, self.model_output.stride(0) if batch > 1 else total // batch

    def channels(self) -> int:
        """Of a plain call: 1 where each sample's memory is in row-major order, its channels where it is channels-last.

        Any other dense order counts as the latter; only a call with seeds asks, and has neither.
        """
        expected = 1
        for size, stride in zip(reversed(self.sample.shape[1:]), reversed(self.sample.stride()[1:]), strict=True):
            if size != 1 and stride != expected:
                return self.sample.shape[1]
            expected *= size
        return 1
