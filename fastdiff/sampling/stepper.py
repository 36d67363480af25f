# SPDX-License-Identifier: MIT
"""Walks a step table: the index of the next row, the history, the noise of each step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..deprecated import renamed_argument
from ..device_copy import to_device
from ..errors import as_float, checked_float, checked_type, error_message
from ..guidance import rescaling_of, rows_with_scaled_output
from ..noise.generators import Generators, draw
from ..ops.backends import direct_step
from ..ops.call import StepCall
from ..ops.checks import check_dtype
from ..ops.step import complete_step, number_or_tensor
from ..ops.thresholding import dynamic_threshold
from ..philox import as_seeds
from ..row_layout import NUM_REGISTERS, Variance, compute_dtype
from ..solvers.table import StepTable, prediction_rows
from .blend_target import BlendTarget
from .config import check_guidance_rescale
from .single_steps import cfg_combine

_SLOTS = range(NUM_REGISTERS)


class _NoSamples:
    """Takes the place of the last step's result before there is one: no argument of a step is this class."""


class Stepper:
    """The state of one loop over a table.

    The history slots are written in place, so a loop allocates them once; they are the stepper's own, and no result
    shares their memory.  `index` moves only when a step has succeeded.  A copy (copy.copy, copy.deepcopy, pickle) has
    history slots of its own and goes on by itself from the same step.

    Args:
        table: the compiled sampler.
        dynamic_thresholding_ratio, sample_max_value: of `fastdiff.ops.thresholding.dynamic_threshold`, where the
            table asks for it.
        seeds: one for each sample, as in `fastdiff.randn`: steps then draw their noise themselves, and no generator is
            asked.  A sample's noise depends on its seed and on the step alone.
        target: what steps with a mask blend their samples with.
        backend: forces one for all steps, as in `fastdiff.ops.step`.
        guidance_rescale: φ, 0 to 1, of rescaled guidance (arXiv 2305.08891, section 3.4): two reductions and the guided
            output for them, where a step has `uncond`; the step itself takes the factor in its row, a sample.

    Raises:
        TypeError, ValueError: an argument does not fit, or the table has no room for the target.
    """

    def __init__(
        self,
        table: StepTable,
        *,
        dynamic_thresholding_ratio: float = 0.995,
        sample_max_value: float = 1.0,
        seeds: int | Sequence[int] | Tensor | None = None,
        target: BlendTarget | None = None,
        backend: str | None = None,
        guidance_rescale: float = 0.0,
    ) -> None:
        checked_type("Stepper", "table", table, StepTable, "a StepTable", "pass sampler.table, or a solver's result")
        if table.thresholding:
            checked_float("Stepper", "dynamic_thresholding_ratio", dynamic_thresholding_ratio, 0.0, strict=True)
            as_float("Stepper", "sample_max_value", sample_max_value)
        check_guidance_rescale("Stepper", guidance_rescale)
        self.table = table
        self.index = 0
        self._rescale = guidance_rescale
        self.backend = backend
        self._ratio = dynamic_thresholding_ratio
        self._max_value = sample_max_value
        self._given_seeds = seeds
        self._target = target
        self._target_slots: tuple[int, ...] = ()
        self._seeds: Tensor | None = None
        self._history: list[Tensor | None] = [None] * NUM_REGISTERS
        if target is not None:
            self._target_slots = target.slots(table)
            for slot, tensor in zip(self._target_slots, (target.known, target.noise), strict=True):
                self._history[slot] = tensor
        self._coefficients: Tensor | None = None
        self._shape: torch.Size
        self._dtype: torch.dtype
        self._on_cpu: bool
        #: The last step's result: samples that come back need not be looked at again.
        self._seen: object = _NoSamples
        self._end = len(table)
        self._plan = tuple(zip(table.read_slots, table.kept_slots, table.draws_noise, strict=True))
        self._measures = table.thresholding or table.variance != Variance.FIXED
        self._prediction_table: Tensor | None = None
        #: True while history may be written in place: autograd has saved none of it.
        self._in_place = True

    def __getstate__(self) -> dict[str, object]:
        """Copy the history, which either stepper would write over, and forget the last samples."""
        history = [None if slot is None else slot.clone() for slot in self._history]
        return {**self.__dict__, "_history": history, "_seen": _NoSamples}

    @property
    def done(self) -> bool:
        return self.index == self._end

    def provide(self, slot: int, tensor: Tensor) -> None:
        """Set one of the table's `provided_slots` for the next step; the stepper reads the tensor only.

        Args:
            slot: a history slot.
            tensor: like the samples.

        Raises:
            ValueError: the table's rows do not leave the slot to the caller.
        """
        if slot not in self.table.provided_slots:
            slots = list(self.table.provided_slots)
            raise ValueError(
                error_message("provide", "slot", f"is {slot}", f"one of {slots}", "use a table with provided_slots")
            )
        self._history[slot] = tensor

    def step(
        self,
        sample: Tensor,
        model_output: Tensor,
        *,
        uncond: Tensor | None = None,
        guidance_scale: float | Tensor | None = None,
        variance: Tensor | None = None,
        mask: Tensor | None = None,
        noise: Tensor | None = None,
        generator: Generators = None,
        out: Tensor | None = None,
        model_input: Tensor | None = None,
        rows: tuple[Tensor, int | Tensor] | None = None,
        guidance: float | Tensor | None = None,
    ) -> Tensor:
        """Take the next row's step.

        Args:
            sample: x, ``[B, ...]``; shape, dtype and device must stay the same throughout a loop.
            model_output, uncond, guidance_scale, variance: as in `fastdiff.ops.step`.
            mask: like `sample`: 0 keeps the step's result, 1 takes the stepper's target, to the bit.
            noise: z, like `sample`; where None and the row wants it, drawn from the seeds or with `generator`.
            generator: one, or one a sample.
            out: a tensor to write instead of a new one; may be `sample`.
            model_input: a tensor to write the next model input to, as in `fastdiff.ops.step`.
            rows: a table and a row index of it, as in `fastdiff.ops.step`, in place of the next row: it reads and keeps
                the same history.  `guidance_rescale` is not applied then.
            guidance: former name of `guidance_scale`; deprecated.

        Returns:
            The previous sample.

        Raises:
            IndexError: the table has no row left.
            TypeError, ValueError: as `fastdiff.ops.step`; the stepper is then as it was.
        """
        if guidance is not None:
            guidance_scale = renamed_argument("step", "guidance", guidance, "guidance_scale", guidance_scale)
        row = self.index
        if row == self._end:
            raise IndexError(
                error_message(
                    "step",
                    "index",
                    f"is {row}",
                    f"less than the table's {self._end} rows",
                    "the loop has ended: start a new stepper",
                )
            )
        if mask is not None and self._target is None:
            remedy = "make the stepper with target=fastdiff.sampling.BlendTarget(...)"
            raise ValueError(error_message("step", "mask", "is given", "none without a target to blend with", remedy))
        if sample is not self._seen:
            self._look_at(sample)
        history, coefficients = self._history, self._coefficients
        reads, slots, draws = self._plan[row]
        if mask is not None:
            reads = (*reads, *self._target_slots)
        seeds = None
        if draws and noise is None:
            seeds = self._seeds
            if seeds is None:
                noise = draw(sample.shape, generator, dtype=sample.dtype, device=sample.device)
        threshold, kind, factor = None, 0, None
        row_index: int | Tensor = row
        if rows is not None:
            coefficients, row_index = rows
        elif self._rescale and uncond is not None:
            factor = self._factor(model_output, uncond, guidance_scale)
        if self._measures:
            threshold = self._threshold(row, sample, model_output, uncond, guidance_scale, factor, rows)
            kind = self._variance_kind(variance)
        keeps = len(slots)
        outs: tuple[Tensor | None, ...] | None = None
        if keeps == 0:
            if out is not None:
                outs = (out,)
        elif not self._in_place:
            outs = (out, *[None] * keeps)
        elif keeps == 1:
            outs = (out, history[slots[0]])
        else:
            outs = (out, history[slots[0]], history[slots[1]])
        # A small step's time is the way to its loop: it is offered to the extension first. On the CPU a history slot
        # that a row does not read costs nothing; a GPU's kernel would load it.
        extension, triton = direct_step(self.backend)
        results = None
        if factor is not None:
            assert coefficients is not None
            coefficients, row_index = rows_with_scaled_output(coefficients[row : row + 1], factor)
            extension = None
        if extension is not None:
            results = extension.step(
                sample=sample,
                model_output=model_output,
                table=coefficients,
                row_index=row_index,
                uncond=uncond,
                guidance_scale=guidance_scale,
                history=history if self._on_cpu else [history[j] if j in reads else None for j in _SLOTS],
                noise=noise,
                variance=variance,
                mask=mask,
                threshold=threshold,
                variance_kind=kind,
                keeps=keeps,
                seeds=seeds,
                noise_step=row,
                model_input=model_input,
                out=outs,
                triton=triton,
            )
        if type(results) is not tuple:
            if outs is not None and torch.compiler.is_compiling():
                outs = (out, *[None] * keeps)  # a compiler plans the memory itself
            fields: dict[str, Any] = {
                "sample": sample,
                "model_output": model_output,
                "table": coefficients,
                "row_index": row_index,
                "uncond": uncond,
                "guidance_scale": number_or_tensor(guidance_scale),
                "history": tuple([history[j] if j in reads else None for j in range(NUM_REGISTERS)]),
                "noise": noise,
                "variance": variance,
                "mask": mask,
                "threshold": threshold,
                "variance_kind": kind,
                "keeps": keeps,
                "seeds": seeds,
                "noise_step": row,
                "model_input": model_input,
                "out": outs,
            }
            if extension is None:
                results = ops.step(**fields, backend=self.backend)
            else:
                results = complete_step(StepCall(**fields), self.backend)
            if any(result.requires_grad for result in results):
                self._in_place = False
        if keeps:
            history[slots[0]] = results[1]
        if keeps == 2:
            history[slots[1]] = results[2]
        self.index = row + 1
        result = results[0]
        self._seen = result
        return result

    def _look_at(self, sample: Tensor) -> None:
        """Compare samples with those of the steps before; until a first step succeeds, prepare what depends on them."""
        checked_type("step", "sample", sample, Tensor, "a torch.Tensor", "pass a tensor")
        if self.index > 0:
            if sample.shape == self._shape and sample.dtype is self._dtype:
                return
            raise ValueError(
                error_message(
                    "step",
                    "sample",
                    f"has shape {list(sample.shape)} and {sample.dtype}",
                    f"{list(self._shape)} and {self._dtype} as in the steps before",
                    "start a new stepper for other samples",
                )
            )
        check_dtype("sample", sample.dtype)
        if self._given_seeds is not None:
            self._seeds = as_seeds(self._given_seeds, sample.shape[0] if sample.dim() > 0 else 1, sample.device)
        self._prediction_table = None
        self._shape, self._dtype = sample.shape, sample.dtype
        self._on_cpu = sample.device.type == "cpu"
        if self._target is None:
            self._coefficients = self.table.shared_coefficients(sample.dtype, sample.device)
            return
        # A known float64 tensor makes the step one in float64.
        dtypes = [t.dtype for t in (self._target.known, self._target.noise) if t is not None]
        dtype = compute_dtype(sample.dtype, *dtypes)
        self._coefficients = to_device(self._target.coefficients(self.table).to(dtype), sample.device).contiguous()

    def predict(
        self,
        index: int,
        sample: Tensor,
        model_output: Tensor,
        *,
        uncond: Tensor | None = None,
        guidance_scale: float | Tensor | None = None,
    ) -> Tensor:
        """Return the x0 that a row's step predicts: guided, and clipped or thresholded as in the step.

        Args:
            index: the row.
            sample, model_output, uncond, guidance_scale: of the step, as in `step`.

        Returns:
            x0, like `sample`; the stepper is as it was.
        """
        factor = None
        if self._rescale and uncond is not None:
            factor = self._factor(model_output, uncond, guidance_scale)
        x0 = self._prediction(index, sample, model_output, uncond, guidance_scale, factor)
        if self.table.thresholding:
            bound = dynamic_threshold(x0, self._ratio, self._max_value).reshape(-1, *[1] * (x0.dim() - 1))
            return (x0.clamp(-bound, bound) / bound).to(x0.dtype)
        clip = self.table.source[index].clip
        return x0.clamp(-clip, clip) if math.isfinite(clip) else x0

    def _factor(self, model_output: Tensor, uncond: Tensor, guidance_scale: float | Tensor | None) -> Tensor:
        """Return the factor of rescaled guidance, ``[B]``."""
        if guidance_scale is None:
            got, remedy = "is missing", "pass it beside uncond"
            raise ValueError(error_message("step", "guidance_scale", got, "a number or [B]", remedy))
        guided = cfg_combine(model_output, uncond, guidance_scale, backend=self.backend)
        return rescaling_of(guided, model_output, self._rescale)

    def _prediction(
        self,
        index: int,
        sample: Tensor,
        model_output: Tensor,
        uncond: Tensor | None,
        guidance_scale: float | Tensor | None,
        factor: Tensor | None,
        rows: tuple[Tensor, int | Tensor] | None = None,
    ) -> Tensor:
        """Return the unbounded x0 of a row's step."""
        if self._prediction_table is None:
            self._prediction_table = self.table.shared_coefficients(sample.dtype, sample.device, prediction=True)
        table = self._prediction_table
        row_index: int | Tensor = index
        if rows is not None:
            table, row_index = prediction_rows(rows[0]), rows[1]
        elif factor is not None:
            table, row_index = rows_with_scaled_output(table[index : index + 1], factor)
        (x0,) = ops.step(
            sample,
            model_output,
            table,
            row_index,
            uncond=uncond,
            guidance_scale=guidance_scale,
            backend=self.backend,
        )
        return x0

    def _threshold(
        self,
        index: int,
        sample: Tensor,
        model_output: Tensor,
        uncond: Tensor | None,
        guidance_scale: float | Tensor | None,
        factor: Tensor | None,
        rows: tuple[Tensor, int | Tensor] | None,
    ) -> Tensor | None:
        """Return the bound of x0 for each sample, where the table asks for it."""
        if not self.table.thresholding:
            return None
        x0 = self._prediction(index, sample, model_output, uncond, guidance_scale, factor, rows)
        return dynamic_threshold(x0, self._ratio, self._max_value)

    def _variance_kind(self, variance: Tensor | None) -> int:
        if variance is None and self.table.variance != Variance.FIXED and self.table.draws_noise[self.index]:
            raise ValueError(
                error_message(
                    "step",
                    "variance",
                    "is missing",
                    "the model's second output, since the table was made for a learned variance",
                    "pass the second half of the channels as variance, or choose a fixed variance_type",
                )
            )
        return int(self.table.variance if variance is not None else Variance.FIXED)
