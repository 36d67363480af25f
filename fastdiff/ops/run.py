# SPDX-License-Identifier: MIT
"""Runs a checked call, whose tensors are in memory, on the backend that was chosen for it."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .. import reference
from ..call import StepCall
from . import backends
from .layout import hand_back, make_plain


def run(call: StepCall, out: tuple[Tensor | None, ...] | None, name: str) -> tuple[Tensor, ...]:
    """The results of a call, `out`'s own tensors where they could be written at once."""
    if name == "reference":
        return reference_step(call, out)
    plain = make_plain(call, out)
    if call.sample.numel() > 0:
        backends.RUN[name](plain)
    hand_back(call, plain)
    return plain.outputs


def reference_step(call: StepCall, out: tuple[Tensor | None, ...] | None) -> tuple[Tensor, ...]:
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
    }
    if isinstance(call.row, Tensor):
        results = reference.step_rows(call.sample, call.model_output, call.table, call.row, out=out, **keywords)
    else:
        results = reference.step(call.sample, call.model_output, call.table[call.row], **keywords)
    after: list[Tensor | None] = []
    if call.scatter:
        assert isinstance(call.row, Tensor)
        after = reference.stored(call.table, call.row, call.history, results[1:])
        results = results[:1]
    if call.model_input is not None:
        copies = 1 if call.model_input.shape == call.sample.shape else 2
        call.model_input.copy_(reference.model_input(results[0], call.table, call.row, call.model_input.dtype, copies))
    for register, value in zip(call.history, after, strict=False):
        if register is not None and value is not None:
            register.copy_(value)
    return tuple(results)
