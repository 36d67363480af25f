# SPDX-License-Identifier: MIT
"""The step as operators of torch's dispatcher: for torch.compile, export, autograd and torch.func.

`fastdiff::step` is functional: all its results are new tensors, the next model input among them.  `fastdiff::step_rows`
writes its registers.  What the public functions were given to write (``out=``, ``model_input=``) is written after the
operator, in torch operators that a compiler sees.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, List  # noqa: UP035 (torch 2.6 reads no list[Tensor] in an operator's signature)

import torch
from torch import Tensor

from ..row_layout import NUM_REGISTERS
from . import reference
from .autograd import apply_step, backward, setup_context
from .call import StepCall, Target
from .dispatch import ARGUMENTS, RESULT_DTYPES, execute, new_model_input, run_new
from .layout import output_strides
from .vmap import fold_step, refuse_step_rows

#: An operator's results keep the strides that its fake tells, whatever inductor does to its inputs.
_TAGS: dict[str, Any] = {"tags": (torch.Tag.needs_exact_strides,)} if hasattr(torch.Tag, "needs_exact_strides") else {}


@torch.library.custom_op("fastdiff::step", mutates_args=(), **_TAGS)
def step_op(
    sample: Tensor,
    model_output: Tensor,
    table: Tensor,
    row: int,
    rows: Tensor | None,
    uncond: Tensor | None,
    guidance: Tensor | None,
    history_0: Tensor | None,
    history_1: Tensor | None,
    history_2: Tensor | None,
    history_3: Tensor | None,
    noise: Tensor | None,
    variance: Tensor | None,
    threshold: Tensor | None,
    variance_kind: int,
    keeps: int,
    seeds: Tensor | None,
    noise_step: int,
    noise_steps: Tensor | None,
    purpose: int,
    model_input_dtype: torch.dtype | None,
    model_input_copies: int,
    prev_sample_dtype: torch.dtype | None,
    keep_0_dtype: torch.dtype | None,
    keep_1_dtype: torch.dtype | None,
    backend: str,
) -> List[Tensor]:  # noqa: UP006
    """`fastdiff.ops.step`: prev_sample, the kept tensors, and the model input where a dtype is given for it.

    `rows` and `noise_steps` take the place of `row` and `noise_step`; an empty `backend` leaves the choice.  Results
    without a dtype have the sample's.
    """
    return execute(
        sample, model_output, table, row, rows, uncond, guidance, history_0, history_1, history_2, history_3, noise,
        variance, threshold, variance_kind, keeps, seeds, noise_step, noise_steps, purpose, model_input_dtype,
        model_input_copies, prev_sample_dtype, keep_0_dtype, keep_1_dtype, backend,
    )  # fmt: skip


@step_op.register_fake
def _(sample: Tensor, *rest: Any) -> list[Tensor]:
    given = dict(zip(ARGUMENTS[1:], rest, strict=True))
    strides = output_strides(sample)
    dtypes = [given[name] or sample.dtype for name in RESULT_DTYPES[: given["keeps"] + 1]]
    results = [sample.new_empty_strided(sample.shape, strides, dtype=dtype) for dtype in dtypes]
    return results + new_model_input(sample, given["model_input_dtype"], given["model_input_copies"])


torch.library.register_autograd(step_op, backward, setup_context=setup_context)
torch.library.register_vmap(step_op, fold_step)


@torch.library.custom_op("fastdiff::step_rows", mutates_args={"registers"}, **_TAGS)
def step_rows_op(
    sample: Tensor,
    model_output: Tensor,
    table: Tensor,
    rows: Tensor,
    registers: Sequence[Tensor],
    slots: Sequence[int],
    uncond: Tensor | None,
    guidance: Tensor | None,
    noise: Tensor | None,
    variance: Tensor | None,
    threshold: Tensor | None,
    variance_kind: int,
    seeds: Tensor | None,
    noise_step: int,
    noise_steps: Tensor | None,
    purpose: int,
    prev_sample_dtype: torch.dtype | None,
    model_input_dtype: torch.dtype | None,
    model_input_copies: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """`fastdiff.ops.step_rows`: prev_sample, and the model input, which holds nothing where no dtype is given for it.

    A schema cannot say that tensors that may be None are written: `registers` are those present, `slots` their numbers.
    """
    history: list[Tensor | None] = [None] * NUM_REGISTERS
    for slot, register in zip(slots, registers, strict=True):
        history[slot] = register
    call = StepCall(
        sample, model_output, table, rows, uncond, guidance, tuple(history), noise, variance, threshold,
        variance_kind, 0, seeds, noise_step if noise_steps is None else noise_steps, purpose, scatter=True,
    )  # fmt: skip
    new, *model_input = run_new(call, model_input_dtype, model_input_copies, backend, (prev_sample_dtype,))
    return new, model_input[0] if model_input else sample.new_empty(0)


@step_rows_op.register_fake
def _(sample: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    new = sample.new_empty_strided(sample.shape, output_strides(sample), dtype=rest[-4] or sample.dtype)
    model_input = new_model_input(sample, rest[-3], rest[-2])
    return new, model_input[0] if model_input else sample.new_empty(0)


torch.library.register_vmap(step_rows_op, refuse_step_rows)


def call_library(call: StepCall, out: Sequence[Target] | None, backend: str) -> tuple[Tensor, ...]:
    """A checked call through its operator; then what the caller gave to be written is."""
    # None for the sample's own, which is what most calls have.
    dtypes = [None if dtype == call.sample.dtype else dtype for dtype in call.output_dtypes(out)]
    steps = call.noise_step if isinstance(call.noise_step, Tensor) else None
    drawn = (call.seeds, 0 if isinstance(call.noise_step, Tensor) else call.noise_step, steps, int(call.purpose))
    asked: tuple[Any, ...] = (None, 1)
    if call.model_input is not None:
        asked = (call.model_input.dtype, call.model_input_copies)
    guided = (call.uncond, call.guidance)
    if call.scatter:
        slots = [j for j, register in enumerate(call.history) if register is not None]
        results = torch.ops.fastdiff.step_rows(
            call.sample, call.model_output, call.table, call.row, [call.history[j] for j in slots], slots, *guided,
            call.noise, call.variance, call.threshold, int(call.variance_kind), *drawn, *dtypes, *asked, backend,
        )  # fmt: skip
        results = results if call.model_input is not None else results[:1]
    else:
        row, rows = (0, call.row) if isinstance(call.row, Tensor) else (call.row, None)
        history = (*call.history, *[None] * NUM_REGISTERS)[:NUM_REGISTERS]
        results = apply_step(
            call.sample, call.model_output, call.table, row, rows, *guided, *history, call.noise, call.variance,
            call.threshold, int(call.variance_kind), call.keeps, *drawn, *asked,
            *(*dtypes, None, None)[: len(RESULT_DTYPES)], backend,
        )  # fmt: skip
    if call.model_input is not None:
        call.model_input.copy_(results[-1])
        results = results[:-1]
    if out is None:
        return tuple(results)
    return tuple(
        target.copy_(_where_taken(call, value, target) if o else value) if isinstance(target, Tensor) else value
        for o, (target, value) in enumerate(zip(out, results, strict=True))
    )


def _where_taken(call: StepCall, value: Tensor, target: Tensor) -> Tensor:
    """A kept tensor, with what its target held where a sample is skipped."""
    if not isinstance(call.row, Tensor):
        return value
    _, taken = reference.chosen(call.table, call.row)
    return torch.where(reference.a_sample(taken, value), value, target)
