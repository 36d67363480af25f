# SPDX-License-Identifier: MIT
"""Seeds of training samples: one a (seed, id, epoch), in any batch, without collisions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastdiff
from fastdiff.noise import sample_seeds

WORDS = st.integers(0, 2**64 - 1)


def splitmix(state: int) -> int:
    """The output of SplitMix64 for a state, from its paper, in Python's integers."""
    z = state & (2**64 - 1)
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & (2**64 - 1)
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & (2**64 - 1)
    return z ^ (z >> 31)


@settings(max_examples=30)
@given(seed=WORDS, epoch=WORDS, ids=st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=5))
def test_seeds_are_splitmix_of_seed_epoch_and_id(seed: int, epoch: int, ids: list[int]) -> None:
    golden = 0x9E3779B97F4A7C15
    start = splitmix(splitmix(seed + golden) + epoch * golden + 1)
    found = sample_seeds(seed, ids, epoch)
    assert found.dtype == torch.int64
    assert [value % 2**64 for value in found.tolist()] == [splitmix(start + i) for i in ids]


def test_known_output_of_splitmix() -> None:
    # The first output for seed 0, of the reference implementation.
    assert splitmix(0x9E3779B97F4A7C15) == 0xE220A8397B1DCDAF


@settings(max_examples=10)
@given(seed=WORDS, split=st.integers(0, 20))
def test_a_sample_has_its_seed_in_every_batch(seed: int, split: int) -> None:
    ids = torch.randperm(20, generator=torch.Generator().manual_seed(split))
    whole = sample_seeds(seed, torch.arange(20), 3)
    assert torch.equal(whole[ids], sample_seeds(seed, ids, 3))
    assert torch.equal(whole, torch.cat([sample_seeds(seed, range(split), 3), sample_seeds(seed, range(split, 20), 3)]))


def test_a_million_ids_and_two_epochs_have_no_seed_in_common() -> None:
    ids = torch.arange(10**6)
    seeds = torch.cat([sample_seeds(1, ids, 0), sample_seeds(1, ids, 1), sample_seeds(2, ids[:1000], 0)])
    assert seeds.unique().numel() == seeds.numel()


def test_noise_of_two_epochs_is_independent() -> None:
    ids = torch.arange(64)
    a, b = (fastdiff.randn((64, 1000), sample_seeds(0, ids, epoch)).double() for epoch in (0, 1))
    # Means of 64 000 products of independent normal numbers have a deviation of 1/253: 5.5 of them.
    for x, y in ((a, b), (a[1:], a[:-1]), (a[1:], b[:-1]), (a[:-1], b[1:])):
        assert abs(float((x * y).mean())) < 5.5 / 250


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((-1, [0]), ValueError, "seed is -1"),
        ((0, [0], 2**64), ValueError, "epoch is"),
        ((0.5, [0]), TypeError, "seed has type float"),
        ((0, torch.ones(2)), TypeError, "sample_ids has dtype torch.float32"),
        ((0, torch.ones(2, 2).long()), ValueError, r"sample_ids has shape \[2, 2\]"),
        ((0, 3), TypeError, "sample_ids is a int"),
        ((0, "ab"), TypeError, "sample_ids holds a str"),
        ((0, [True]), TypeError, "sample_ids holds a bool"),
        ((0, [2**64]), ValueError, "sample_ids holds 18446744073709551616"),
    ],
)
def test_invalid_arguments_are_refused_with_one_sentence(
    arguments: tuple[object, ...], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        sample_seeds(*arguments)  # type: ignore[arg-type]


def test_integers_of_any_kind_have_the_same_seeds() -> None:
    ids = [2**64 - 1, 2**63, 5]
    expected = sample_seeds(3, torch.tensor([-1, -(2**63), 5]), 2)
    assert torch.equal(sample_seeds(3, ids, 2), expected)
    assert torch.equal(sample_seeds(torch.tensor(3), torch.tensor(ids, dtype=torch.uint64), torch.tensor(2)), expected)


def test_no_ids_have_no_seeds() -> None:
    assert sample_seeds(0, []).shape == (0,)
