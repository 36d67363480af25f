# SPDX-License-Identifier: MIT
"""Shapes, strides and shared memory: whatever the layout, a step gives the bits of the contiguous one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import fastdiff
from support.layouts import LAYOUTS, SHAPES, contiguous, examples_for, expanded, is_dense, same_layout, shapes_for
from support.oracle import (
    DTYPES,
    Case,
    Shape,
    assert_same_bits,
    assert_within_rounding,
    backends_at_hand,
    cases,
    device_of,
    make,
    plain_row,
)

BACKENDS = backends_at_hand()

PER_SAMPLE = ("guidance", "threshold", "table")


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_layout_gives_the_bits_of_the_contiguous_step(backend: str) -> None:
    @examples_for(backend, 200)
    @given(plan=cases(shapes=shapes_for(backend)), choice=st.lists(st.sampled_from(LAYOUTS), min_size=9, max_size=9))
    def check(plan: Shape, choice: list[Callable[[Tensor], Tensor]]) -> None:
        case = make(plan).to(device_of(backend))
        layouts = iter(choice * 2)

        def laid_out(name: str, tensor: Tensor) -> Tensor:
            if name in PER_SAMPLE:
                return tensor
            result = next(layouts)(tensor)
            assert torch.equal(result, tensor)
            return result

        other = case.with_tensors(laid_out)
        results = other.run(backend)
        assert_same_bits(results, case.run(backend))
        if is_dense(other.sample) and other.sample.numel() > 0:
            assert all(same_layout(result, other.sample) for result in results)

    check()


@given(plan=cases(shapes=SHAPES), choice=st.lists(st.sampled_from(LAYOUTS), min_size=9, max_size=9))
def test_any_layout_gives_the_same_bits_on_the_chosen_backend(
    plan: Shape, choice: list[Callable[[Tensor], Tensor]]
) -> None:
    # As the test above, by the short way into the extension that no forced backend takes.
    case = make(plan)
    layouts = iter(choice * 2)
    other = case.with_tensors(lambda name, tensor: tensor if name in PER_SAMPLE else next(layouts)(tensor))
    results = other.run()
    assert_same_bits(results, case.run())
    if is_dense(other.sample) and other.sample.numel() > 0:
        assert all(same_layout(result, other.sample) for result in results)


@given(plan=cases(shapes=SHAPES), layout=st.sampled_from(LAYOUTS))
def test_inputs_stay_as_they_were(plan: Shape, layout: Callable[[Tensor], Tensor]) -> None:
    case = make(plan).with_tensors(lambda name, tensor: tensor if name in PER_SAMPLE else layout(tensor))
    before = case.with_tensors(lambda _, tensor: tensor.clone())
    case.run()

    def unchanged(name: str, tensor: Tensor) -> Tensor:
        old = before.history[int(name[-1])] if name.startswith("history") else getattr(before, name)
        assert torch.equal(tensor, old), name
        return tensor

    case.with_tensors(unchanged)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(), (1,), (0,), (0, 3), (3, 0), (1, 4)], ids=str)
def test_degenerate_shapes_take_every_argument(backend: str, shape: tuple[int, ...]) -> None:
    plan = Shape(5, torch.float32, shape, "a sample", 15, True, 1, True, 2, True)
    case = make(plan).to(device_of(backend))
    assert_within_rounding(case, case.run(backend, out=case.poisoned_out()), backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_batch_of_one_with_a_meaningless_stride_takes_a_threshold(backend: str) -> None:
    # What `column.t()` gives: strides (1, 1), dense, and contiguous by torch's own account.
    sample = torch.randn(4, 1, device=device_of(backend)).t()
    noise = torch.randn(1, 4, device=sample.device)
    row = plain_row(p=1.0, prev_d=1.0, prev_z=1.0).to(sample.device)
    case = Case(sample, sample, row, noise=noise, threshold=torch.full((1,), 1.5, device=sample.device))
    assert_within_rounding(case, case.run(backend), backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_lazily_negated_views_are_read_as_their_values(backend: str) -> None:
    x = torch.randn(6, device=device_of(backend))
    negated = torch._neg_view(x)
    case = Case(negated, negated, plain_row(prev_x=1.0, prev_m=2.0).to(x.device))
    assert_within_rounding(case, case.run(backend), backend)


# --- Sharing memory --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_outputs_may_be_any_of_the_inputs(backend: str) -> None:
    @examples_for(backend, 100)
    @given(
        plan=cases(shapes=shapes_for(backend)),
        targets=st.permutations(
            ["sample", "model_output", "uncond", "noise", "variance", *(f"history_{j}" for j in range(4))]
        ),
        layouts=st.tuples(st.sampled_from(LAYOUTS), st.sampled_from(LAYOUTS)),
    )
    def check(plan: Shape, targets: list[str], layouts: tuple[Callable[[Tensor], Tensor], ...]) -> None:
        # Model tensors in one layout, the samples' in another, none of them expanded: that cannot be written to.
        state, model = (contiguous if layout is expanded else layout for layout in layouts)
        fresh = make(plan).to(device_of(backend))
        expected = fresh.run(backend)
        there: dict[str, Tensor] = {}

        def keep(name: str, tensor: Tensor) -> Tensor:
            if name in PER_SAMPLE:
                return tensor
            there[name] = (model if name in ("model_output", "uncond", "variance") else state)(tensor)
            return there[name]

        case = fresh.with_tensors(keep)
        names = [name for name in targets if name in there][: plan.keeps + 1]
        spare = case.poisoned_out()
        out = [there[name] for name in names] + list(spare)[: plan.keeps + 1 - len(names)]
        untouched = {name: tensor.clone() for name, tensor in there.items() if name not in names}
        returned = case.run(backend, out=out)
        assert all(a is b for a, b in zip(returned, out, strict=True))
        assert_same_bits(out, expected)
        for name, tensor in untouched.items():
            assert torch.equal(there[name], tensor), name

    check()


@pytest.mark.parametrize("backend", [None, *BACKENDS])
def test_an_output_that_is_none_is_made_and_the_others_written(backend: str | None) -> None:
    case = make(Shape(1, torch.float32, (2, 3), keeps=2)).to(device_of(backend or ""))
    expected = case.run(backend)
    for given_ones in range(8):
        out = [tensor if given_ones >> o & 1 else None for o, tensor in enumerate(case.poisoned_out())]
        results = case.run(backend, out=out)  # type: ignore[arg-type]
        assert_same_bits(results, expected)
        assert all(tensor is None or tensor is result for tensor, result in zip(out, results, strict=True))


@pytest.mark.parametrize("backend", [None, *BACKENDS])
def test_outputs_that_overlap_an_input_in_part_get_the_fresh_result(backend: str | None) -> None:
    @examples_for(backend or "", 100)
    @given(
        seed=st.integers(0, 2**32 - 1),
        dtype=st.sampled_from(DTYPES),
        size=st.sampled_from([2, 9, 64, 513, 1100]),
        shift=st.integers(-8, 8),
        name=st.sampled_from(["sample", "model_output", "noise", "history"]),
    )
    def check(seed: int, dtype: torch.dtype, size: int, shift: int, name: str) -> None:
        gen = torch.Generator().manual_seed(seed)
        device = device_of(backend or "")
        room = torch.randn(size + 8, generator=gen).to(device, dtype)
        rest = torch.randn(3, size, generator=gen).to(device, dtype)
        row = plain_row(dtype, p=1.0, q=0.5, clip=0.8, prev_x=0.5, prev_m=0.25, prev_d=2.0, prev_h0=1.0, prev_z=0.1)
        first = max(-shift, 0)
        inside = room[first : first + size]
        out = room[first + shift : first + shift + size]

        def case_with(shared: Tensor) -> Case:
            tensors = dict(zip(["sample", "model_output", "noise", "history"], [*rest, rest[0]], strict=True))
            tensors[name] = shared
            return Case(
                tensors["sample"], tensors["model_output"], row.to(device), noise=tensors["noise"],
                history=[tensors["history"]],
            )  # fmt: skip

        expected = case_with(inside.clone()).run(backend)
        assert_same_bits(case_with(inside).run(backend, out=[out]), expected)

    check()


@pytest.mark.parametrize("backend", [None, *BACKENDS])
def test_an_output_over_a_model_tensor_with_gaps_gets_the_fresh_result(backend: str | None) -> None:
    # The output covers the gap between two samples of the model's tensor, and part of the tensor itself.
    device = device_of(backend or "")
    wide = torch.randn(2, 6, 50, device=device)
    sample = torch.randn(2, 3, 50, device=device)
    row = plain_row(prev_x=1.0, prev_m=1.0).to(device)
    for first in (0, 75, 150, 225, 300):
        buffer = wide.clone()
        out = buffer.view(-1)[first : first + 300].view(2, 3, 50)
        expected = Case(sample, wide[:, 3:].clone(), row).run(backend)
        assert_same_bits(Case(sample, buffer[:, 3:], row).run(backend, out=[out]), expected)


@pytest.mark.parametrize("backend", [None, *BACKENDS])
@pytest.mark.parametrize("shift", [0, 1, 5, 9])
def test_two_outputs_in_the_same_memory_are_refused_and_nothing_is_written(backend: str | None, shift: int) -> None:
    device = device_of(backend or "")
    room = torch.full((20,), float("nan"), device=device)
    x = torch.ones(10, device=device)
    case = Case(x, x, plain_row(prev_x=1.0, k0_x=2.0).to(device), keeps=1)
    with pytest.raises(ValueError, match=r"^step: out\[1\] shares memory with another output, expected .*; "):
        case.run(backend, out=[room[:10], room[shift : shift + 10]])
    assert bool(room.isnan().all())
    case.run(backend, out=[room[:10], room[10:]])
    assert torch.equal(room, torch.tensor([1.0] * 10 + [2.0] * 10, device=device))


@pytest.mark.parametrize("backend", [None, *BACKENDS])
def test_two_outputs_that_interleave_without_sharing_an_element_are_written(backend: str | None) -> None:
    device = device_of(backend or "")
    room = torch.full((2, 6, 4), float("nan"), device=device)
    x = torch.randn(2, 3, 4, device=device)
    case = Case(x, x, plain_row(prev_x=1.0, k0_x=2.0).to(device), keeps=1)
    case.run(backend, out=[room[:, :3], room[:, 3:]])
    assert torch.equal(room, torch.cat([x, 2 * x], dim=1))


@pytest.mark.parametrize("backend", [None, *BACKENDS])
@pytest.mark.parametrize("dense_first", [False, True])
def test_an_output_in_the_gaps_of_another_is_written(backend: str | None, dense_first: bool) -> None:
    # One output is the middle row of three, dense, and the other lies around it.
    device = device_of(backend or "")
    room = torch.full((3, 8), float("nan"), device=device)
    inner, around = room[1, :4].view(2, 2), room[::2, :2]
    x = torch.randn(2, 2, device=device)
    out = [inner, around] if dense_first else [around, inner]
    Case(x, x, plain_row(prev_x=1.0, k0_x=2.0).to(device), keeps=1).run(backend, out=out)
    assert torch.equal(out[0], x)
    assert torch.equal(out[1], 2 * x)
    assert int(room.isnan().sum()) == room.numel() - 8


def test_halves_of_doubled_channels_are_read_where_they_lie() -> None:
    # The promise is speed: no copy. It shows in the views' bits being read although the gaps hold NaN.
    if fastdiff.ops.backends.extension is None:
        pytest.skip(fastdiff.ops.backends.extension_error)
    sample = torch.randn(2, 3, 8, 8)
    both = torch.randn(2, 6, 8, 8)
    output, variance = both.chunk(2, dim=1)
    table = plain_row(prev_x=1.0, prev_m=1.0, prev_z=1.0)
    done = fastdiff.ops.backends.extension.step(
        sample=sample,
        model_output=output,
        table=table,
        row_index=0,
        noise=sample,
        variance=variance.abs_(),
        variance_kind=2,
    )
    assert isinstance(done, tuple)
    assert_within_rounding(Case(sample, output, table, noise=sample, variance=variance, variance_kind=2), done, "cpu")
