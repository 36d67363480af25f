# SPDX-License-Identifier: MIT
"""The noise of torchsde's Brownian trees, drawn by one sum: against torchsde, numpy, torch, and exact arithmetic."""

from __future__ import annotations

import copy
import math
import threading
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.schedulers.scheduling_dpmsolver_sde import BrownianTreeNoiseSampler
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fastdiff.diffusers import CLASSES
from fastdiff.noise import brownian_tree as brownian
from fastdiff.noise.brownian_tree import Tree, sampled, way_to
from fastdiff.noise.torch_normals import why_by_torch
from fastdiff.ops.backends import extension
from support.dropin_helpers import quiet

pytestmark = pytest.mark.skipif(bool(why_by_torch()), reason=f"torch draws here: {why_by_torch()}")
E: Any = extension
START, END = 0.029, 14.6
SEEDS = st.integers(0, 2**64 - 1)
WORDS = st.integers(0, 2**32 - 1)
TIMES = st.floats(START, END).map(lambda t: round(t, 6))


def drawn(size: int, seed: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator("cpu").manual_seed(seed), device="cpu")


@given(SEEDS, st.lists(st.tuples(st.integers(0, 2**40), st.integers(0, 60)), max_size=4), st.integers(4, 40))
def test_seeds_are_numpys(entropy: int, keys: list[tuple[int, int]], pool_size: int) -> None:
    expected = [
        int(np.random.SeedSequence(entropy, spawn_key=key, pool_size=pool_size).generate_state(4)[0]) for key in keys
    ]
    assert E.spawned_seeds(entropy, keys, pool_size) == expected


#: Around whole groups of 16, whole states of 624 words, and the tiles of 2496 numbers with what is left at the end.
SIZES = st.integers(16, 100) | st.integers(600, 660) | st.integers(2480, 2540) | st.integers(4980, 5060)


@given(SIZES, st.lists(WORDS, min_size=1, max_size=11), st.data())
def test_one_draw_of_many_is_torchs(size: int, seeds: list[int], data: st.DataObject) -> None:
    which = data.draw(st.integers(0, len(seeds) - 1))
    out = torch.full((size,), math.nan)
    assert E.seeded_sum(out, [], [], seeds, [float(k == which) for k in range(len(seeds))])
    assert torch.equal(out, drawn(size, seeds[which]))  # times 1, plus zeros: the very numbers


@given(SIZES, st.lists(st.tuples(WORDS, st.floats(-9, 9)), max_size=9), st.lists(st.floats(-9, 9), max_size=3))
def test_a_sum_is_exact_to_its_roundings(size: int, terms: list[tuple[int, float]], bases: list[float]) -> None:
    tensors = [torch.randn(size) for _ in bases]
    out = torch.full((size,), math.nan)
    assert E.seeded_sum(out, tensors, bases, [seed for seed, _ in terms], [weight for _, weight in terms])
    parts = [t.double() * w for t, w in zip(tensors, bases, strict=True)]
    parts += [drawn(size, seed).double() * weight for seed, weight in terms]
    exact = sum(parts, torch.zeros(size, dtype=torch.float64))
    largest = sum((part.abs() for part in parts), torch.zeros(size, dtype=torch.float64))
    # Each weight is rounded to float32, and each of so many sums, which are below the sum of all sizes.
    assert bool(((out - exact).abs() <= (len(parts) + 1) * 2.0**-24 * largest + 1e-40).all())


def test_what_is_not_plain_is_declined_and_left_alone() -> None:
    plain = torch.full((32,), 7.0)
    for out in (torch.full((32,), 7.0).double(), torch.full((15,), 7.0), torch.full((64,), 7.0)[::2]):
        assert not E.seeded_sum(out, [], [], [1], [1.0])
        assert bool((out == 7.0).all())
    for base in (plain, plain.double(), torch.zeros(31), torch.zeros(64)[::2], torch.zeros(32, requires_grad=True)):
        assert not E.seeded_sum(plain, [base], [1.0], [1], [1.0])
        assert bool((plain == 7.0).all())
    with torch.utils._python_dispatch.TorchDispatchMode():
        assert not E.seeded_sum(plain, [], [], [1], [1.0])
    with pytest.raises(ValueError, match="seeded_sum: got 1 and 0 weights, expected 0 and 1"):
        E.seeded_sum(plain, [], [1.0], [1], [])
    with pytest.raises(ValueError, match="spawned_seeds: pool_size is 3, expected 4 or more"):
        E.spawned_seeds(1, [(0, 0)], 3)
    before = plain._version
    assert E.seeded_sum(plain, [], [], [1], [1.0])
    assert plain._version == before + 1


@given(TIMES, TIMES)
def test_a_way_has_the_variance_of_a_brownian_motion(t: float, s: float) -> None:
    a, b = (way_to(time, START, END, 6) for time in (t, s))
    length = END - START
    assert a.fraction**2 * length + sum(w * w for w in a.weights) == pytest.approx(t - START, abs=1e-11)
    of_b = dict(zip(b.nodes, b.weights, strict=True))
    common = sum(w * of_b.get(node, 0.0) for node, w in zip(a.nodes, a.weights, strict=True))
    assert a.fraction * b.fraction * length + common == pytest.approx(min(t, s) - START, abs=1e-11)


def test_the_ends_of_a_way() -> None:
    assert way_to(START, START, END, 6) == brownian.Way(0.0, (), ())
    assert way_to(END, START, END, 6) == brownian.Way(1.0, (), ())
    middle = round(0.5 * (START + END), 6)
    assert way_to(middle, START, END, 6).nodes == ((0, 0),)


def sampler_for(shape: tuple[int, ...], seed: Any, dtype: torch.dtype = torch.float32) -> Any:
    return BrownianTreeNoiseSampler(torch.zeros(shape, dtype=dtype), START, END, seed)


def exact_noise(interval: Any, before: float, after: float) -> Tensor:
    """(W(after) − W(before)) / √(after − before) from the tree's own numbers, added up in float64."""
    total = interval._w_h[0].double()
    result = torch.zeros_like(total)
    for time, sign in ((before, -1.0), (after, 1.0)):
        way = way_to(round(time, 6), interval._start, interval._end, 6)
        result += sign * way.fraction * total
        for seed, weight in zip(E.spawned_seeds(interval._entropy, list(way.nodes), 24), way.weights, strict=True):
            result += sign * weight * drawn(total.numel(), seed).reshape(total.shape).double()
    return result / math.sqrt(after - before)


@given(st.integers(0, 2**63 - 1), st.lists(st.tuples(TIMES, TIMES), min_size=1, max_size=5))
def test_increments_are_as_near_to_exact_as_torchsdes(seed: int, spans: list[tuple[float, float]]) -> None:
    ours, theirs = sampler_for((4, 8), seed), sampler_for((4, 8), seed)
    for span in spans:
        if abs(span[0] - span[1]) < 1e-5:
            continue  # a few of the tree's own units: its rounded times are no longer those that are asked for
        with quiet():
            mine, other = sampled(ours, *span), theirs(*span)
        exact = exact_noise(theirs.tree.trees[0], *sorted(span)) * (-1.0 if span[0] > span[1] else 1.0)
        wrong, their_wrong = (float((x.double() - exact).abs().max()) for x in (mine, other))
        # The quotient's root is rounded to float32 in both; the sums, of up to fifty terms, differ in order.
        assert wrong <= 2 * their_wrong + 16 * 2.0**-24 * float(exact.abs().max())


def test_torchsde_itself_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    sampler, twin = sampler_for((2, 3, 8, 8), 5), sampler_for((2, 3, 8, 8), 5)
    expected = [twin(a, b) for a, b in ((14.0, 9.0), (9.0, 4.0), (4.0, 0.1))]
    assert not brownian.why_by_torchsde()
    monkeypatch.setattr(type(sampler.tree.trees[0]), "__call__", lambda *_: pytest.fail("asked"))
    for noise, span in zip(expected, ((14.0, 9.0), (9.0, 4.0), (4.0, 0.1)), strict=True):
        assert (sampled(sampler, *span) - noise).abs().max() <= 1e-5


def test_what_was_asked_before_changes_nothing_but_roundings() -> None:
    fresh = sampled(sampler_for((64,), 9), 4.0, 2.0)
    used = sampler_for((64,), 9)
    for span in ((14.0, 13.9), (0.03, 14.0), (4.0, 3.9999), (4.0, 14.0), (2.0, 1.0), (3.0, 3.1)):
        sampled(used, *span)
    assert (sampled(used, 4.0, 2.0) - fresh).abs().max() <= 1e-5
    tree = brownian._TREES[used.tree][0]
    assert 0 < len(tree._rests) <= 3


def test_a_seed_a_sample() -> None:
    batched = sampled(sampler_for((3, 4, 4), [1, 2, 3]), 4.0, 2.0)
    for sample, seed in zip(batched, (1, 2, 3), strict=True):
        assert torch.equal(sample, sampled(sampler_for((4, 4), seed), 4.0, 2.0))


def test_back_and_forth() -> None:
    sampler = sampler_for((32,), 1)
    assert torch.equal(sampled(sampler, 4.0, 2.0), -sampled(sampler, 2.0, 4.0))


@pytest.mark.filterwarnings("ignore:Should have t")
def test_at_and_outside_the_ends() -> None:
    sampler, twin = sampler_for((32,), 1), sampler_for((32,), 1)
    for span in ((END * (1 + 2.0**-22), 3.0), (3.0, START * (1 - 2.0**-22)), (20.0, 3.0), (3.0, 0.0), (5.0, 5.0)):
        assert torch.allclose(sampled(sampler, *span), twin(*span), rtol=0, atol=1e-5, equal_nan=True)


def test_other_samplers_are_called() -> None:
    assert sampled(lambda a, b: (a, b), 2.0, 1.0) == (2.0, 1.0)

    class Mine(BrownianTreeNoiseSampler):
        def __call__(self, *times: float) -> Any:
            return "mine"

    assert sampled(Mine(torch.zeros(32), START, END, 3), 2.0, 1.0) == "mine"
    for sampler in (sampler_for((8,), 3), sampler_for((32,), 3, torch.float16), sampler_for((32,), 3, torch.float64)):
        twin = copy.deepcopy(sampler)
        assert torch.equal(sampled(sampler, 4.0, 2.0), twin(4.0, 2.0))


def test_a_transform_of_the_times() -> None:
    made = [BrownianTreeNoiseSampler(torch.zeros(32), 0.1, 9.0, 3, transform=lambda t: -t.log()) for _ in range(2)]
    assert (sampled(made[0], 4.0, 2.0) - made[1](4.0, 2.0)).abs().max() <= 1e-5


def test_where_torchsde_differs_it_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(brownian, "_difference", lambda: "another tree")
    sampler = sampler_for((32,), 3)
    monkeypatch.setattr(Tree, "increment", lambda *_: pytest.fail("drawn here"))
    sampled(sampler, 4.0, 2.0)
    assert brownian.why_by_torchsde() == "another tree"


def test_a_tree_that_is_not_torchsdes_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    brownian._difference.cache_clear()
    monkeypatch.setattr(brownian, "way_to", lambda time, *rest: way_to(time - 1e-3, *rest))
    assert "builds its tree otherwise" in brownian._difference()
    brownian._difference.cache_clear()


def test_threads_share_a_tree() -> None:
    sampler = sampler_for((1, 4, 16, 16), 7)
    spans = [(14.0 - i * 0.5, 13.5 - i * 0.5) for i in range(26)]
    expected = [sampled(sampler_for((1, 4, 16, 16), 7), *span) for span in spans]
    found: list[list[Tensor]] = [[], []]

    def run(place: int) -> None:
        found[place] = [sampled(sampler, *span) for span in spans]

    threads = [threading.Thread(target=run, args=(place,)) for place in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in found:
        assert len(result) == len(expected)
        for mine, alone in zip(result, expected, strict=True):
            assert (mine - alone).abs().max() <= 1e-5


@pytest.mark.filterwarnings("ignore:Should have t")
@pytest.mark.parametrize("name", ["DPMSolverSDEScheduler", "CosineDPMSolverMultistepScheduler"])
@pytest.mark.parametrize("seeds", ["default", "one", "a list"])
def test_the_first_step_makes_the_sampler_as_diffusers_does(name: str, seeds: str) -> None:
    results, states, samplers = [], [], []
    for cls in (CLASSES[name].original, CLASSES[name]):
        torch.manual_seed(11)
        cosine = name.startswith("Cosine")
        made = [torch.Generator().manual_seed(k) for k in (5, 6)]
        config = {} if cosine or seeds == "default" else {"noise_sampler_seed": 3 if seeds == "one" else [3, 4]}
        more = {"generator": made[0] if seeds == "one" else made} if cosine and seeds != "default" else {}
        scheduler = cls(**config)
        scheduler.set_timesteps(2)
        sample = torch.randn(2, 4, 8, 8)
        results.append(scheduler.step(sample * 0.1, scheduler.timesteps[0], sample, **more)[0])
        states.append(torch.get_rng_state())
        samplers.append(scheduler.noise_sampler)
    assert (results[0] - results[1]).abs().max() <= 3e-4 * results[0].abs().max().clamp(min=1)
    assert torch.equal(*states)
    mine, theirs = ([(i._start, i._end, i._entropy, i._size) for i in s.tree.trees] for s in samplers)
    assert mine == theirs
    assert type(samplers[0]) is type(samplers[1])


@pytest.mark.filterwarnings("ignore:Should have t")
@pytest.mark.parametrize("name", ["DPMSolverSDEScheduler", "CosineDPMSolverMultistepScheduler"])
def test_a_deep_copy_goes_on_along_the_same_path(name: str) -> None:
    scheduler = CLASSES[name]()
    scheduler.set_timesteps(6)
    x = torch.randn(1, 4, 8, 8)
    timesteps = list(scheduler.timesteps)
    for timestep in timesteps[:3]:
        x = scheduler.step(x * 0.1, timestep, x)[0]
    ends = []
    for each in (scheduler, copy.deepcopy(scheduler)):
        y = x
        for timestep in timesteps[3:]:
            y = each.step(y * 0.1, timestep, y)[0]
        ends.append(y)
    assert (ends[0] - ends[1]).abs().max() <= 1e-5 * ends[0].abs().max().clamp(min=1)


def test_a_step_that_fails_makes_no_sampler() -> None:
    scheduler = CLASSES["CosineDPMSolverMultistepScheduler"]()
    scheduler.set_timesteps(3)
    sample = torch.randn(1, 4, 8, 8)
    before = torch.get_rng_state()
    with pytest.raises(RuntimeError):
        scheduler.step(sample[..., :3], scheduler.timesteps[0], sample)
    assert scheduler.noise_sampler is None
    assert torch.equal(torch.get_rng_state(), before)
