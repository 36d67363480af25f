# SPDX-License-Identifier: MIT
"""Steps with a number for each part of a sample: per token, per frame, per action.

Where a tensor of numbers (row indices, guidance scales, thresholds, noise steps) is ``[B, T]``, samples ``[B, T, ...]``
are a batch of B·T.  Only drawn noise needs the whole sample: seeds stay ``[B]``, and a part's elements are counted from
its place in the sample (`StepCall.parts`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor

from .call import StepCall
from .layout import output_strides, to_strides


def run_parts(call: StepCall, run: Callable[[StepCall], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """Run a checked call with a number for each part as a call of a batch of parts; return its outputs."""
    batch = _collapse(call)
    results = run(batch)
    if call.model_input is not None and not _can_merge(call.model_input):
        call.model_input.copy_(_unmerged(batch.model_input, call.model_input))
    for slot, merged in zip(call.history, batch.history, strict=True):
        if call.write_history and slot is not None and not _can_merge(slot):
            slot.copy_(_unmerged(merged, slot))
    outputs = []
    for target, result in zip(call.targets, results, strict=True):
        if isinstance(target, Tensor):
            outputs.append(target if _can_merge(target) else target.copy_(_unmerged(result, target)))
        else:
            outputs.append(to_strides(_unmerged(result, call.sample), output_strides(call.sample)))
    return tuple(outputs)


def _collapse(call: StepCall) -> StepCall:
    parts = call.sample.shape[1]

    def numbers(value: Any, one_for_all: bool = True) -> Any:
        """Return a number, one for all, or one a part."""
        if not isinstance(value, Tensor) or (one_for_all and value.dim() < 2 and value.numel() == 1):
            return value
        return value.reshape(-1) if value.dim() == 2 else value.reshape(-1).repeat_interleave(parts)

    tensors = {name: tensor.flatten(0, 1) for name, tensor in call.inputs() if not name.startswith("history")}
    return replace(
        call,
        **tensors,  # type: ignore[arg-type]
        history=tuple(None if h is None else h.flatten(0, 1) for h in call.history),
        row_index=numbers(call.row_index),
        guidance_scale=numbers(call.guidance_scale),
        threshold=numbers(call.threshold, one_for_all=False),
        noise_step=call.noise_step if call.seeds is None else numbers(call.noise_step),
        parts=1 if call.seeds is None else parts,
        model_input=None if call.model_input is None else call.model_input.flatten(0, 1),
        out=None if call.out is None else tuple(t.flatten(0, 1) if isinstance(t, Tensor) else t for t in call.out),
    )


def _can_merge(tensor: Tensor) -> bool:
    """Return whether the first two dimensions are one in memory, so that merging them is a view."""
    return 1 in tensor.shape[:2] or tensor.stride(0) == tensor.shape[1] * tensor.stride(1)


def _unmerged(merged: Tensor | None, like: Tensor) -> Tensor:
    assert merged is not None
    return merged.reshape(like.shape)
