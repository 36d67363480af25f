# SPDX-License-Identifier: MIT
"""The step as operators of torch's dispatcher: for torch.compile, export, autograd and torch.func.

`fastdiff::step` is functional: all its results are new tensors, the next model input among them.  `fastdiff::step_rows`
writes its history slots.  What the public functions were given to write (``out=``, ``model_input=``) is written after
the operator, in torch operators that a compiler sees.  Schemas and fakes follow from the fields of `StepCall`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import reference
from .autograd import apply_step, backward, setup_context
from .call import RESULT_DTYPES, STEP_ARGUMENTS, STEP_ROWS_ARGUMENTS, StepCall, call_of, named, operator_values, schema
from .dispatch import execute, new_model_input, run_new
from .layout import output_strides
from .vmap import fold_step, refuse_step_rows

#: An operator's results keep the strides that its fake has, whatever inductor does to its inputs.
_TAGS: dict[str, Any] = {"tags": (torch.Tag.needs_exact_strides,)} if hasattr(torch.Tag, "needs_exact_strides") else {}


@torch.library.custom_op("fastdiff::step", mutates_args=(), schema=schema(STEP_ARGUMENTS, "Tensor[]"), **_TAGS)
def step_op(*values: Any) -> Any:  # torch 2.6 reads no list[...] here; the schema says what it returns
    """`fastdiff.ops.step`: prev_sample, the kept outputs, and the model input where a dtype is given for it.

    `row_indices` and `noise_steps` take the place of `row_index` and `noise_step`; an empty `backend` leaves the
    choice.  Results without a dtype have the sample's.
    """
    return execute(*values)


@step_op.register_fake
def _(*values: Any) -> list[Tensor]:
    given = named(STEP_ARGUMENTS, values)
    return _new_results(given, given["keeps"])


torch.library.register_autograd(step_op, backward, setup_context=setup_context)
torch.library.register_vmap(step_op, fold_step)


@torch.library.custom_op(
    "fastdiff::step_rows",
    mutates_args={"history"},
    schema=schema(STEP_ROWS_ARGUMENTS, "(Tensor, Tensor)"),
    **_TAGS,
)
def step_rows_op(*values: Any) -> tuple[Tensor, Tensor]:
    """`fastdiff.ops.step_rows`: prev_sample, and the model input, which is empty where no dtype is given for it."""
    given = named(STEP_ROWS_ARGUMENTS, values)
    model_input = new_model_input(given["sample"], given["model_input_dtype"], given["model_input_copies"])
    return _pair(run_new(call_of(given, model_input), given["backend"]))


@step_rows_op.register_fake
def _(*values: Any) -> tuple[Tensor, Tensor]:
    return _pair(_new_results(named(STEP_ROWS_ARGUMENTS, values), 0))


torch.library.register_vmap(step_rows_op, refuse_step_rows)


def _new_results(given: dict[str, Any], keeps: int) -> list[Tensor]:
    """Return tensors like an operator's results, from its values by name."""
    sample, strides = given["sample"], output_strides(given["sample"])
    dtypes = [given[name] or sample.dtype for name in RESULT_DTYPES[: keeps + 1]]
    results = [sample.new_empty_strided(sample.shape, strides, dtype=dtype) for dtype in dtypes]
    model_input = new_model_input(sample, given["model_input_dtype"], given["model_input_copies"])
    return results if model_input is None else [*results, model_input]


def _pair(results: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    return results[0], results[1] if len(results) > 1 else results[0].new_empty(0)


def call_operator(call: StepCall, backend: str) -> tuple[Tensor, ...]:
    """Run a checked call through its operator, then write what the caller gave to be written."""
    results: Sequence[Tensor]
    if call.write_history:
        results = torch.ops.fastdiff.step_rows(*operator_values(call, backend))
        results = results if call.model_input is not None else results[:1]
    else:
        results = apply_step(call, backend)
    if call.model_input is not None:
        call.model_input.copy_(results[-1])
        results = results[:-1]
    return tuple(
        target.copy_(_where_taken(call, value, target) if o else value) if isinstance(target, Tensor) else value
        for o, (target, value) in enumerate(zip(call.targets, results, strict=True))
    )


def _where_taken(call: StepCall, value: Tensor, target: Tensor) -> Tensor:
    """Return a kept output, with what its target held where a sample is skipped."""
    if not isinstance(call.row_index, Tensor):
        return value
    _, taken = reference.select_rows(call.table, call.row_index)
    return torch.where(reference.per_sample(taken, value), value, target)
