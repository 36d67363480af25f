# SPDX-License-Identifier: MIT
"""What a call of the fused step must satisfy: checked here, once, for all backends."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..call import StepCall
from ..errors import sentence
from ..table import NUM_REGISTERS, ROW_WIDTH, Variance, compute_dtype

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check(call: StepCall, out: tuple[Tensor | None, ...] | None = None) -> None:
    """Refuse a call that no backend may run.

    Raises:
        TypeError: a dtype or a type is wrong.
        ValueError: a shape, a device, a number of tensors or a value is wrong.
    """
    sample = call.sample
    if not isinstance(sample, Tensor):
        raise TypeError(_refusal("sample", f"is a {type(sample).__name__}", "a torch.Tensor", "pass a tensor"))
    if sample.dtype not in DTYPES:
        raise TypeError(
            _refusal("sample", f"has dtype {sample.dtype}", "float16, bfloat16, float32 or float64", "convert it first")
        )
    _check_memory("sample", sample)
    for name, tensor in call.inputs():
        _check_like_sample(name, tensor, sample)
    _check_table(call)
    _check_guidance(call)
    _check_variance(call)
    if call.threshold is not None:
        _check_scalars("threshold", call.threshold, sample, one_for_all=False)
    if len(call.history) > NUM_REGISTERS:
        raise ValueError(
            _refusal("history", f"holds {len(call.history)} tensors", f"{NUM_REGISTERS} at most", "drop the oldest")
        )
    if call.keeps not in (0, 1, 2):
        raise ValueError(_refusal("keeps", f"is {call.keeps}", "0, 1 or 2", "keep two tensors a step at most"))
    if out is not None:
        _check_out(out, call)


def _refusal(argument: str, got: str, expected: str, remedy: str) -> str:
    return sentence("step", argument, got, expected, remedy)


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
        raise ValueError(_refusal(name, f"has shape {list(tensor.shape)}", f"{list(sample.shape)} like sample", remedy))
    if tensor.dtype != sample.dtype:
        raise TypeError(
            _refusal(
                name, f"has dtype {tensor.dtype}", f"{sample.dtype} like sample", f"convert it with .to({sample.dtype})"
            )
        )
    if tensor.device != sample.device:
        raise ValueError(
            _refusal(name, f"is on {tensor.device}", f"{sample.device} like sample", f"move it to {sample.device}")
        )
    _check_memory(name, tensor)


def _check_memory(name: str, tensor: Tensor) -> None:
    """Refuse what is not strided memory, or memory that was freed or cut short behind the tensor's back: to read it
    would end the process.
    """
    if tensor.layout != torch.strided:
        raise TypeError(
            _refusal(name, f"has layout {tensor.layout}", "torch.strided", "convert it first, with .to_dense()")
        )
    if torch.compiler.is_compiling():
        return
    try:
        held = tensor.untyped_storage().nbytes()
    except RuntimeError:
        return  # no storage of its own, as inside vmap
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    needed = (tensor.storage_offset() + last + 1) * tensor.element_size() if tensor.numel() > 0 else 0
    if held < needed:
        raise ValueError(
            _refusal(name, f"has a storage of {held} bytes", f"the {needed} that it views", "its storage was resized")
        )


def _check_table(call: StepCall) -> None:
    table, sample = call.table, call.sample
    wanted = compute_dtype(sample.dtype)
    remedy = "make it with StepTable.rows_as(sample.dtype, sample.device)"
    if not isinstance(table, Tensor):
        raise TypeError(_refusal("table", f"is a {type(table).__name__}", "a torch.Tensor", remedy))
    if table.dim() != 2 or table.shape[1] != ROW_WIDTH:
        raise ValueError(_refusal("table", f"has shape {list(table.shape)}", f"[rows, {ROW_WIDTH}]", remedy))
    if table.dtype != wanted:
        raise TypeError(
            _refusal("table", f"has dtype {table.dtype}", f"{wanted} for samples of {sample.dtype}", remedy)
        )
    if table.device != sample.device:
        raise ValueError(_refusal("table", f"is on {table.device}", f"{sample.device} like sample", remedy))
    _check_memory("table", table)
    if isinstance(call.row, bool) or not isinstance(call.row, int):
        raise TypeError(_refusal("row", f"is a {type(call.row).__name__}", "an int", "pass the index of a row"))
    if not 0 <= call.row < table.shape[0]:
        raise ValueError(
            _refusal("row", f"is {call.row}", f"0 to {table.shape[0] - 1}", "the loop has run out of rows: start again")
        )


def _check_guidance(call: StepCall) -> None:
    if call.uncond is not None and call.guidance is None:
        raise ValueError(
            _refusal("guidance", "is missing", "a guidance scale beside uncond", "pass guidance=, or leave out uncond")
        )
    if call.guidance is not None:
        if call.uncond is None:
            raise ValueError(
                _refusal("uncond", "is missing", "the unconditional output beside guidance", "pass uncond=")
            )
        _check_scalars("guidance", call.guidance, call.sample, one_for_all=True)


def _check_variance(call: StepCall) -> None:
    if call.variance_kind not in tuple(Variance):
        raise ValueError(
            _refusal(
                "variance_kind", f"is {call.variance_kind}", "0, 1 or 2", "use a member of fastdiff.table.Variance"
            )
        )
    if (call.variance is not None) != (call.variance_kind != Variance.FIXED):
        raise ValueError(
            _refusal(
                "variance",
                "is missing" if call.variance is None else "is given",
                f"{'a tensor' if call.variance is None else 'none'} with variance_kind {call.variance_kind}",
                "pass the model's second output for a learned variance, and only then",
            )
        )


def _check_scalars(name: str, scalars: Tensor, sample: Tensor, *, one_for_all: bool) -> None:
    wanted = compute_dtype(sample.dtype)
    batch = sample.shape[0] if sample.dim() > 0 else 1
    if not isinstance(scalars, Tensor):
        raise TypeError(_refusal(name, f"is a {type(scalars).__name__}", "a float or a torch.Tensor", "pass a tensor"))
    if scalars.dtype != wanted:
        raise TypeError(
            _refusal(name, f"has dtype {scalars.dtype}", f"{wanted} for samples of {sample.dtype}", "convert it first")
        )
    if scalars.device != sample.device:
        raise ValueError(_refusal(name, f"is on {scalars.device}", f"{sample.device} like sample", "move it there"))
    fits = scalars.dim() <= 1 and (scalars.numel() == batch or (one_for_all and scalars.numel() == 1))
    if not fits:
        choices = f"[{batch}], a number a sample" + (", or one number" if one_for_all else "")
        raise ValueError(_refusal(name, f"has shape {list(scalars.shape)}", choices, "give one value a sample"))
    _check_memory(name, scalars)


def _check_out(out: tuple[Tensor | None, ...], call: StepCall) -> None:
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
        _check_like_sample(f"out[{i}]", tensor, call.sample)
        if _repeats_an_element(tensor):
            raise ValueError(
                _refusal(f"out[{i}]", "holds the same element twice", "memory of its own for each element", "clone it")
            )
        if tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                _refusal(f"out[{i}]", "requires grad", "a tensor outside the graph", "leave out out=, or detach it")
            )
        if any(other is not None and _share_memory(tensor, other) for other in out[:i]):
            raise ValueError(
                _refusal(f"out[{i}]", "shares memory with another output", "memory of its own", "allocate it apart")
            )


def _repeats_an_element(tensor: Tensor) -> bool:
    """Whether two elements of a tensor have one address."""
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride <= reach:  # it may: two dimensions interleave, or slide over each other
            break
        reach += (size - 1) * stride
    else:
        return False
    if tensor.numel() == 0:
        return False
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    marks = torch.zeros(last + 1, dtype=torch.bool)
    marks.as_strided(tensor.shape, tensor.stride()).fill_(True)
    return int(marks.sum()) < tensor.numel()


def _share_memory(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have a byte in common."""
    if a.numel() == 0 or b.numel() == 0 or a.device != b.device:
        return False

    def span(t: Tensor) -> tuple[int, int]:
        last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
        return t.data_ptr(), t.data_ptr() + (last + 1) * t.element_size()

    (a_low, a_high), (b_low, b_high) = span(a), span(b)
    if a_high <= b_low or b_high <= a_low:
        return False
    # The spans meet; views that interleave (two halves of the channels) may still share nothing. Mark and look.
    low, size = min(a_low, b_low), a.element_size()
    if _is_dense(a) or _is_dense(b) or (a_low - b_low) % size:
        return True
    marks = torch.zeros((max(a_high, b_high) - low) // size, dtype=torch.bool)
    marks.as_strided(a.shape, a.stride(), (a_low - low) // size).fill_(True)
    return bool(marks.as_strided(b.shape, b.stride(), (b_low - low) // size).any())


def make_plain(call: StepCall, out: tuple[Tensor | None, ...] | None = None) -> StepCall:
    """Give all tensors of a checked call one dense layout, copying only those that have another, and add outputs.

    An output is the caller's own where it has that layout and lies on an input exactly or on none, else a new tensor.

    The layout is the sample's own where that is dense (channels_last too), else contiguous.  The model's tensors may
    keep a stride of their own from sample to sample, so that halves of a doubled channel dimension are not copied.
    """
    sample = call.sample
    strides = output_strides(sample)
    if call.has_scalars_a_sample and not _samples_are_blocks(sample, strides):
        strides = _contiguous_strides(sample)
    model = {name: tensor.resolve_neg() for name, tensor in call.model_tensors()}
    if len({tensor.stride() for tensor in model.values()}) > 1 or not _batched_view(call.model_output, strides):
        model = {name: laid_out(tensor, strides) for name, tensor in model.items()}
    plain = replace(
        call,
        sample=laid_out(sample, strides),
        history=tuple(None if h is None else laid_out(h, strides) for h in call.history),
        noise=None if call.noise is None else laid_out(call.noise, strides),
        table=call.table.contiguous().resolve_neg(),
        guidance=None if call.guidance is None else call.guidance.contiguous().resolve_neg(),
        threshold=None if call.threshold is None else call.threshold.reshape(-1).contiguous().resolve_neg(),
        **model,  # type: ignore[arg-type]
    )
    targets = out or (None,) * (call.keeps + 1)
    return replace(
        plain,
        outputs=tuple(
            target
            if target is not None and target.stride() == strides and _writable_in_place(target, plain)
            else torch.empty_strided(sample.shape, strides, dtype=sample.dtype, device=sample.device)
            for target in targets
        ),
    )


def _writable_in_place(target: Tensor, plain: StepCall) -> bool:
    """Whether a kernel that reads each element before it writes it may write this tensor."""
    if not has_memory(target) or target.is_neg():
        return False
    if any(_share_memory(target, scalars) for _, scalars in plain.scalars()):
        return False  # they are read again after elements have been written
    for _, tensor in plain.inputs():
        same = tensor.data_ptr() == target.data_ptr() and tensor.stride() == target.stride()
        if not same and _share_memory(target, tensor):
            return False
    return True


def has_memory(tensor: Tensor) -> bool:
    """Whether a tensor is its own values; a fake one, a functional one or a wrapper only stands for them."""
    # What Tensor has under this name disables the dispatch to Python.
    return type(tensor).__torch_dispatch__ is Tensor.__torch_dispatch__ and not torch._is_functional_tensor(tensor)


def output_strides(sample: Tensor) -> tuple[int, ...]:
    """The layout of a step's results: the sample's own where that is dense, else contiguous."""
    return sample.stride() if _is_dense(sample) else _contiguous_strides(sample)


def laid_out(tensor: Tensor, strides: tuple[int, ...]) -> Tensor:
    """The tensor itself where it has these strides, else a copy that does."""
    if tensor.stride() == strides:
        return tensor.resolve_neg()
    copy = torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device=tensor.device)
    return copy.copy_(tensor)


def _samples_are_blocks(tensor: Tensor, strides: tuple[int, ...]) -> bool:
    """Whether, with these dense strides, each sample is one block of memory."""
    return tensor.dim() > 0 and (tensor.shape[0] <= 1 or strides[0] * tensor.shape[0] >= tensor.numel())


def _batched_view(tensor: Tensor, strides: tuple[int, ...]) -> bool:
    """Whether each sample of `tensor` has the layout `strides`, the samples lying at least as far apart."""
    if tensor.stride() == strides:
        return True
    apart = tensor.dim() > 0 and tensor.stride(0) >= strides[0] and tensor.stride()[1:] == strides[1:]
    return apart and _samples_are_blocks(tensor, strides)


def _is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill one block of memory without gaps or repeats, in any order of dimensions."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size == 1:
            continue
        if stride != expected:
            return False
        expected *= size
    return True


def _contiguous_strides(tensor: Tensor) -> tuple[int, ...]:
    strides, step = [], 1
    for size in reversed(tensor.shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))
