# SPDX-License-Identifier: MIT
"""Runs a checked call, whose tensors are in memory, on the backend that was chosen for it."""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from . import backends, reference
from .call import StepCall, Target
from .checks import check
from .fallback import backend_to_run
from .layout import hand_back, laid_out, make_plain, model_input_strides, output_strides


def run(call: StepCall, out: tuple[Target, ...] | None, name: str) -> tuple[Tensor, ...]:
    """The results of a call, `out`'s own tensors where they could be written at once."""
    if name == "reference":
        return reference_step(call, out)
    plain = make_plain(call, out)
    if call.sample.numel() > 0:
        backends.RUN[name](plain)
    hand_back(call, plain)
    return plain.outputs


def execute(
    sample: Tensor, model_output: Tensor, table: Tensor, row: int, rows: Tensor | None, uncond: Tensor | None,
    guidance: Tensor | None, history_0: Tensor | None, history_1: Tensor | None, history_2: Tensor | None,
    history_3: Tensor | None, noise: Tensor | None, variance: Tensor | None, threshold: Tensor | None,
    variance_kind: int, keeps: int, seeds: Tensor | None, noise_step: int, noise_steps: Tensor | None, purpose: int,
    model_input_dtype: torch.dtype | None, model_input_copies: int, prev_sample_dtype: torch.dtype | None,
    keep_0_dtype: torch.dtype | None, keep_1_dtype: torch.dtype | None, backend: str,
) -> list[Tensor]:  # fmt: skip
    """The inside of `fastdiff::step`, with its arguments."""
    call = StepCall(
        sample, model_output, table, row if rows is None else rows, uncond, guidance,
        (history_0, history_1, history_2, history_3), noise, variance, threshold, variance_kind, keeps, seeds,
        noise_step if noise_steps is None else noise_steps, purpose,
    )  # fmt: skip
    out = (prev_sample_dtype, keep_0_dtype, keep_1_dtype)[: keeps + 1]
    return run_new(call, model_input_dtype, model_input_copies, backend, out)


#: The arguments of `fastdiff::step` in order, those that say in which dtype a result is, and those that are tensors.
ARGUMENTS = tuple(inspect.signature(execute).parameters)
RESULT_DTYPES = ("prev_sample_dtype", "keep_0_dtype", "keep_1_dtype")
TENSORS = tuple(name for name in ARGUMENTS if "Tensor" in execute.__annotations__[name])


def run_new(
    call: StepCall, dtype: torch.dtype | None, copies: int, backend: str, out: tuple[torch.dtype | None, ...]
) -> list[Tensor]:
    """Check a call and run it to tensors of its own, `out` naming their dtypes, the model input last."""
    model_input = new_model_input(call.sample, dtype, copies)
    with torch.no_grad():
        if model_input:
            call = replace(call, model_input=model_input[0])
        if backends.extension is not None and (backend or backends.forced_backend()) in (None, "cpu", "cuda"):
            done = backends.extension_step(call, out)
            if done is not None:
                return [*done, *model_input]
        check(call, out)
        results = run(call, out, backend_to_run(call.sample, backend or None))
        strides = output_strides(call.sample)
        return [laid_out(result, strides) for result in results] + model_input


def new_model_input(sample: Tensor, dtype: torch.dtype | None, copies: int) -> list[Tensor]:
    """A tensor for the next model input in a list, an empty one where none is asked for."""
    if dtype is None:
        return []
    shape = (copies * sample.shape[0], *sample.shape[1:])
    return [sample.new_empty_strided(shape, model_input_strides(sample), dtype=dtype)]


def reference_step(call: StepCall, out: tuple[Target, ...] | None) -> tuple[Tensor, ...]:
    """The reference's own results, inside autograd's graph; registers and the model input are written."""
    noise = call.noise
    if call.seeds is not None:
        noise = reference.drawn_noise(call.sample, call.seeds, call.noise_step, call.purpose)
    keywords: dict[str, Any] = {
        "uncond": call.uncond,
        "guidance": call.guidance,
        "history": call.history,
        "noise": noise,
        "variance": call.variance,
        "threshold": call.threshold,
        "variance_kind": call.variance_kind,
        "keeps": 2 if call.scatter else call.keeps,
        # What goes to registers is rounded to theirs.
        "dtypes": call.output_dtypes(out) + [call.table.dtype] * (2 if call.scatter else 0),
    }
    if isinstance(call.row, Tensor):
        # What registers held is `stored`'s to keep, not the outputs'.
        before = None if call.scatter or out is None else [t if isinstance(t, Tensor) else None for t in out]
        results = reference.step_rows(call.sample, call.model_output, call.table, call.row, out=before, **keywords)
    else:
        results = reference.step(call.sample, call.model_output, call.table[call.row], **keywords)
    after: list[Tensor | None] = []
    if call.scatter:
        assert isinstance(call.row, Tensor)
        after = reference.stored(call.table, call.row, call.history, results[1:])
        results = results[:1]
    if call.model_input is not None:
        scaled = (call.table, call.row, call.model_input.dtype, call.model_input_copies)
        call.model_input.copy_(reference.model_input(results[0], *scaled))
    for register, value in zip(call.history, after, strict=False):
        if register is not None and value is not None:
            register.copy_(value)
    return tuple(results)
