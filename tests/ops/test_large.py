# SPDX-License-Identifier: MIT
"""A step over more elements than 32 bits count: every index and every byte offset is of 64."""

from __future__ import annotations

from collections.abc import Iterator

import psutil
import pytest
import torch
from torch import Tensor

from fastdiff import ops
from fastdiff.ops import backends
from support.oracle import Case, assert_within_rounding, plain_row

GIB = 2**30
#: Elements: past 2³¹, by a number that no tile, vector or share of a thread divides.
ELEMENTS = 2**31 + 12_347
#: What repeats along the tensors. A prime: an index that lost its high bits lands on another value.
PERIOD = 1_000_003
#: How many elements are looked at in one place.
WINDOW = 4_096

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(backends.extension is None, reason="the C++ extension was not built"),
]


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def need(elements: int) -> None:
    """Skip where the memory that is free does not hold so many float16, and half a GiB beside them."""
    free, needed = psutil.virtual_memory().available, 2 * elements + GIB // 2
    if free < needed:
        pytest.skip(f"needs {needed / GIB:.1f} GiB of memory, {free / GIB:.1f} are free")


def periodic(elements: int, seed: int) -> Tensor:
    """float16 values that repeat after `PERIOD`, written in place."""
    pattern = torch.randn(PERIOD, generator=torch.Generator().manual_seed(seed)).half()
    tensor = torch.empty(elements, dtype=torch.float16)
    whole = elements // PERIOD * PERIOD
    tensor[:whole].view(-1, PERIOD).copy_(pattern.expand(whole // PERIOD, PERIOD))
    tensor[whole:].copy_(pattern[: elements - whole])
    return tensor


def windows(elements: int) -> list[int]:
    """Where to look: both ends, and around each element and each byte at which 31 and 32 bits end."""
    middles = [2**30, 2**31, elements // 2]
    starts = [0, elements - WINDOW, *(middle - WINDOW // 2 for middle in middles)]
    return sorted({min(max(start, 0), elements - WINDOW) for start in starts})


def test_a_step_in_place_over_more_than_2_to_the_31_elements() -> None:
    need(ELEMENTS)
    x = periodic(ELEMENTS, 1)
    before = {start: x[start : start + WINDOW].clone() for start in windows(ELEMENTS)}
    row = plain_row(p=0.5, q=0.25, clip=0.9, prev_x=0.3, prev_m=-0.7, prev_d=2.0)
    # One tensor for all: the sample, the model's output and where the result goes.
    (result,) = ops.step(x, x, row, 0, out=[x])
    assert result is x
    for start, old in before.items():
        assert_within_rounding(Case(old, old, row), [x[start : start + WINDOW]], "cpu")
    # Each element was written, and once: equal inputs a period apart have equal results.
    whole = ELEMENTS // PERIOD * PERIOD
    first = x[:PERIOD].view(torch.int16)
    for block in x[:whole].view(torch.int16).view(-1, PERIOD):
        assert torch.equal(block, first)
    assert torch.equal(x[whole:].view(torch.int16), first[: ELEMENTS - whole])


def test_a_batch_whose_model_tensors_lie_apart_over_more_than_2_to_the_31_elements() -> None:
    # Two samples and twice their channels: what the second sample reads begins past 2³¹ elements, 2³² bytes.
    inner = 2**30 + 6_173
    need(2 * 2 * inner + 2 * inner)
    both = periodic(2 * 2 * inner, 2).view(2, 2, inner)
    output, variance = both[:, :1], both[:, 1:]
    x = periodic(2 * inner, 3).view(2, 1, inner)
    row = plain_row(prev_x=0.3, prev_m=-0.7, prev_z=0.5, offset=-1.0, slope=0.5)
    places = [(b, start) for b in range(2) for start in windows(inner)]
    before = {at: x[at[0], 0, at[1] : at[1] + WINDOW].clone() for at in places}
    # The sample is its own noise. By the binding: it must not be copied, and this says so.
    done = backends.extension.step(  # type: ignore[union-attr]
        sample=x, model_output=output, table=row, row_index=0, noise=x, variance=variance, variance_kind=1, out=(x,)
    )
    assert isinstance(done, tuple)
    for (b, start), old in before.items():
        end = start + WINDOW
        case = Case(
            old, output[b, 0, start:end], row, noise=old, variance=variance[b, 0, start:end], variance_kind=1
        )  # fmt: skip
        assert_within_rounding(case, [x[b, 0, start:end]], "cpu")
