# SPDX-License-Identifier: MIT
"""Runs a checked call, whose tensors are in memory, on the backend that was chosen for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import backends, reference
from .call import STEP_ARGUMENTS, StepCall, call_of, named
from .canonicalize import canonicalize, copy_back
from .checks import check
from .fallback import backend_to_run
from .layout import model_input_strides, output_strides, to_strides
from .parts import run_parts


def run(call: StepCall, backend: str) -> tuple[Tensor, ...]:
    """Return a call's outputs, its own targets where those could be written directly."""
    if backend == "reference":
        return reference.step(call)
    canonical = canonicalize(call)
    if call.sample.numel() > 0:
        compiled = backends.RUN[backend](canonical)
        if compiled is not None and backends.extension is None:
            backends.remember(call, canonical, compiled)
    copy_back(call, canonical)
    return canonical.out  # type: ignore[return-value]


def run_new(call: StepCall, backend: str) -> list[Tensor]:
    """Check a call of a registered operator and run it to new tensors; the model input, where there is one, is last.

    An empty `backend` leaves the choice.
    """
    model_input = [] if call.model_input is None else [call.model_input]
    with torch.no_grad():
        if backends.extension is not None and (backend or backends.forced_backend()) in (None, "cpu", "cuda"):
            offered = backends.offer(call)
            if isinstance(offered, tuple):
                return [*offered, *model_input]
        check(call)
        name = backend_to_run(call.sample, backend or None)
        results = run_parts(call, lambda parts: run(parts, name)) if call.has_parts else run(call, name)
        strides = output_strides(call.sample)
        return [to_strides(result, strides) for result in results] + model_input


def execute(*values: Any) -> list[Tensor]:
    """Run ``fastdiff::step`` with its schema's arguments."""
    given = named(STEP_ARGUMENTS, values)
    model_input = new_model_input(given["sample"], given["model_input_dtype"], given["model_input_copies"])
    return run_new(call_of(given, model_input), given["backend"])


def new_model_input(sample: Tensor, dtype: torch.dtype | None, copies: int) -> Tensor | None:
    """Return a tensor for the next model input, or None where none is wanted."""
    if dtype is None:
        return None
    shape = (copies * sample.shape[0], *sample.shape[1:])
    return sample.new_empty_strided(shape, model_input_strides(sample), dtype=dtype)
