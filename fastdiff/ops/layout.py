# SPDX-License-Identifier: MIT
"""Memory and strides of tensors: which are in memory, which share it, and the dense layouts of a step."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor


def extent(tensor: Tensor) -> int:
    """Return the elements from a tensor's first to its last in memory, both counted; 0 where it has none."""
    if tensor.numel() == 0:
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def repeats_an_element(tensor: Tensor) -> bool:
    """Return whether two elements of a tensor have one address."""
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
    """Return whether a tensor holds its own values: no proxy of a compiler or of torch.func, and no wrapper."""
    return (
        not torch.compiler.is_compiling()
        # Tensor's own attribute of this name disables the dispatch to Python.
        and type(tensor).__torch_dispatch__ is Tensor.__torch_dispatch__
        and not torch._is_functional_tensor(tensor)
        and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    )


def is_fake(tensor: Tensor) -> bool:
    """Return whether a tensor belongs to a tracer, with a shape and no values."""
    return isinstance(tensor, (FakeTensor, FunctionalTensor)) or torch._is_functional_tensor(tensor)


def share_memory(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors have a byte in common; for tensors without memory, whether they are one object."""
    if not (in_memory(a) and in_memory(b)):
        return a is b
    if a.numel() == 0 or b.numel() == 0 or a.device != b.device:
        return False

    def span(t: Tensor) -> tuple[int, int]:
        return t.data_ptr(), t.data_ptr() + extent(t) * t.element_size()

    (a_low, a_high), (b_low, b_high) = span(a), span(b)
    if a_high <= b_low or b_high <= a_low:
        return False
    # The spans overlap; where one has gaps (half of the channels, every other row) they may still share nothing.
    if is_dense(a) and is_dense(b):
        return True
    low = min(a_low, b_low)
    marks = torch.zeros(max(a_high, b_high) - low, dtype=torch.bool, device="cpu")

    def bytes_of(t: Tensor) -> Tensor:
        size = t.element_size()
        return marks.as_strided((*t.shape, size), (*(s * size for s in t.stride()), 1), t.data_ptr() - low)

    bytes_of(a).fill_(True)
    return bool(bytes_of(b).any())


def output_strides(sample: Tensor) -> tuple[int, ...]:
    """Return the layout of a step's results: the sample's own where that is dense, else contiguous."""
    return sample.stride() if is_dense(sample) else contiguous_strides(sample)


def to_strides(tensor: Tensor, strides: tuple[int, ...]) -> Tensor:
    """Return the tensor itself where it has these strides, else a copy that has."""
    if tensor.stride() == strides:
        return tensor.resolve_neg()
    copy = torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device=tensor.device)
    return copy.copy_(tensor)


def samples_are_blocks(tensor: Tensor, strides: tuple[int, ...]) -> bool:
    """Whether, with these dense strides, each sample is one block of memory."""
    return tensor.dim() > 0 and (tensor.shape[0] <= 1 or strides[0] * tensor.shape[0] >= tensor.numel())


def block_strides(sample: Tensor) -> tuple[int, ...]:
    """Return a dense layout in which each sample is one block: the results' own where it is, else contiguous."""
    strides = output_strides(sample)
    return strides if samples_are_blocks(sample, strides) else contiguous_strides(sample)


def model_input_strides(sample: Tensor) -> tuple[int, ...]:
    """Return the layout of a new model input, once or twice along the batch."""
    return (samples_stride(sample), *block_strides(sample)[1:])


def samples_stride(sample: Tensor) -> int:
    """Return the elements from one sample to the next where each is one block of memory."""
    return max(sample.numel() // max(sample.shape[0], 1), 1)


def kernels_can_count(sample: Tensor) -> bool:
    """Return whether each sample's memory is in row-major order or channels-last, which kernels can count."""
    if sample.dim() == 0:
        return True
    strides = output_strides(sample)
    channels_last = _permuted_strides(sample, (0, *range(2, sample.dim()), 1))
    return any(
        _same_where_it_matters(strides[1:], view[1:], sample.shape[1:])
        for view in (contiguous_strides(sample), channels_last)
    )


def _same_where_it_matters(a: tuple[int, ...], b: tuple[int, ...], sizes: torch.Size) -> bool:
    return all(x == y or size == 1 for x, y, size in zip(a, b, sizes, strict=True))


def _permuted_strides(tensor: Tensor, order: tuple[int, ...]) -> tuple[int, ...]:
    """Return dense strides with the dimensions in memory in this order."""
    strides, step = [0] * tensor.dim(), 1
    for dim in reversed(order[: tensor.dim()]):
        strides[dim] = step
        step *= max(tensor.shape[dim], 1)
    return tuple(strides)


def is_batched_view(tensor: Tensor, strides: tuple[int, ...]) -> bool:
    """Return whether each sample of `tensor` has the layout `strides`, the samples at least as far apart."""
    if tensor.stride() == strides:
        return True
    apart = tensor.dim() > 0 and tensor.stride(0) >= strides[0] and tensor.stride()[1:] == strides[1:]
    return apart and samples_are_blocks(tensor, strides)


def is_dense(tensor: Tensor) -> bool:
    """Return whether the elements fill one block of memory without gaps or repeats, in any order of dimensions."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size == 1:
            continue
        if stride != expected:
            return False
        expected *= size
    return True


def contiguous_strides(tensor: Tensor) -> tuple[int, ...]:
    """Return the strides of a contiguous tensor of this shape."""
    return _permuted_strides(tensor, tuple(range(tensor.dim())))
