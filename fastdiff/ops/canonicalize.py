# SPDX-License-Identifier: MIT
"""Canonical calls: all tensors in one dense layout, all outputs allocated, for kernels that read memory as it is."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from .call import StepCall, Target, stored_as
from .layout import (
    block_strides,
    contiguous_strides,
    in_memory,
    is_batched_view,
    kernels_can_count,
    output_strides,
    samples_stride,
    share_memory,
    to_strides,
)


def canonicalize(call: StepCall) -> StepCall:
    """Return a checked call with one dense layout for all tensors, and with a tensor for each output.

    Only tensors in another layout are copied.  An output is the caller's own where it has that layout and is an input
    element by element or shares memory with none, else a new tensor; `copy_back` copies from those.

    The layout is the sample's own where that is dense (channels_last too), else contiguous.  The model's tensors may
    keep a stride of their own from sample to sample, so that halves of a doubled channel dimension are not copied.
    """
    sample = call.sample
    apart = call.differs_per_sample or call.model_input is not None
    strides = block_strides(sample) if apart else output_strides(sample)
    if call.seeds is not None and not kernels_can_count(sample):
        strides = contiguous_strides(sample)
    model = {name: tensor.resolve_neg() for name, tensor in call.model_tensors()}
    if len({tensor.stride() for tensor in model.values()}) > 1 or not is_batched_view(call.model_output, strides):
        model = {name: to_strides(tensor, strides) for name, tensor in model.items()}
    scale, threshold = call.guidance_scale, call.threshold
    # Unused numbers have not been checked.
    unused = {"noise_step": 0, "purpose": 0} if call.seeds is None else {}
    canonical = replace(
        call,
        sample=to_strides(sample, strides),
        history=tuple(None if h is None else to_strides(h, strides) for h in call.history),
        noise=None if call.noise is None else to_strides(call.noise, strides),
        mask=None if call.mask is None else to_strides(call.mask, strides),
        table=call.table.contiguous().resolve_neg(),
        guidance_scale=scale.contiguous().resolve_neg() if isinstance(scale, Tensor) else scale,
        threshold=None if threshold is None else threshold.reshape(-1).contiguous().resolve_neg(),
        model_input=None,
        **{name: tensor.reshape(-1).contiguous().resolve_neg() for name, tensor in call.counters()},  # type: ignore[arg-type]
        **model,  # type: ignore[arg-type]
        **unused,  # type: ignore[arg-type]
    )
    if call.write_history:
        canonical = replace(canonical, history=_history_apart(canonical))
    outputs: list[Tensor] = []
    for o, target in enumerate(call.targets):
        if isinstance(target, Tensor) and target.stride() == strides and _writable_in_place(target, canonical):
            outputs.append(target)
        else:
            outputs.append(_new_output(call, strides, o, target))
    taken = [tensor for _, tensor in (*canonical.inputs(), *canonical.scalars(), *canonical.counters())]
    canonical = replace(canonical, out=tuple(outputs))
    if call.model_input is None:
        return canonical
    wanted = (samples_stride(sample), *strides[1:])
    fits = (
        in_memory(call.model_input)
        and not call.model_input.is_neg()
        and call.model_input.stride() == wanted
        and not any(share_memory(call.model_input, other) for other in [*taken, *outputs])
    )
    own = torch.empty_strided(
        call.model_input.shape, wanted, dtype=call.model_input.dtype, device=call.model_input.device
    )
    return replace(canonical, model_input=call.model_input if fits else own)


def copy_back(call: StepCall, canonical: StepCall) -> None:
    """Copy what a canonical call wrote to tensors of its own to the model input and history slots of the call."""
    if call.model_input is not None and canonical.model_input is not call.model_input:
        assert canonical.model_input is not None
        call.model_input.copy_(canonical.model_input)
    if call.write_history:
        for slot, written in zip(call.history, canonical.history, strict=True):
            if slot is not None and written is not None and written is not slot:
                slot.copy_(written)


def _writable_in_place(target: Tensor, canonical: StepCall) -> bool:
    """Return whether a kernel that reads each element before it writes it may write this tensor."""
    if not in_memory(target) or target.is_neg():
        return False
    if any(share_memory(target, scalars) for _, scalars in (*canonical.scalars(), *canonical.counters())):
        return False  # they are read again after elements have been written
    for name, tensor in canonical.inputs():
        same = tensor.data_ptr() == target.data_ptr() and tensor.stride() == target.stride()
        same = same and tensor.dtype == target.dtype and name != "mask"  # which may be read later
        if not same and share_memory(target, tensor):
            return False
    return True


def _new_output(call: StepCall, strides: tuple[int, ...], o: int, target: Target) -> Tensor:
    sample = call.sample
    new = torch.empty_strided(sample.shape, strides, dtype=stored_as(target, sample), device=sample.device)
    if o > 0 and isinstance(call.row_index, Tensor):
        # A skipped sample's kept outputs are not written: they stay what they were, or 0 where they are new.
        return new.copy_(target) if isinstance(target, Tensor) else new.zero_()
    return new


def _history_apart(canonical: StepCall) -> tuple[Tensor | None, ...]:
    """Return the history slots, cloned where writing them would change another input of the call."""
    others = [tensor for name, tensor in canonical.inputs() if not name.startswith("history")]
    others += [tensor for _, tensor in (*canonical.scalars(), *canonical.counters())]
    return tuple(
        h.clone() if h is not None and any(share_memory(h, other) for other in others) else h for h in canonical.history
    )
