# SPDX-License-Identifier: MIT
"""The Gram matrix: each entry has the bits of the scalar product on its backend, from tensors read once."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastdiff import ops
from fastdiff.ops.gram import gram as unrecorded_gram  # the record of backends cannot be compiled
from fastdiff.row_layout import compute_dtype
from support.oracle import DTYPES, INTERPRETED, UNIT_ROUNDOFF, assert_same_bits, available_backends, device_of
from support.reduction_cases import IN_A_BLOCK, LAYOUTS, SEEDS, SHAPES, SPREADS, numbers, oracle, with_layout

pytestmark = pytest.mark.checks_backend
BACKENDS = available_backends()


def few(backend: str, examples: int) -> settings:
    """Return settings with few examples for Triton's interpreter."""
    return settings(max_examples=2 if backend == "triton" and INTERPRETED else examples)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_entries_have_the_bits_of_dot(backend: str, dtype: torch.dtype) -> None:
    @few(backend, 15)
    @given(seed=SEEDS, shape=SHAPES, spread=SPREADS, layout=LAYOUTS, count=st.integers(2, 6), sums=st.booleans())
    def check(seed: int, shape: tuple[int, ...], spread: str, layout: str, count: int, sums: bool) -> None:
        device = device_of(backend)
        xs = [numbers(seed + i, shape, dtype, spread).to(device) for i in range(count)]
        xs[0] = with_layout(xs[0], layout)
        given_twice = [*xs[:-1], xs[0]]  # the same tensor may be given twice
        interpreted = backend == "triton" and INTERPRETED  # whose calls take tenths of a second: one of the two
        for tensors in ((xs, given_twice)[seed % 2],) if interpreted else (xs, given_twice):
            result = ops.gram(tensors, sums=sums, backend=backend)
            matrix = result[0] if sums else result
            assert isinstance(matrix, Tensor)
            assert matrix.shape == (shape[0], count, count)
            assert matrix.dtype == compute_dtype(dtype)
            i, j = seed % count, seed // 7 % count
            # All in the memory order of the first.
            laid_out = [
                torch.empty_like(tensors[0]).copy_(t) if t.stride() != tensors[0].stride() else t for t in tensors
            ]
            if layout != "gaps":  # whose copies are contiguous
                assert_same_bits([matrix[:, i, j]], [ops.dot(laid_out[i], laid_out[j], backend=backend)])
            assert_same_bits([matrix.contiguous()], [matrix.transpose(1, 2).contiguous()])
            if sums:
                expected = np.stack([t.cpu().double().reshape(shape[0], -1).sum(1).numpy() for t in tensors], 1)
                size = np.stack([t.cpu().double().abs().reshape(shape[0], -1).sum(1).numpy() for t in tensors], 1)
                # As many roundings as a block has, and the last one; blocks are added in float64.
                bound = (IN_A_BLOCK + 2) * UNIT_ROUNDOFF[dtype] * size
                assert (abs(result[1].cpu().double().numpy() - expected) <= bound).all()

    check()


@pytest.mark.parametrize("backend", BACKENDS)
def test_products_are_within_rounding_bound(backend: str) -> None:
    x, y = (numbers(i, (3, 2500), torch.float32, "wide") for i in range(2))
    got = ops.gram([x.to(device_of(backend)), y.to(device_of(backend))], backend=backend).cpu()
    value, bound = oracle("dot", x, y, 0.0)
    assert (abs(got[:, 0, 1].double().numpy() - value) <= bound).all()
    value, bound = oracle("dot", x, x, 0.0)
    assert (abs(got[:, 0, 0].double().numpy() - value) <= bound).all()


@pytest.mark.skipif("cpu" not in BACKENDS, reason="needs the extension")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_numbers_on_the_host_and_views_are_those_of_a_forced_backend(dtype: torch.dtype) -> None:
    @settings(max_examples=8)
    @given(seed=SEEDS, shape=SHAPES, layout=LAYOUTS, count=st.integers(2, 6))
    def check(seed: int, shape: tuple[int, ...], layout: str, count: int) -> None:
        xs = [with_layout(numbers(seed + i, shape, dtype, "wide"), layout) for i in range(count)]
        matrix, sums = ops.gram(xs, sums=True, backend="cpu")
        assert ops.host_gram(tuple(xs)) == matrix.tolist()
        views = ops.gram(xs, sums=True)
        assert_same_bits([view.contiguous() for view in views], [matrix.contiguous(), sums.contiguous()])

    check()


def test_gram_is_independent_of_threads_and_batch() -> None:
    xs = [numbers(i, (3, 70_001), torch.float32, "wide") for i in range(3)]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        two = ops.gram(xs)
        torch.set_num_threads(1)
        assert_same_bits([ops.gram(xs)], [two])
    finally:
        torch.set_num_threads(before)
    assert_same_bits([ops.gram([x[1:2] for x in xs])], [two[1:2]])


@pytest.mark.parametrize("backend", BACKENDS)
def test_samples_without_elements_give_zero(backend: str) -> None:
    device = device_of(backend)
    matrix, sums = ops.gram([torch.empty(2, 0, device=device)] * 3, sums=True, backend=backend)
    assert matrix.tolist() == torch.zeros(2, 3, 3).tolist()
    assert sums.tolist() == torch.zeros(2, 3).tolist()
    assert ops.gram([torch.empty(0, 4, device=device)] * 2, backend=backend).shape == (0, 2, 2)
    assert ops.gram([torch.ones(1, 1, device=device)] * 2, backend=backend).tolist() == [[[1.0, 1.0], [1.0, 1.0]]]


@pytest.mark.parametrize("sums", [False, True])
def test_gradients_match_finite_differences(sums: bool) -> None:
    xs = [numbers(i, (2, 3, 5), torch.float64).requires_grad_() for i in range(3)]
    assert torch.autograd.gradcheck(lambda *tensors: ops.gram(tensors, sums=sums), xs)
    torch.library.opcheck(torch.ops.fastdiff.gram.default, (xs, sums, ""))


def test_gram_compiles_to_one_graph() -> None:
    xs = [numbers(i, (2, 3, 40), torch.float16) for i in range(2)]
    compiled = torch.compile(lambda *tensors: unrecorded_gram(list(tensors)), fullgraph=True, backend="aot_eager")
    assert_same_bits([compiled(*xs)], [ops.gram(xs)])


X = torch.ones(2, 3)


@pytest.mark.parametrize(
    ("tensors", "error", "message"),
    [
        (X, TypeError, "gram: tensors is a Tensor, expected a list or tuple of tensors"),
        ([X], ValueError, "gram: tensors holds 1 tensors, expected 2 to 6"),
        ([X] * 7, ValueError, "gram: tensors holds 7 tensors, expected 2 to 6"),
        ([X, None], TypeError, r"gram: tensors\[1\] is a NoneType, expected a torch.Tensor"),
        ([X, X[:, :2]], ValueError, r"gram: tensors\[1\] has shape \[2, 2\], expected \[2, 3\] like tensors\[0\]"),
        ([X, X.double()], TypeError, r"gram: tensors\[1\] has dtype torch.float64, expected torch.float32"),
        ([X.long(), X.long()], TypeError, r"gram: tensors\[0\] has dtype torch.int64, expected float16"),
        ([X[0, 0], X[0, 0]], ValueError, r"gram: tensors\[0\] has no dimension"),
    ],
)
def test_invalid_tensors_are_refused_with_one_sentence(tensors: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ops.gram(tensors)
