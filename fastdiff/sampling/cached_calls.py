# SPDX-License-Identifier: MIT
"""Walks a step table with fewer model calls: a sample without a call takes a cache row, in the pass of the others."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import ops
from ..device_copy import to_device
from ..errors import checked_float, checked_integer, checked_type, error_message
from ..noise.generators import Generators, draw
from ..ops.thresholding import dynamic_threshold
from ..philox import as_seeds
from ..row_layout import NUM_REGISTERS, compute_dtype
from ..solvers.affine import MODEL_OUTPUT
from ..solvers.cached_calls import (
    cache_row,
    calling_row,
    check_extrapolation,
    check_skip,
    extrapolation_weights,
    free_slots,
    has_bounded_x0,
)
from ..solvers.table import Row, StepTable, prediction_rows


@dataclass(frozen=True, eq=False)
class CachedCalls:
    """The policy of a loop with cached model calls: the steps without a call, and how they extrapolate.

    Args:
        skip: indices of the steps without a call; or a collection of them for each sample.
        threshold: instead of `skip`: a sample goes without a call while the relative changes of its model input,
            ‖x_i − x_(i−1)‖/‖x_(i−1)‖ summed since its last call, stay below this: a float, or one a sample.  TeaCache
            (arXiv 2411.19108, eq. 7) sums such changes of an embedding of the input.  The decision is a host sync.
        first_calls: the number of first steps that call the model whatever the threshold.
        last_calls: the number of last steps that do.
        longest: the most steps in a row without a call under a threshold.
        extrapolation, order, ridge: as in `fastdiff.solvers.cached_calls.extrapolation_weights`.

    Raises:
        TypeError, ValueError: a field does not fit.
    """

    skip: Collection[int] | Sequence[Collection[int]] = ()
    threshold: float | Sequence[float] | None = None
    first_calls: int = 2
    last_calls: int = 1
    longest: int = 3
    extrapolation: str = "linear"
    order: int = 1
    ridge: float = 1e-3

    def __post_init__(self) -> None:
        check_extrapolation("CachedCalls", self.extrapolation, self.order, self.ridge)
        if self.threshold is not None:
            if len(self.skip) > 0:
                remedy = "pass skip or threshold"
                raise ValueError(error_message("CachedCalls", "threshold", "is set beside skip", "one rule", remedy))
            for number in self.threshold if isinstance(self.threshold, (list, tuple)) else (self.threshold,):
                checked_float("CachedCalls", "threshold", number, 0.0)
        checked_integer("CachedCalls", "first_calls", self.first_calls, 1)
        checked_integer("CachedCalls", "last_calls", self.last_calls, 0)
        checked_integer("CachedCalls", "longest", self.longest, 1)

    @property
    def per_sample(self) -> int | None:
        """The number of samples that the policy names; None if it is one for all."""
        given = self.skip if self.threshold is None else self.threshold
        if isinstance(given, (list, tuple)) and (
            self.threshold is not None or not all(isinstance(i, int) for i in given)
        ):
            return len(given)
        return None


class CachedStepper:
    """The state of one loop with cached calls.

    ::

        cached = CachedStepper(sampler.table, CachedCalls(skip=[4, 6, 8], extrapolation="taylor", order=2))
        for t in sampler.timesteps:
            chosen = cached.samples_to_call(x)  # None: all
            outputs = model(x, t) if chosen is None else model(x[chosen], t) if len(chosen) else None
            x = cached.step(x, outputs)

    The kept outputs are in history slots that the solver leaves free, up to four; plain guidance is kept combined.
    Each step is one pass; a second one combines the kept outputs first where x0 is clipped or thresholded.

    Args:
        table: the compiled sampler; a fixed variance.
        calls: the policy.
        dynamic_thresholding_ratio, sample_max_value, seeds, backend: as in `Stepper`.

    Attributes:
        index: the index of the next row.
        calls_made: model calls so far, summed over the samples.

    Raises:
        TypeError, ValueError: the table leaves no room, or the policy skips its first row.
    """

    def __init__(
        self,
        table: StepTable,
        calls: CachedCalls,
        *,
        dynamic_thresholding_ratio: float = 0.995,
        sample_max_value: float = 1.0,
        seeds: int | Sequence[int] | Tensor | None = None,
        backend: str | None = None,
    ) -> None:
        checked_type("CachedStepper", "table", table, StepTable, "a StepTable", "pass sampler.table")
        checked_type("CachedStepper", "calls", calls, CachedCalls, "a CachedCalls", "pass CachedCalls(skip=[…])")
        self.table, self.calls, self.backend = table, calls, backend
        self._free = free_slots(table)
        lists = calls.skip if calls.per_sample and calls.threshold is None else [calls.skip]
        self._skip = [check_skip("CachedCalls", one, len(table)) for one in lists]  # type: ignore[arg-type]
        self._bounds = dynamic_thresholding_ratio, sample_max_value
        self._given_seeds = seeds
        self.index = 0
        self.calls_made = 0
        self._history: list[Tensor | None] = [None] * NUM_REGISTERS
        self._past: list[list[tuple[float, int]]] = []  # of each sample: time and slot of kept outputs, newest first
        self._changes: list[float] = []
        self._skipped: list[int] = []
        self._last: Tensor | None = None
        self._decided: tuple[int, list[bool]] | None = None

    @property
    def done(self) -> bool:
        """True after the last row."""
        return self.index == len(self.table)

    def samples_to_call(self, sample: Tensor) -> Tensor | None:
        """Return the samples for which the next step needs the model, int64 ``[N]`` on the CPU; None for all of them.

        Args:
            sample: x, ``[B, ...]``, the next model input.
        """
        called = self._decide(sample)
        return None if all(called) else torch.tensor([i for i, call in enumerate(called) if call], dtype=torch.int64)

    def step(
        self,
        sample: Tensor,
        model_output: Tensor | None,
        *,
        uncond: Tensor | None = None,
        guidance_scale: float | Tensor | None = None,
        noise: Tensor | None = None,
        generator: Generators = None,
        model_input: Tensor | None = None,
    ) -> Tensor:
        """Take the next row's step of each sample.

        Args:
            sample: x, ``[B, ...]``.
            model_output, uncond: the outputs, like `sample`, or ``[N, ...]`` for the samples of `samples_to_call`; None
                where it names no sample.
            guidance_scale: a float; goes with `uncond`.
            noise, generator, model_input: as in `Stepper.step`.

        Returns:
            The previous sample, a new tensor.

        Raises:
            IndexError: the table has no row left.
            TypeError, ValueError: an argument does not fit; the stepper is then as it was.
        """
        if self.done:
            remedy = "the loop has ended: start a new stepper"
            raise IndexError(error_message("step", "index", f"is {self.index}", "a row of the table", remedy))
        called = self._decide(sample)
        chosen = [i for i, call in enumerate(called) if call]
        output = self._whole("model_output", model_output, sample, chosen)
        other = None if uncond is None else self._whole("uncond", uncond, sample, chosen)
        row = self.table.source[self.index]
        bounded = self.table.thresholding or has_bounded_x0(row)
        rows, past = self._rows(row, called, bounded)
        unique = list(dict.fromkeys(rows))
        dtype = compute_dtype(sample.dtype)
        indices = to_device(torch.tensor([unique.index(one) for one in rows]), sample.device)
        history = self._prepared_history(sample)
        if bounded and len(chosen) < len(called):
            output = self._combined(sample, output, other, guidance_scale, called, history)
            other = guidance_scale = None
        table = to_device(torch.tensor([one.scalars() for one in unique], dtype=dtype), sample.device)
        threshold = None
        if self.table.thresholding:
            (x0,) = ops.step(
                sample, output, prediction_rows(table), indices, uncond=other, guidance_scale=guidance_scale,
                backend=self.backend,
            )  # fmt: skip
            threshold = dynamic_threshold(x0, *self._bounds)
        seeds = None
        if self.table.draws_noise[self.index] and noise is None:
            if self._given_seeds is not None:
                seeds = as_seeds(self._given_seeds, sample.shape[0], sample.device)
            else:
                noise = draw(sample.shape, generator, dtype=sample.dtype, device=sample.device)
        result = ops.step_rows(
            sample, output, table, indices, history, uncond=other, guidance_scale=guidance_scale, noise=noise,
            seeds=seeds, noise_step=self.index, threshold=threshold, model_input=model_input, backend=self.backend,
        )  # fmt: skip
        self._past, self._history = past, history
        self.calls_made += len(chosen)
        for i, call in enumerate(called):
            self._changes[i] = 0.0 if call else self._changes[i]
            self._skipped[i] = 0 if call else self._skipped[i] + 1
        self._last = sample if self.calls.threshold is not None else None
        self.index += 1
        return result

    def _decide(self, sample: Tensor) -> list[bool]:
        """Return for each sample whether the next step calls the model for it."""
        if self._decided is not None and self._decided[0] == self.index:
            return self._decided[1]
        checked_type("step", "sample", sample, Tensor, "a torch.Tensor", "pass a tensor")
        batch = sample.shape[0]
        if self.index == 0:
            if self.calls.per_sample not in (None, batch):
                got, remedy = f"is for {self.calls.per_sample} samples", "pass one entry a sample"
                raise ValueError(error_message("CachedCalls", "skip", got, f"{batch} samples", remedy))
            self._past = [[] for _ in range(batch)]
            self._changes, self._skipped = [0.0] * batch, [0] * batch
        if self.calls.threshold is None:
            skips = self._skip if len(self._skip) == batch else self._skip * batch
            called = [self.index not in skip for skip in skips]
        else:
            called = self._decide_by_change(sample, self.calls.threshold)
        self._decided = self.index, called
        return called

    def _decide_by_change(self, sample: Tensor, threshold: float | Sequence[float]) -> list[bool]:
        batch = sample.shape[0]
        limits = list(threshold) if isinstance(threshold, (list, tuple)) else [float(threshold)] * batch  # type: ignore[arg-type]
        if self._last is None:
            return [True] * batch
        products = ops.gram([sample, self._last]).tolist()
        for i, ((xx, xy), (_, yy)) in enumerate(products):
            self._changes[i] += (max(xx - 2.0 * xy + yy, 0.0) / yy) ** 0.5 if yy > 0.0 else float("inf")
        calls = self.calls
        if not calls.first_calls <= self.index < len(self.table) - calls.last_calls:
            return [True] * batch
        return [
            self._changes[i] >= limits[i] or self._skipped[i] >= calls.longest or not self._past[i]
            for i in range(batch)
        ]

    def _rows(self, row: Row, called: Sequence[bool], bounded: bool) -> tuple[list[Row], list[list[tuple[float, int]]]]:
        """Return each sample's row, and what it has kept after the step."""
        rows, past = [], []
        free = self._free
        for before, call in zip(self._past, called, strict=True):
            if call:
                slot = free[len(before)] if len(before) < len(free) else before[-1][1]
                rows.append(calling_row(row, slot))
                past.append([(row.timestep, slot), *before][: len(free)])
            else:
                rows.append(row if bounded else cache_row(row, *self._extrapolated(before)))
                past.append(before)
        return rows, past

    def _extrapolated(self, past: Sequence[tuple[float, int]]) -> tuple[list[int], list[float]]:
        """Return the slots of kept outputs and their weights in the next row's model output."""
        calls, time = self.calls, self.table.timesteps[self.index]
        weights = extrapolation_weights([t for t, _ in past], time, calls.extrapolation, calls.order, calls.ridge)
        return [slot for _, slot in past], weights

    def _combined(
        self, sample: Tensor, output: Tensor, uncond: Tensor | None, guidance_scale: float | Tensor | None,
        called: Sequence[bool], history: list[Tensor | None],
    ) -> Tensor:  # fmt: skip
        """Return the model's output of the samples with a call, and the extrapolated one of the others."""
        copied = Row(0.0, MODEL_OUTPUT, (0.0, 1.0))
        rows = [
            copied if call else cache_row(copied, *self._extrapolated(past))
            for past, call in zip(self._past, called, strict=True)
        ]
        table = torch.tensor([one.scalars() for one in rows], dtype=compute_dtype(sample.dtype))
        indices = to_device(torch.arange(len(rows)), sample.device)
        (combined,) = ops.step(
            sample, output, to_device(table, sample.device), indices, uncond=uncond, guidance_scale=guidance_scale,
            history=history, backend=self.backend,
        )  # fmt: skip
        return combined

    def _prepared_history(self, sample: Tensor) -> list[Tensor | None]:
        used = {slot for slots in self.table.kept_slots for slot in slots}
        slots = used.union(self._free)
        return [
            (torch.zeros_like(sample) if tensor is None else tensor) if j in slots else None
            for j, tensor in enumerate(self._history)
        ]

    def _whole(self, name: str, output: Tensor | None, sample: Tensor, chosen: Sequence[int]) -> Tensor:
        """Return an output for all samples; those without a call get their sample, which is not read."""
        if output is None and not chosen:
            return sample
        checked_type("step", name, output, Tensor, "a torch.Tensor", "pass the model's output")
        assert output is not None
        if output.shape == sample.shape:
            return output
        if output.shape != (len(chosen), *sample.shape[1:]):
            got, expected = f"has shape {list(output.shape)}", f"{[len(chosen), *sample.shape[1:]]}"
            raise ValueError(error_message("step", name, got, expected, "pass the outputs of samples_to_call"))
        if not chosen:
            return sample
        return sample.index_copy(0, to_device(torch.tensor(chosen), sample.device), output.to(sample.dtype))
