# SPDX-License-Identifier: MIT
"""Memory of a call: which tensors share it, and one dense layout for all of them."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

from .call import StepCall, Target, stored_as


def extent(tensor: Tensor) -> int:
    """Elements from a tensor's first to its last in memory, both counted; 0 where it has none."""
    if tensor.numel() == 0:
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def repeats_an_element(tensor: Tensor) -> bool:
    """Whether two elements of a tensor have one address."""
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride <= reach:  # it may: two dimensions interleave, or slide over each other
            break
        reach += (size - 1) * stride
    else:
        return False
    marks = torch.zeros(extent(tensor), dtype=torch.bool, device="cpu")
    marks.as_strided(tensor.shape, tensor.stride()).fill_(True)
    return int(marks.sum()) < tensor.numel()


def in_memory(tensor: Tensor) -> bool:
    """Whether a tensor is its own values: no stand-in of a compiler's, of torch.func's, or of a wrapper's."""
    return (
        not torch.compiler.is_compiling()
        # What Tensor has under this name disables the dispatch to Python.
        and type(tensor).__torch_dispatch__ is Tensor.__torch_dispatch__
        and not torch._is_functional_tensor(tensor)
        and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    )


def is_fake(tensor: Tensor) -> bool:
    """Whether a tensor is a tracer's, with a shape and no values."""
    return isinstance(tensor, (FakeTensor, FunctionalTensor)) or torch._is_functional_tensor(tensor)


def share_memory(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have a byte in common; of tensors without memory of their own, whether they are one."""
    if not (in_memory(a) and in_memory(b)):
        return a is b
    if a.numel() == 0 or b.numel() == 0 or a.device != b.device:
        return False

    def span(t: Tensor) -> tuple[int, int]:
        return t.data_ptr(), t.data_ptr() + extent(t) * t.element_size()

    (a_low, a_high), (b_low, b_high) = span(a), span(b)
    if a_high <= b_low or b_high <= a_low:
        return False
    # The spans meet; where one has gaps (the halves of the channels, every other row) they may still share nothing.
    if _is_dense(a) and _is_dense(b):
        return True
    low = min(a_low, b_low)
    marks = torch.zeros(max(a_high, b_high) - low, dtype=torch.bool, device="cpu")

    def bytes_of(t: Tensor) -> Tensor:
        size = t.element_size()
        return marks.as_strided((*t.shape, size), (*(s * size for s in t.stride()), 1), t.data_ptr() - low)

    bytes_of(a).fill_(True)
    return bool(bytes_of(b).any())


def make_plain(call: StepCall, out: tuple[Target, ...] | None = None) -> StepCall:
    """Give all tensors of a checked call one dense layout, copying only those that have another, and add outputs.

    An output is the caller's own where it has that layout and lies on an input exactly or on none, else a new tensor;
    `hand_back` copies from those.

    The layout is the sample's own where that is dense (channels_last too), else contiguous.  The model's tensors may
    keep a stride of their own from sample to sample, so that halves of a doubled channel dimension are not copied.
    """
    sample = call.sample
    apart = call.tells_samples_apart or call.model_input is not None
    strides = block_strides(sample) if apart else output_strides(sample)
    if call.seeds is not None and not _countable(sample):
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
        model_input=None,
        **{name: tensor.reshape(-1).contiguous().resolve_neg() for name, tensor in call.counters()},  # type: ignore[arg-type]
        **model,  # type: ignore[arg-type]
    )
    if call.scatter:
        plain = replace(plain, history=_registers_apart(plain))
    taken = [tensor for _, tensor in (*plain.inputs(), *plain.scalars(), *plain.counters())]
    outputs: list[Tensor] = []
    for o, target in enumerate(out or (None,) * (call.keeps + 1)):
        fits = isinstance(target, Tensor) and target.stride() == strides and _writable_in_place(target, plain)
        outputs.append(target if fits and isinstance(target, Tensor) else _new_output(call, strides, o, target))
    plain = replace(plain, outputs=tuple(outputs))
    if call.model_input is None:
        return plain
    wanted = (_samples_stride(sample), *strides[1:])
    fits = (
        in_memory(call.model_input)
        and not call.model_input.is_neg()
        and call.model_input.stride() == wanted
        and not any(share_memory(call.model_input, other) for other in [*taken, *outputs])
    )
    own = torch.empty_strided(
        call.model_input.shape, wanted, dtype=call.model_input.dtype, device=call.model_input.device
    )
    return replace(plain, model_input=call.model_input if fits else own)


def _writable_in_place(target: Tensor, plain: StepCall) -> bool:
    """Whether a kernel that reads each element before it writes it may write this tensor."""
    if not in_memory(target) or target.is_neg():
        return False
    if any(share_memory(target, scalars) for _, scalars in (*plain.scalars(), *plain.counters())):
        return False  # they are read again after elements have been written
    for _, tensor in plain.inputs():
        same = tensor.data_ptr() == target.data_ptr() and tensor.stride() == target.stride()
        same = same and tensor.dtype == target.dtype
        if not same and share_memory(target, tensor):
            return False
    return True


def hand_back(call: StepCall, plain: StepCall) -> None:
    """Copy what a plain call wrote in tensors of its own to the tensors that the caller named."""
    if call.model_input is not None and plain.model_input is not call.model_input:
        assert plain.model_input is not None
        call.model_input.copy_(plain.model_input)
    if call.scatter:
        for register, written in zip(call.history, plain.history, strict=True):
            if register is not None and written is not None and written is not register:
                register.copy_(written)


def _new_output(call: StepCall, strides: tuple[int, ...], o: int, target: Target) -> Tensor:
    sample = call.sample
    new = torch.empty_strided(sample.shape, strides, dtype=stored_as(target, sample), device=sample.device)
    if o > 0 and isinstance(call.row, Tensor):
        # A skipped sample's kept tensors are not written: they stay what they were, or 0 where they are new.
        return new.copy_(target) if isinstance(target, Tensor) else new.zero_()
    return new


def _registers_apart(plain: StepCall) -> tuple[Tensor | None, ...]:
    """The registers, cloned where writing them would change another input of the call."""
    others = [tensor for name, tensor in plain.inputs() if not name.startswith("history")]
    others += [tensor for _, tensor in (*plain.scalars(), *plain.counters())]
    return tuple(
        h.clone() if h is not None and any(share_memory(h, other) for other in others) else h for h in plain.history
    )


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


def block_strides(sample: Tensor) -> tuple[int, ...]:
    """A dense layout in which each sample is one block of memory: the results' own where it is, else contiguous."""
    strides = output_strides(sample)
    return strides if _samples_are_blocks(sample, strides) else _contiguous_strides(sample)


def model_input_strides(sample: Tensor) -> tuple[int, ...]:
    """The layout of a new model input, once or twice along the batch."""
    return (_samples_stride(sample), *block_strides(sample)[1:])


def _samples_stride(sample: Tensor) -> int:
    """Elements from one sample to the next where each is one block of memory."""
    return max(sample.numel() // max(sample.shape[0], 1), 1)


def _countable(sample: Tensor) -> bool:
    """Whether each sample's memory is in row-major order or channels-last, so that a kernel can count its places."""
    if sample.dim() == 0:
        return True
    strides = output_strides(sample)
    channels_last = _permuted_strides(sample, (0, *range(2, sample.dim()), 1))
    return any(
        _same_where_it_matters(strides[1:], view[1:], sample.shape[1:])
        for view in (_contiguous_strides(sample), channels_last)
    )


def _same_where_it_matters(a: tuple[int, ...], b: tuple[int, ...], sizes: torch.Size) -> bool:
    return all(x == y or size == 1 for x, y, size in zip(a, b, sizes, strict=True))


def _permuted_strides(tensor: Tensor, order: tuple[int, ...]) -> tuple[int, ...]:
    """Dense strides with the dimensions in memory in this order."""
    strides, step = [0] * tensor.dim(), 1
    for dim in reversed(order[: tensor.dim()]):
        strides[dim] = step
        step *= max(tensor.shape[dim], 1)
    return tuple(strides)


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
    return _permuted_strides(tensor, tuple(range(tensor.dim())))
