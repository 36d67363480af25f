# SPDX-License-Identifier: MIT
"""Checks of a fused step's call, once for all backends."""

from __future__ import annotations

from enum import IntEnum
from typing import Any

import torch
from torch import Tensor

from ..errors import checked_type, error_message, shown
from ..row_layout import NUM_REGISTERS, ROW_WIDTH, STORE_0, STORE_1, Variance, compute_dtype
from .call import StepCall, Target
from .layout import extent, in_memory, repeats_an_element, share_memory

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

#: The kinds of variance as plain ints: before 2.13 Dynamo iterates no enum.
_VARIANCE_KINDS = tuple(int(kind) for kind in Variance)
_FIXED = int(Variance.FIXED)


def check(call: StepCall) -> None:
    """Refuse a call that no backend may run.

    Raises:
        TypeError: a dtype or a type is wrong.
        ValueError: a shape, a device, a number of tensors or a value is wrong.
    """
    sample = call.sample
    if not isinstance(sample, Tensor):
        raise TypeError(_refusal("sample", f"is a {type(sample).__name__}", "a torch.Tensor", "pass a tensor"))
    check_dtype("sample", sample.dtype)
    check_memory("sample", sample)
    for name, tensor in call.inputs():
        _check_like_sample(name, tensor, sample)
    _check_table(call)
    _check_guidance(call)
    _check_variance(call)
    if call.threshold is not None:
        _check_scalars("threshold", call.threshold, call, one_for_all=False)
    _check_noise(call)
    if len(call.history) > NUM_REGISTERS:
        raise ValueError(
            _refusal("history", f"holds {len(call.history)} tensors", f"{NUM_REGISTERS} at most", "drop the oldest")
        )
    if not _is_integer(call.keeps) or call.keeps not in (0, 1, 2):
        raise ValueError(_refusal("keeps", f"is {call.keeps}", "0, 1 or 2", "keep two tensors a step at most"))
    if call.mask is not None:
        _check_mask(call, call.mask)
    if call.model_input is not None:
        _check_model_input(call.model_input, sample)
    if call.write_history:
        _check_written_history(call)
    if call.out is not None:
        _check_out(call.out, call)
    _check_written_apart(call)


def _refusal(argument: str, got: str, expected: str, remedy: str) -> str:
    return error_message("step", argument, got, expected, remedy)


def _is_integer(value: object) -> bool:
    """Return whether a value is an int or a tracer's symbolic one; a bool in an int's place is a mistake."""
    return isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool)


def as_number(value: Any) -> Any:
    """Return an enum's member as an int, anything else as it is: before 2.13 Dynamo compares no members."""
    return int(value) if isinstance(value, IntEnum) else value


def check_dtype(name: str, dtype: torch.dtype, operation: str = "step") -> None:
    """Refuse a dtype that no step computes with."""
    if dtype not in DTYPES:
        expected = "float16, bfloat16, float32 or float64"
        raise TypeError(error_message(operation, name, f"has dtype {dtype}", expected, "convert it first"))


def _check_like_sample(name: str, tensor: object, sample: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(_refusal(name, f"is a {type(tensor).__name__}", "a torch.Tensor", "pass a tensor"))
    if tensor.shape != sample.shape:
        remedy = "reshape it to match"
        if name == "model_output" and tensor.dim() == sample.dim() and tensor.dim() > 0:
            if tensor.shape[0] == 2 * sample.shape[0]:
                remedy = "pass the unconditional half as uncond"
            elif tensor.dim() > 1 and tensor.shape[1] == 2 * sample.shape[1]:
                remedy = "pass the second half of the channels as variance"
        if name == "mask" and tensor.dim() <= sample.dim():
            remedy = "expand it once before the loop, with fastdiff.editing.expand_mask(mask, sample)"
        raise ValueError(_refusal(name, f"has shape {list(tensor.shape)}", f"{list(sample.shape)} like sample", remedy))
    check_dtype(name, tensor.dtype)
    if tensor.device != sample.device:
        raise ValueError(
            _refusal(name, f"is on {tensor.device}", f"{sample.device} like sample", f"move it to {sample.device}")
        )
    check_memory(name, tensor)


def check_memory(name: str, tensor: Tensor, operation: str = "step") -> None:
    """Refuse what is not strided memory, or memory that was freed or cut short behind the tensor's back: to read it
    would end the process.
    """
    if tensor.layout != torch.strided:
        raise TypeError(
            error_message(
                operation, name, f"has layout {tensor.layout}", "torch.strided", "convert it first, with .to_dense()"
            )
        )
    if torch.compiler.is_compiling():
        return
    try:
        held = tensor.untyped_storage().nbytes()
    except RuntimeError:
        return  # no storage of its own, as inside vmap
    needed = (tensor.storage_offset() + extent(tensor)) * tensor.element_size() if tensor.numel() > 0 else 0
    if held < needed:
        raise ValueError(
            error_message(
                operation,
                name,
                f"has a storage of {held} bytes",
                f"the {needed} that it views",
                "its storage was resized",
            )
        )


def _check_table(call: StepCall) -> None:
    table, sample = call.table, call.sample
    remedy = "make it with StepTable.coefficients_as(sample.dtype, sample.device)"
    if not isinstance(table, Tensor):
        raise TypeError(_refusal("table", f"is a {type(table).__name__}", "a torch.Tensor", remedy))
    if table.dim() != 2 or table.shape[1] != ROW_WIDTH:
        raise ValueError(_refusal("table", f"has shape {list(table.shape)}", f"[rows, {ROW_WIDTH}]", remedy))
    stored = {name: tensor.dtype for name, tensor in call.inputs()}
    for o, target in enumerate(call.out or ()):
        if isinstance(target, (Tensor, torch.dtype)):
            stored[f"out[{o}]"] = target if isinstance(target, torch.dtype) else target.dtype
    wanted = compute_dtype(*stored.values())
    if table.dtype == torch.float32 and sample.dtype != torch.float64 == wanted:
        raise TypeError(
            _refusal(
                next(name for name, dtype in stored.items() if dtype == torch.float64),
                "has dtype torch.float64",
                "float16, bfloat16 or float32 beside a float32 table",
                "convert it, or make the table with StepTable.coefficients_as(torch.float64, sample.device)",
            )
        )
    if table.dtype != wanted:
        raise TypeError(
            _refusal("table", f"has dtype {table.dtype}", f"{wanted} for samples of {sample.dtype}", remedy)
        )
    if table.device != sample.device:
        raise ValueError(_refusal("table", f"is on {table.device}", f"{sample.device} like sample", remedy))
    check_memory("table", table)
    last = table.shape[0] - 1
    if isinstance(call.row_index, Tensor):
        _check_counters("row_index", call.row_index, sample, one_for_all=True)
        # On a GPU reading would be a sync: there a sample whose row is not in the table stays as it is.
        if readable_without_sync(call.row_index) and call.row_index.numel() > 0 and int(call.row_index.max()) > last:
            raise ValueError(
                _refusal(
                    "row_index",
                    f"holds {int(call.row_index.max())}",
                    f"{last} at most",
                    "a negative index skips its sample",
                )
            )
        return
    if call.write_history:
        raise TypeError(
            error_message(
                "step_rows",
                "row_index",
                f"is a {type(call.row_index).__name__}",
                "an int64 tensor",
                "put it into a tensor",
            )
        )
    if not _is_integer(call.row_index):
        raise TypeError(
            _refusal(
                "row_index",
                f"is a {type(call.row_index).__name__}",
                "an int or an int64 tensor",
                "pass the index of a row",
            )
        )
    if not 0 <= call.row_index <= last:
        raise ValueError(
            _refusal(
                "row_index", f"is {shown(call.row_index)}", f"0 to {last}", "the loop has run out of rows: start again"
            )
        )


def readable_without_sync(tensor: Tensor) -> bool:
    """Return whether a tensor's values can be read, without waiting for a device."""
    return tensor.device.type == "cpu" and in_memory(tensor)


def _check_counters(
    name: str, counters: Tensor, sample: Tensor, *, one_for_all: bool, samples: int | None = None
) -> None:
    if counters.dtype != torch.int64:
        raise TypeError(_refusal(name, f"has dtype {counters.dtype}", "int64", "convert it with .to(torch.int64)"))
    _check_one_per_sample(name, counters, sample, one_for_all, samples)


def _check_one_per_sample(
    name: str, values: Tensor, sample: Tensor, one_for_all: bool, samples: int | None = None
) -> None:
    batch = samples if samples is not None else sample.shape[0] if sample.dim() > 0 else 1
    if values.device != sample.device:
        raise ValueError(_refusal(name, f"is on {values.device}", f"{sample.device} like sample", "move it there"))
    per_part = list(sample.shape[:2]) if name != "seeds" and sample.dim() > 1 else None
    if per_part is not None and list(values.shape) == per_part:
        check_memory(name, values)
        return
    if values.dim() > 1 or not (values.numel() == batch or (one_for_all and values.numel() == 1)):
        choices = f"[{batch}], one a sample"
        choices += "" if per_part is None else f", {per_part}, one a part"
        choices += ", or one number" if one_for_all else ""
        raise ValueError(_refusal(name, f"has shape {list(values.shape)}", choices, "give one value a sample"))
    check_memory(name, values)


def _check_noise(call: StepCall) -> None:
    if call.seeds is None:
        return
    if call.noise is not None:
        raise ValueError(_refusal("noise", "is given", "none beside seeds", "pass one of the two"))
    if not isinstance(call.seeds, Tensor):
        raise TypeError(
            _refusal(
                "seeds", f"is a {type(call.seeds).__name__}", "an int64 tensor", "make it with fastdiff.as_seeds(...)"
            )
        )
    samples = None if call.parts == 1 else call.sample.shape[0] // call.parts
    _check_counters("seeds", call.seeds, call.sample, one_for_all=False, samples=samples)
    if call.seeds.dim() == 0 and call.sample.dim() > 0:
        raise ValueError(_refusal("seeds", "has shape []", f"[{call.sample.shape[0]}]", "give one seed a sample"))
    if isinstance(call.noise_step, Tensor):
        _check_counters("noise_step", call.noise_step, call.sample, one_for_all=True)
    else:
        _check_word("noise_step", call.noise_step)
    _check_word("purpose", as_number(call.purpose))


def _check_word(name: str, value: object) -> None:
    if not _is_integer(value):
        raise TypeError(_refusal(name, f"is a {type(value).__name__}", "an int", "take it modulo 2**32"))
    if not 0 <= value < 2**32:  # type: ignore[operator]
        raise ValueError(_refusal(name, f"is {shown(value)}", "0 to 2**32 - 1", "take it modulo 2**32"))


def _check_model_input(tensor: object, sample: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(_refusal("model_input", f"is a {type(tensor).__name__}", "a torch.Tensor", "pass a tensor"))
    if tensor.dtype not in DTYPES:
        raise TypeError(
            _refusal("model_input", f"has dtype {tensor.dtype}", "float16, bfloat16, float32 or float64", "make it so")
        )
    if tensor.device != sample.device:
        raise ValueError(_refusal("model_input", f"is on {tensor.device}", f"{sample.device} like sample", "move it"))
    once = list(sample.shape)
    twice = [2 * size for size in once[:1]] + once[1:]
    if list(tensor.shape) not in (once, twice) or not once:
        raise ValueError(
            _refusal("model_input", f"has shape {list(tensor.shape)}", f"{once}, or {twice} for guidance", "make it so")
        )
    check_memory("model_input", tensor)
    _check_writable("model_input", tensor)


def _check_written_apart(call: StepCall) -> None:
    """The model input may lie on what is read; on what is written one result would overwrite another."""
    if call.model_input is None:
        return
    written: list[tuple[str, Target]] = [(f"out[{o}]", tensor) for o, tensor in enumerate(call.out or ())]
    if call.write_history:
        written += [(f"history[{j}]", tensor) for j, tensor in enumerate(call.history)]
    for name, tensor in written:
        if isinstance(tensor, Tensor) and share_memory(call.model_input, tensor):
            raise ValueError(_refusal("model_input", f"shares memory with {name}", "memory of its own", "allocate it"))


def _check_written_history(call: StepCall) -> None:
    """Check a call whose rows name the history slots that they store to."""
    slots = [(f"history[{j}]", h) for j, h in enumerate(call.history) if h is not None]
    if isinstance(call.targets[0], Tensor):
        slots.append(("out", call.targets[0]))
    for name, tensor in slots:
        _check_writable(name, tensor)
    for i, (name, tensor) in enumerate(slots):
        if any(share_memory(tensor, other) for _, other in slots[:i]):
            raise ValueError(_refusal(name, "shares memory with another", "memory of its own", "allocate it apart"))
    if not (
        readable_without_sync(call.table)
        and isinstance(call.row_index, Tensor)
        and readable_without_sync(call.row_index)
    ):
        return
    indices = call.row_index.reshape(-1)
    stores = call.table[indices[indices >= 0]][:, [STORE_0, STORE_1]]
    if call.mask is not None and bool((stores[:, 1] >= 0).any()):
        raise ValueError(_refusal("mask", "is given", "none where a row stores a second kept output", _BLEND_APART))
    for slot in sorted({int(value) for value in stores.reshape(-1).tolist() if value >= 0}):
        if slot >= len(call.history) or call.history[slot] is None:
            raise ValueError(
                _refusal("history", f"lacks slot {slot}", "each that a row stores to", "pass a tensor for it")
            )


#: The remedy where the map of a blend's target is taken.
_BLEND_APART = "blend the result in a second pass, with fastdiff.editing.blend"


def _check_mask(call: StepCall, mask: Tensor) -> None:
    if call.keeps > 1:
        raise ValueError(_refusal("mask", "is given beside two kept outputs", "one kept output at most", _BLEND_APART))
    if mask.requires_grad and torch.is_grad_enabled():
        raise ValueError(_refusal("mask", "requires grad", "a tensor outside the graph", "detach it"))


def _check_guidance(call: StepCall) -> None:
    if call.uncond is not None and call.guidance_scale is None:
        raise ValueError(
            _refusal(
                "guidance_scale",
                "is missing",
                "a guidance scale beside uncond",
                "pass guidance_scale=, or leave out uncond",
            )
        )
    if call.guidance_scale is not None:
        if call.uncond is None:
            raise ValueError(
                _refusal("uncond", "is missing", "the unconditional output beside guidance_scale", "pass uncond=")
            )
        if not isinstance(call.guidance_scale, float):
            _check_scalars("guidance_scale", call.guidance_scale, call, one_for_all=True)


def _check_variance(call: StepCall) -> None:
    kind = as_number(call.variance_kind)
    if not _is_integer(kind) or kind not in _VARIANCE_KINDS:
        raise ValueError(
            _refusal(
                "variance_kind", f"is {call.variance_kind}", "0, 1 or 2", "use a member of fastdiff.row_layout.Variance"
            )
        )
    if (call.variance is not None) != (kind != _FIXED):
        raise ValueError(
            _refusal(
                "variance",
                "is missing" if call.variance is None else "is given",
                f"{'a tensor' if call.variance is None else 'none'} with variance_kind {call.variance_kind}",
                "pass the model's second output for a learned variance, and only then",
            )
        )


def _check_scalars(name: str, scalars: Tensor, call: StepCall, *, one_for_all: bool) -> None:
    sample, table = call.sample, call.table
    expected = "a float or a torch.Tensor" if one_for_all else "a torch.Tensor"
    checked_type("step", name, scalars, Tensor, expected, f"pass {name} as one")
    if scalars.dtype != table.dtype:
        raise TypeError(_refusal(name, f"has dtype {scalars.dtype}", f"{table.dtype} like table", "convert it first"))
    _check_one_per_sample(name, scalars, sample, one_for_all)


def _check_out(out: tuple[Target, ...], call: StepCall) -> None:
    if len(out) != call.keeps + 1:
        raise ValueError(
            _refusal(
                "out",
                f"holds {len(out)} tensors",
                f"{call.keeps + 1}: prev_sample and {call.keeps} kept tensors",
                "pass one a result",
            )
        )
    for i, tensor in enumerate(out):
        if tensor is None:
            continue
        if isinstance(tensor, torch.dtype):
            if tensor not in DTYPES:
                raise TypeError(
                    _refusal(f"out[{i}]", f"is {tensor}", "float16, bfloat16, float32 or float64", "convert the result")
                )
            continue
        _check_like_sample(f"out[{i}]", tensor, call.sample)
        _check_writable(f"out[{i}]", tensor)
        if any(isinstance(other, Tensor) and share_memory(tensor, other) for other in out[:i]):
            raise ValueError(
                _refusal(f"out[{i}]", "shares memory with another output", "memory of its own", "allocate it apart")
            )


def _check_writable(name: str, tensor: Tensor) -> None:
    if repeats_an_element(tensor):
        raise ValueError(
            _refusal(name, "holds the same element twice", "memory of its own for each element", "clone it")
        )
    if tensor.requires_grad and torch.is_grad_enabled():
        raise ValueError(_refusal(name, "requires grad", "a tensor outside the graph", "leave it out, or detach it"))
