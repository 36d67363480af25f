# SPDX-License-Identifier: MIT
"""Draws of timesteps: their distributions, and that they belong to a sample's seed."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

from fastdiff.noise import sample_seeds
from fastdiff.training import draw_timesteps, shift_times

COUNT = 20_000
#: Kolmogorov-Smirnov distance that a right distribution exceeds once in a million seeds: √(ln(2e6)/2n).
DISTANCE = math.sqrt(math.log(2e6) / (2 * COUNT))


@pytest.mark.parametrize("source", ["seeds", "generator"])
@pytest.mark.parametrize("sampling", ["uniform", "logit_normal"])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_times_have_their_distribution(source: str, sampling: str, shift: float) -> None:
    drawn = draw_timesteps(
        COUNT,
        sampling=sampling,
        logit_mean=-0.5,
        logit_std=1.5,
        shift=shift,
        **{source: sample_seeds(3, torch.arange(COUNT)) if source == "seeds" else torch.Generator().manual_seed(3)},
    )
    assert drawn.dtype == torch.float32
    assert 0 < float(drawn.min()) <= float(drawn.max()) < 1
    times = drawn.double().numpy()
    before = times / (shift - (shift - 1) * times)  # the shift undone
    expected = before if sampling == "uniform" else stats.norm.cdf((np.log(before / (1 - before)) + 0.5) / 1.5)
    assert stats.kstest(expected, "uniform").statistic < DISTANCE


@pytest.mark.parametrize("sampling", ["uniform", "logit_normal"])
def test_timesteps_are_equal_parts_of_the_times(sampling: str) -> None:
    seeds = sample_seeds(0, torch.arange(2000))
    times = draw_timesteps(2000, sampling=sampling, shift=2.0, seeds=seeds)
    t = draw_timesteps(2000, 7, sampling=sampling, shift=2.0, seeds=seeds)
    assert t.dtype == torch.int64
    assert (int(t.min()), int(t.max())) == (0, 6)
    # Within float32's rounding of the times, which may be on the other side of a bound.
    assert bool(((times * 7).floor().long() - t).abs().max() <= 1)
    assert float(((times * 7).floor().long() != t).double().mean()) < 1e-3


def test_timestep_belongs_to_seed_sample_and_epoch() -> None:
    ids = torch.randperm(1000)[:64]
    for sampling in ("uniform", "logit_normal"):

        def drawn(some: torch.Tensor, epoch: int = 0, seed: int = 7, sampling: str = sampling) -> torch.Tensor:
            return draw_timesteps(len(some), 1000, sampling=sampling, seeds=sample_seeds(seed, some, epoch))

        whole = drawn(ids)
        order = torch.randperm(64)
        assert torch.equal(drawn(ids[order]), whole[order])
        assert torch.equal(torch.cat([drawn(ids[:5]), drawn(ids[5:])]), whole)
        assert not torch.equal(drawn(ids, epoch=1), whole)
        assert not torch.equal(drawn(ids, seed=8), whole)


def test_generator_repeats_and_nothing_touches_the_global_one() -> None:
    first, second = (draw_timesteps(8, 100, generator=torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(first, second)
    before = torch.get_rng_state()
    draw_timesteps(8, 100, seeds=range(8))
    draw_timesteps(8, 100, generator=torch.Generator())
    assert torch.equal(torch.get_rng_state(), before)
    draw_timesteps(8, 100)
    assert not torch.equal(torch.get_rng_state(), before)
    assert draw_timesteps(0, 100).shape == (0,)


def test_shift_follows_its_formula() -> None:
    times = torch.tensor([0.0, 0.25, 0.5, 1.0], dtype=torch.float64)
    assert shift_times(times, 3.0).tolist() == pytest.approx([0.0, 0.5, 0.75, 1.0])
    torch.testing.assert_close(shift_times(shift_times(times, 3.0), 1 / 3), times)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sampling": "normal"}, "sampling is 'normal'"),
        ({"shift": 0.0}, "shift is 0.0"),
        ({"logit_std": 0.0}, "logit_std is 0.0"),
        ({"num_train_timesteps": 0}, "num_train_timesteps is 0"),
        ({"seeds": [1, 2, 3]}, r"3"),
        ({"seeds": [1, 2], "generator": torch.Generator()}, "seeds is given beside generator"),
    ],
)
def test_bad_arguments_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        draw_timesteps(2, **options)  # type: ignore[arg-type]
