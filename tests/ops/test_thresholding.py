# SPDX-License-Identifier: MIT
"""The threshold a sample of dynamic thresholding is the quantile that torch takes."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastdiff.ops.thresholding import dynamic_threshold
from fastdiff.row_layout import compute_dtype
from support.oracle import DTYPES, SECOND_ORDER, UNIT_ROUNDOFF

RATIOS = st.one_of(st.sampled_from([1.0, 0.995, 0.5, 1e-6]), st.floats(1e-6, 1.0))
#: lerp: a difference, a product and a sum, each rounded once and none larger than the larger of the two neighbours
#: (their difference is at most that: both are magnitudes).
LERP_ROUNDINGS = 3


@given(
    seed=st.integers(0, 2**32 - 1),
    dtype=st.sampled_from(DTYPES),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 40), st.integers(1, 9)),
    ratio=RATIOS,
    scale=st.sampled_from([0.3, 1.0, 5.0]),
)
def test_the_threshold_is_the_linear_quantile_to_rounding(
    seed: int, dtype: torch.dtype, shape: tuple[int, ...], ratio: float, scale: float
) -> None:
    x0 = (scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).to(dtype)
    got = dynamic_threshold(x0, ratio, sample_max_value=1e6)
    assert got.dtype == compute_dtype(dtype)
    assert got.shape == shape[:1]
    ordered = x0.double().abs().flatten(1).sort().values
    position = ratio * (ordered.shape[1] - 1)
    low, high = math.floor(position), math.ceil(position)
    exact = (1 - (position - low)) * ordered[:, low] + (position - low) * ordered[:, high]
    bound = (LERP_ROUNDINGS * UNIT_ROUNDOFF[dtype] + 4 * UNIT_ROUNDOFF[torch.float64]) * ordered[:, high]
    # The position is torch's: the ratio and its product with a count, each rounded, move it along a gap.
    gap = ordered.diff(dim=1).amax(dim=1) if ordered.shape[1] > 1 else 0.0
    bound += 2 * SECOND_ORDER * UNIT_ROUNDOFF[dtype] * position * gap
    assert bool(((got.double() - exact.clamp(min=1.0)).abs() <= bound).all())
    values = x0.to(compute_dtype(dtype)).abs().flatten(1)
    assert torch.equal(got, torch.quantile(values, ratio, dim=1, interpolation="linear").clamp(min=1.0))
    # torch.quantile in double is the oracle's oracle; its own position is rounded, so neighbours' distance counts.
    by_torch = torch.quantile(x0.double().abs().flatten(1), ratio, dim=1, interpolation="linear").clamp(min=1.0)
    slack = bound + 1e-12 * ordered.shape[1] * ordered[:, -1]
    assert bool(((got.double() - by_torch).abs() <= slack).all())


def test_more_elements_than_torch_quantile_takes_are_no_trouble() -> None:
    x0 = torch.arange(2**24 + 2, dtype=torch.float64)[None]  # torch.quantile stops at 16 million
    expected = 0.995 * (2**24 + 1)
    assert dynamic_threshold(x0, 0.995, 1e9).item() == pytest.approx(expected, rel=1e-12)


@given(seed=st.integers(0, 2**32 - 1), ratio=RATIOS, most=st.sampled_from([0.3, 0.5, 1.0, 1.5, 100.0]))
def test_the_threshold_is_the_quantile_clamped_as_torch_clamps(seed: int, ratio: float, most: float) -> None:
    # torch.clamp(s, min=1, max=most) takes the upper bound last: below 1 it is the result.
    x0 = 3 * torch.randn(4, 33, generator=torch.Generator().manual_seed(seed))
    got = dynamic_threshold(x0, ratio, most)
    assert torch.equal(got, torch.quantile(x0.abs(), ratio, dim=1).clamp(min=1, max=most))
    assert bool((got >= min(most, 1.0)).all())
    assert bool((got <= most).all())
    if most < 1.0:
        assert got.tolist() == [float(torch.tensor(most))] * 4


@given(seed=st.integers(0, 2**32 - 1), ratio=RATIOS)
def test_each_sample_has_its_own_threshold(seed: int, ratio: float) -> None:
    x0 = 3 * torch.randn(3, 2, 7, generator=torch.Generator().manual_seed(seed))
    alone = [dynamic_threshold(x0[i : i + 1], ratio, 10.0) for i in range(3)]
    assert torch.equal(dynamic_threshold(x0, ratio, 10.0), torch.cat(alone))


@pytest.mark.parametrize("ratio", [1.0, 0.995, 0.5])
def test_finite_values_of_any_size_give_a_finite_threshold(ratio: float) -> None:
    for dtype in DTYPES:
        largest = torch.finfo(dtype).max
        x0 = torch.tensor([[0.0, largest, -largest, torch.finfo(dtype).tiny]], dtype=dtype)
        assert bool(torch.isfinite(dynamic_threshold(x0, ratio, 2.0)).all())


def test_an_infinite_value_above_the_quantile_does_not_make_it_nan() -> None:
    # A half-precision overflow in one element: the quantile below it is a number, and weight 0 of infinity is nothing.
    x0 = torch.tensor([[1.0, 2.0, math.inf]])
    assert dynamic_threshold(x0, 0.5, 10.0).tolist() == [2.0]


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_where_there_is_no_quantile_the_largest_bound_serves(bad: float) -> None:
    # All of the largest numbers infinite, or one not a number: the others are still to be scaled by something finite.
    x0 = torch.tensor([[1.0, 2.0, bad, bad], [1.0, 2.0, 3.0, 4.0]])
    assert dynamic_threshold(x0, 1.0, 10.0).tolist() == [10.0, 4.0]
    assert dynamic_threshold(x0, 0.9, 10.0).tolist()[0] == 10.0


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (3,), (1,)])
def test_degenerate_shapes_have_a_threshold_a_sample(shape: tuple[int, ...]) -> None:
    got = dynamic_threshold(torch.full(shape, 4.0), 0.9, 10.0)
    assert got.shape == shape[:1]
    # Of no element at all there is no quantile: the smallest bound does no harm.
    assert got.tolist() == [4.0 if len(shape) == 1 else 1.0] * shape[0]
    assert dynamic_threshold(torch.full(shape, 4.0), 0.9, 0.5).tolist() == [0.5] * shape[0]
