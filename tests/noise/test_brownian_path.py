# SPDX-License-Identifier: MIT
"""Brownian paths of the samples' own seeds: their law in exact arithmetic, their numbers, and what they depend on."""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.schedulers.scheduling_dpmsolver_sde import BrownianTreeNoiseSampler
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

import fastdiff
from fastdiff import Purpose, ops
from fastdiff.noise import brownian_path
from fastdiff.noise.brownian_path import BrownianPath, Time, _octaves_between

SEEDS = st.integers(0, 2**64 - 1)
#: Over all octaves that noise levels have, the range below them, and times whose bridge ends early.
TIMES = (
    st.floats(2.0**-24, 2.0**15, width=32)
    | st.floats(0.0, 2.0**-18)
    | st.integers(0, 4096).map(lambda k: k / 64)
)  # fmt: skip
SIGNED = st.builds(lambda time, sign: time * sign, TIMES, st.sampled_from([1.0, -1.0]))


def next_time(time: float, ulps: int = 1) -> float:
    """A float32 number a few places above."""
    value = np.float32(time)
    for _ in range(ulps):
        value = np.nextafter(value, np.float32(np.inf))
    return float(value)


@given(st.floats(2.0**-20, 2.0**105, width=32))
def test_float32_times_are_exact(value: float) -> None:
    assert Time.of(value).value == value
    assert Time.of(-value).value == -value


@given(st.floats(-(2.0**40), 2.0**40), st.floats(-(2.0**40), 2.0**40))
def test_times_are_rounded_and_keep_their_order(a: float, b: float) -> None:
    # Half a unit of 24 bits, or half of 2⁻⁴³.
    assert abs(Time.of(a).value - a) <= max(abs(a) * 2.0**-24, 2.0**-44)
    assert (Time.of(a).value <= Time.of(b).value) or a > b


def test_zero_is_one_time() -> None:
    assert Time.of(0.0) == Time.of(-0.0) == Time.of(-1e-30) == Time(False, 0, 0)


def value_draws(value: float) -> dict[int, float]:
    """The draws whose sum is W(value), by their step."""
    time, draws = Time.of(value), {}
    for step, weight in (*_octaves_between(Time.of(0.0), time), *time.since_octave()):
        assert step not in draws
        assert 0 <= step < 2**32
        draws[step] = weight
    return draws


@given(SIGNED, SIGNED)
def test_covariances_are_those_of_a_brownian_motion(a: float, b: float) -> None:
    of_a, of_b = value_draws(a), value_draws(b)
    a, b = Time.of(a).value, Time.of(b).value
    covariance = math.fsum(weight * of_b.get(step, 0.0) for step, weight in of_a.items())
    expected = min(abs(a), abs(b)) if (a < 0) == (b < 0) else 0.0
    assert covariance == pytest.approx(expected, rel=1e-13, abs=0)


@given(TIMES.filter(lambda t: t >= 2.0**-20), st.integers(1, 5), st.integers(1, 5))
def test_small_adjacent_increments_are_independent(start: float, ulps: int, more: int) -> None:
    times = [start, next_time(start, ulps), next_time(start, ulps + more)]
    draws = [value_draws(time) for time in times]
    increments = [
        {step: after.get(step, 0.0) - before.get(step, 0.0) for step in before.keys() | after.keys()}
        for before, after in itertools.pairwise(draws)
    ]
    # Weights of up to √t, each with an error of 2⁻⁵³, take part in a difference of √(t·2⁻²³) at the least.
    for increment, (before, after) in zip(increments, itertools.pairwise(times), strict=True):
        assert math.fsum(w * w for w in increment.values()) == pytest.approx(after - before, rel=1e-10)
    product = math.fsum(weight * increments[1].get(step, 0.0) for step, weight in increments[0].items())
    assert abs(product) <= 1e-10 * (times[2] - times[0])


def exact_increment(seeds: Sequence[int], size: int, start: float, end: float) -> tuple[Tensor, Tensor, int]:
    """W(end) − W(start) in float64 from the definition, the sum of its terms' magnitudes, and their number."""
    times = [Time.of(start), Time.of(end)]
    terms = [(step, weight, 1.0) for step, weight in _octaves_between(*times)]
    terms += [(step, weight, sign) for time, sign in zip(times, (-1.0, 1.0), strict=True)
              for step, weight in time.since_octave()]  # fmt: skip
    total = torch.zeros(len(seeds), size, dtype=torch.float64)
    largest = torch.zeros_like(total)
    for step, weight, sign in terms:
        drawn = weight * fastdiff.randn((len(seeds), size), seeds, step, Purpose.PATH, dtype=torch.float64)
        total += sign * drawn
        largest += drawn.abs()
    return total, largest, len(terms)


@given(st.lists(SEEDS, min_size=1, max_size=3), SIGNED, SIGNED, st.sampled_from([torch.float32, torch.float64]))
def test_increments_are_exact_to_their_roundings(
    seeds: list[int], start: float, end: float, dtype: torch.dtype
) -> None:
    path = BrownianPath((len(seeds), 5), seeds, dtype=dtype)
    exact, largest, count = exact_increment(seeds, 5, start, end)
    increment = path.increment(start, end)
    assert increment.dtype == dtype
    unit = 2.0**-24 if dtype == torch.float32 else 2.0**-53
    # A weight, a product and a sum are rounded for each term, and the difference of the two sums once more; a sum is
    # never above that of the magnitudes. In float64 the exact one has roundings of its own.
    bound = (count + 3) * unit * largest * (1 if dtype == torch.float32 else 2)
    assert bool(((increment - exact).abs() <= bound + 1e-40).all())
    length = abs(Time.of(end).value - Time.of(start).value)
    if length > 0:
        noise = path(start, end).double()
        expected = exact / math.sqrt(length)
        # Times 1/√length, rounded, is two roundings more.
        error = (noise - expected).abs()
        assert bool((error <= bound / math.sqrt(length) + 2 * unit * (expected.abs() + bound) + 1e-38).all())


def test_an_increment_is_the_sum_of_its_parts() -> None:
    path = BrownianPath((3, 4, 8, 8), [1, 2, 3])
    levels = [14.6, 9.5, 8.0, 7.999, 3.0, 0.4, 0.029, 1e-7, 0.0]
    parts = [
        path(a, b).double() * math.sqrt(Time.of(a).value - Time.of(b).value) for a, b in itertools.pairwise(levels)
    ]
    whole = path(levels[0], levels[-1]).double() * math.sqrt(Time.of(levels[0]).value)
    # Some 40 terms of sums of magnitude 20 at most, eight parts: 8·40·20·2⁻²⁴ is 4e-4, found 4e-6.
    assert (sum(parts) - whole).abs().max() <= 1e-5


INTERVALS = [(14.6, 9.0), (9.0, 0.3), (0.3, 0.3 * (1 - 2**-10)), (0.3 * (1 - 2**-10), 0.0), (14.6, 0.02)]


def test_a_sample_is_the_same_alone_and_at_any_place() -> None:
    seeds = [7, 2**63 + 1, 7, 0]
    together = BrownianPath((4, 3, 5, 7), seeds)
    for interval in INTERVALS:
        batch = together(*interval)
        assert torch.equal(batch[0], batch[2])
        for b, seed in enumerate(seeds):
            assert torch.equal(batch[b : b + 1], BrownianPath((1, 3, 5, 7), seed)(*interval))


@given(st.lists(st.tuples(SIGNED, SIGNED), max_size=4), st.sampled_from(INTERVALS))
def test_what_was_asked_before_changes_no_bit(before: list[tuple[float, float]], interval: tuple[float, float]) -> None:
    fresh, used = (BrownianPath((2, 37), [5, 6]) for _ in range(2))
    for asked in before:
        used(*asked)
    assert torch.equal(used(*interval), fresh(*interval))


def test_every_backend_gives_the_same_bits() -> None:
    expected = BrownianPath((2, 37), [5, 6])(3.0, 1.1)
    with ops.use_backend("reference"):
        assert torch.equal(BrownianPath((2, 37), [5, 6])(3.0, 1.1), expected)


def test_dtypes_and_seeds() -> None:
    seeds = torch.tensor([5, -1])
    expected = BrownianPath((2, 3, 8), [5, 2**64 - 1])(3.0, 1.1)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        noise = BrownianPath((2, 3, 8), seeds, dtype=dtype)(3.0, 1.1)
        assert noise.dtype == dtype
        assert torch.equal(noise, expected.to(dtype))
    wide = BrownianPath((2, 3, 8), seeds, dtype=torch.float64)(3.0, 1.1)
    assert (wide - expected).abs().max() <= 1e-5
    levels = torch.tensor([3.0, 1.1])
    assert torch.equal(BrownianPath((2, 3, 8), seeds)(levels[0], levels[1]), expected)


def test_the_numbers_stay_what_they_are() -> None:
    noise = BrownianPath((2, 3), [1, 2])(14.6146, 9.5)
    # From the first version: other numbers would be other pictures.
    assert noise.tolist() == [
        [-0.42259126901626587, 0.2942500114440918, 1.8061920404434204],
        [1.5288960933685303, 0.3356011211872101, 0.21132712066173553],
    ]


def test_noise_is_standard_normal_and_independent() -> None:
    size, seeds = 2**15, [1, 2, 2**32 + 1]
    path = BrownianPath((3, size), seeds)
    ulp = next_time(1.1, 1)
    levels = [14.6, 8.0, 7.999, 4.0, 2.5, ulp, 1.1, 1.0999999, 0.3, 0.029, 1e-4, 1e-7, 0.0]
    noise = torch.cat([path(a, b) for a, b in itertools.pairwise(levels)]).double()
    # 36 rows, of each seed and interval; a correlation of independent numbers has a deviation of size**-0.5, the second
    # moment one of (2/size)**0.5, and 5.3 of them are exceeded once in 10⁷ times.
    moments = noise @ noise.T / size
    off = moments - torch.diag(moments.diagonal())
    assert off.abs().max() <= 5.3 * size**-0.5
    assert (moments.diagonal() - 1).abs().max() <= 5.3 * (2 / size) ** 0.5
    assert noise.mean(1).abs().max() <= 5.3 * size**-0.5
    for row in noise[::7]:
        assert stats.kstest(row.numpy(), "norm").pvalue > 1e-7


def test_overlapping_intervals_are_correlated_as_they_overlap() -> None:
    size = 2**16
    path = BrownianPath((1, size), 3)
    for (a, b), (c, d) in (((9.0, 1.0), (9.0, 3.0)), ((9.0, 1.0), (10.0, 5.0)), ((2.1, 1.9), (2.05, 2.0))):
        expected = (min(a, c) - max(b, d)) / math.sqrt((a - b) * (c - d))
        found = float((path(a, b) * path(c, d)).double().mean())
        assert abs(found - expected) <= 5.3 * ((1 + expected**2) / size) ** 0.5


@pytest.mark.parametrize("transform", [None, lambda t: -t.log(), lambda t: t * t], ids=["level", "-log", "square"])
def test_the_sign_is_that_of_diffusers_sampler(transform: Any) -> None:
    more = {} if transform is None else {"transform": transform}
    theirs = BrownianTreeNoiseSampler(torch.zeros(1, 64), 0.1, 9.0, 3, **more)
    ours = BrownianPath((1, 64), 3, **more)
    times = sorted(float(t if transform is None else transform(torch.tensor(t))) for t in (2.0, 4.0))
    root = math.sqrt(times[1] - times[0])
    for levels in ((4.0, 2.0), (2.0, 4.0)):
        # Each by its own path's increment from the earlier to the later time: 1 or -1.
        sign = torch.round(theirs(*levels) * root / theirs.tree.trees[0](*times)).unique()
        assert torch.round(ours(*levels) * root / ours.increment(*times)).unique().equal(sign)


def test_an_empty_interval_has_no_noise() -> None:
    assert torch.equal(BrownianPath((1, 8), 3)(2.0, 2.0), torch.zeros(1, 8))
    assert torch.equal(BrownianPath((1, 8), 3)(0.0, 0.0), torch.zeros(1, 8))
    assert BrownianPath((0, 8), [])(2.0, 1.0).shape == (0, 8)


def test_a_loop_draws_each_time_once(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[int] = []

    def counted(shape: Any, seeds: Any, step: Any = 0, *rest: Any, **more: Any) -> Tensor:
        drawn.append(step)
        return fastdiff.randn(shape, seeds, step, *rest, **more)

    path = BrownianPath((1, 8), 3)
    monkeypatch.setattr(brownian_path, "randn", counted)
    path(7.9, 7.1)
    assert len(drawn) == len(list(Time.of(7.9).since_octave())) + len(list(Time.of(7.1).since_octave()))
    # As DPMSolverSDE asks: to a middle and then from the start again to the end, of which the next one begins.
    for interval, new in (((7.1, 6.3), 6.3), ((7.1, 5.7), 5.7), ((5.7, 5.1), 5.1), ((5.7, 4.3), 4.3)):
        drawn.clear()
        path(*interval)
        assert len(drawn) == len(list(Time.of(new).since_octave())) <= 24
        assert len(path._kept) == 2


def test_threads_share_a_path() -> None:
    path, levels = BrownianPath((1, 4, 16, 16), 7), [14.0 - i * 0.5 for i in range(27)]
    intervals = list(itertools.pairwise(levels))
    expected = [BrownianPath((1, 4, 16, 16), 7)(*interval) for interval in intervals]
    found: list[list[Tensor]] = [[], []]

    def run(place: int) -> None:
        found[place] = [path(*interval) for interval in intervals]

    threads = [threading.Thread(target=run, args=(place,)) for place in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in found:
        assert len(result) == len(expected)
        assert all(map(torch.equal, result, expected))


def test_inference_mode_leaves_nothing_behind() -> None:
    path = BrownianPath((1, 8), 3)
    with torch.inference_mode():
        path(4.0, 3.0)
    x = torch.ones(1, 8, requires_grad=True)
    (x * path(3.0, 2.0)).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, BrownianPath((1, 8), 3)(3.0, 2.0))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: BrownianPath((2, 3), [1]), ValueError, "randn: seeds holds 1, expected one for each of 2 samples"),
        (lambda: BrownianPath((), [1]), ValueError, r"randn: shape is \[\], expected \[B, \.\.\.\]"),
        (lambda: BrownianPath((1, 3), [1.5]), TypeError, "randn: seeds holds a float"),
        (lambda: BrownianPath((1, 3), 1, dtype=torch.int64), TypeError, "randn: dtype is torch.int64"),
        (lambda: BrownianPath((1, 3), 1)(math.nan, 1.0), ValueError, "BrownianPath: time is nan, expected a number"),
        (lambda: BrownianPath((1, 3), 1)(1.0, 2.0**106), ValueError, "of magnitude below 2\\*\\*106; pass finite"),
    ],
)
def test_what_is_refused(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()
