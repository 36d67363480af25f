# SPDX-License-Identifier: MIT
"""Memory layouts of tensors, and the shapes and number of examples for the property-based tests of a backend."""

from __future__ import annotations

from collections.abc import Callable

import torch
from hypothesis import Phase, settings
from hypothesis import strategies as st
from torch import Tensor

from support.oracle import INTERPRETED

Layout = Callable[[Tensor], Tensor]


def examples_for(backend: str, examples: int) -> settings:
    """Return the settings of a property-based test.

    A call of Triton's interpreter takes 10 ms or more: use few examples, and do not shrink a failing one. The profile
    "sanitize" has fewer examples of every test.
    """
    if backend == "triton" and INTERPRETED:
        return settings(max_examples=15, phases=[Phase.explicit, Phase.reuse, Phase.generate])
    few = settings.get_profile("sanitize").max_examples
    return settings(max_examples=few if settings.default.max_examples == few else examples)


# --- Layouts: each returns a tensor with the same values in another layout -------------------------------------------


def contiguous(tensor: Tensor) -> Tensor:
    return tensor.clone(memory_format=torch.contiguous_format)


def transposed(tensor: Tensor) -> Tensor:
    """Dense, with the dimensions in reverse memory order, so that a sample is not one block."""
    order = list(reversed(range(tensor.dim())))
    return contiguous(tensor.permute(order)).permute(order)


def channels_last(tensor: Tensor) -> Tensor:
    """Dense, with dimension 1 innermost; each sample is one block."""
    if tensor.dim() < 3:
        return contiguous(tensor)
    return contiguous(tensor.movedim(1, -1)).movedim(-1, 1)


def sliced(tensor: Tensor) -> Tensor:
    """Every second element of the last dimension of a tensor of twice the size."""
    if tensor.dim() == 0:
        return contiguous(tensor)
    wide = torch.full(
        (*tensor.shape[:-1], 2 * tensor.shape[-1]), float("nan"), dtype=tensor.dtype, device=tensor.device
    )
    wide[..., 1::2] = tensor
    return wide[..., 1::2]


def expanded(tensor: Tensor) -> Tensor:
    """Stride 0 in the first dimension if all samples are equal."""
    if tensor.dim() == 0 or tensor.shape[0] == 0 or not torch.equal(tensor, tensor[:1].expand_as(tensor)):
        return contiguous(tensor)
    return tensor[:1].clone().expand_as(tensor)


def chunk_of_doubled_batch(tensor: Tensor) -> Tensor:
    """The second half of a batch of twice the size, as in classifier-free guidance."""
    return tensor if tensor.dim() == 0 else torch.cat([torch.full_like(tensor, float("nan")), tensor]).chunk(2)[-1]


def half_of_doubled_channels(tensor: Tensor) -> Tensor:
    """The second half of twice the channels, as a learned variance: each sample is a block, with gaps between them."""
    if tensor.dim() < 2:
        return contiguous(tensor)
    wide = torch.cat([torch.full_like(tensor, float("nan")), contiguous(tensor)], dim=1)
    return wide[:, tensor.shape[1] :]


def shifted(tensor: Tensor) -> Tensor:
    """Contiguous, starting one element after an aligned address."""
    flat = torch.empty(tensor.numel() + 1, dtype=tensor.dtype, device=tensor.device)
    flat[1:] = tensor.reshape(-1)
    return flat[1:].view(tensor.shape)


def strange_strides_of_size_one(tensor: Tensor) -> Tensor:
    """Arbitrary strides in dimensions of size 1, as in views of other tensors."""
    strides = [
        1 if size == 1 else stride for size, stride in zip(tensor.shape, contiguous(tensor).stride(), strict=True)
    ]
    return contiguous(tensor).as_strided(tensor.shape, strides)


LAYOUTS: list[Layout] = [
    contiguous,
    transposed,
    channels_last,
    sliced,
    expanded,
    chunk_of_doubled_batch,
    half_of_doubled_channels,
    shifted,
    strange_strides_of_size_one,
]

# --- Elements that share an address ----------------------------------------------------------------------------------


def one_sample_for_all(tensor: Tensor) -> Tensor:
    return tensor[:1].expand(tensor.shape) if tensor.dim() else tensor


def one_number_for_all(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1)[:1].reshape(()).expand(tensor.shape) if tensor.numel() else tensor


def sliding(tensor: Tensor) -> Tensor:
    """Overlapping windows over one sequence of numbers, each shifted by one element, at an offset in its buffer."""
    buffer = torch.cat([torch.full_like(tensor.reshape(-1)[:3], float("nan")), tensor.reshape(-1)])
    return buffer.as_strided(tensor.shape, [1] * tensor.dim(), min(3, tensor.numel()))


def lazily_negated(tensor: Tensor) -> Tensor:
    return torch._neg_view(one_sample_for_all(tensor))


OVERLAPPING = [one_sample_for_all, one_number_for_all, sliding, lazily_negated]
ANY_LAYOUT = [*LAYOUTS, *OVERLAPPING]


def separate(tensor: Tensor) -> Tensor:
    """Return a contiguous copy, without shared elements."""
    return tensor.resolve_neg().clone(memory_format=torch.contiguous_format)


#: Empty, one element, primes, sizes around a tile of 512 and around vector widths, and typical images and vectors.
FEW_SAMPLES = st.one_of(
    st.sampled_from(
        [(), (0,), (1,), (0, 3), (3, 0), (2, 0, 4), (1, 1, 1, 1), (1, 4), (4, 1), (1, 2, 3, 3), (2, 1, 3, 1)]
    ),
    st.lists(st.integers(1, 5), min_size=1, max_size=3).map(lambda rest: (2, *rest)),
    st.sampled_from([(1, n) for n in (7, 8, 9, 15, 17, 31, 33, 127, 511, 512, 513, 1021, 1024, 1025)]),
    st.sampled_from([(2, 257), (3, 13, 17), (2, 4, 8, 8), (2, 3, 7, 11), (3, 2, 2, 2, 5)]),
)
#: With a scalar per sample Triton runs a program per sample, which takes its interpreter tens of milliseconds each.
MANY_SAMPLES = st.one_of(
    st.lists(st.integers(1, 5), min_size=1, max_size=4).map(tuple),
    st.sampled_from([(n,) for n in (7, 8, 9, 15, 17, 31, 33, 127, 511, 512, 513, 1021, 1024, 1025)]),
)
SHAPES = st.one_of(FEW_SAMPLES, MANY_SAMPLES)


def shapes_for(backend: str) -> st.SearchStrategy[tuple[int, ...]]:
    return FEW_SAMPLES if backend == "triton" and INTERPRETED else SHAPES


def is_dense(tensor: Tensor) -> bool:
    """Return True if every address from first to last belongs to exactly one element."""
    addresses = torch.zeros(tensor.shape, dtype=torch.int64)
    for dim, (size, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
        addresses += (torch.arange(size) * stride).reshape(-1, *[1] * (tensor.dim() - 1 - dim))
    return sorted(addresses.reshape(-1).tolist()) == list(range(tensor.numel()))


def same_layout(a: Tensor, b: Tensor) -> bool:
    """Return True if the strides are equal in all dimensions with more than one element."""
    return all(s == t for s, t, size in zip(a.stride(), b.stride(), a.shape, strict=True) if size > 1)
