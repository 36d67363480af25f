# SPDX-License-Identifier: MIT
"""Noise as diffusers draws it: one generator for all, one a sample, or torch's own."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastdiff.noise.generators import draw, generator_states

CPU = torch.device("cpu")


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@given(seed=st.integers(0, 2**63 - 1), shape=st.lists(st.integers(0, 5), max_size=4).map(tuple))
def test_one_generator_draws_what_torch_draws_with_it(seed: int, shape: tuple[int, ...]) -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        drawn = draw(shape, seeded(seed), dtype=dtype, device=CPU)
        assert drawn.dtype == dtype
        assert torch.equal(drawn, torch.randn(shape, generator=seeded(seed), dtype=dtype))


def test_no_generator_draws_from_torchs_own() -> None:
    torch.manual_seed(7)
    expected = torch.randn(2, 3)
    torch.manual_seed(7)
    assert torch.equal(draw((2, 3), dtype=torch.float32, device=CPU), expected)


@given(
    seeds=st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=5),
    rest=st.lists(st.integers(1, 5), max_size=3).map(tuple),
    data=st.data(),
)
def test_the_noise_of_a_sample_depends_on_its_own_generator_alone(
    seeds: list[int], rest: tuple[int, ...], data: st.DataObject
) -> None:
    together = draw((len(seeds), *rest), [seeded(s) for s in seeds], dtype=torch.float32, device=CPU)
    assert together.shape == (len(seeds), *rest)
    order = data.draw(st.permutations(range(len(seeds))))
    shuffled = draw(together.shape, [seeded(seeds[i]) for i in order], dtype=torch.float32, device=CPU)
    assert torch.equal(shuffled, together[list(order)])
    for i, seed in enumerate(seeds):
        assert torch.equal(draw((1, *rest), seeded(seed), dtype=torch.float32, device=CPU)[0], together[i])


def test_each_draw_moves_the_generator_on() -> None:
    for generator in (seeded(3), [seeded(3), seeded(4)]):
        first = draw((2, 8), generator, dtype=torch.float32, device=CPU)
        assert not torch.equal(first, draw((2, 8), generator, dtype=torch.float32, device=CPU))


def test_an_empty_batch_takes_an_empty_list() -> None:
    drawn = draw((0, 3), [], dtype=torch.float16, device=CPU)
    assert drawn.shape == (0, 3)
    assert drawn.dtype == torch.float16


@pytest.mark.parametrize(("shape", "count"), [((2, 3), 1), ((2, 3), 3), ((2, 3), 0), ((), 1)])
def test_another_number_of_generators_than_samples_is_refused(shape: tuple[int, ...], count: int) -> None:
    with pytest.raises(ValueError, match=rf"^step: generator is a list of {count}, expected one generator .+; pass "):
        draw(shape, [seeded(i) for i in range(count)], dtype=torch.float32, device=CPU)


def test_states_put_back_draw_the_same_again() -> None:
    assert generator_states(None) == []
    for generator in (seeded(5), [seeded(5), seeded(6)]):
        states = generator_states(generator)
        first = draw((2, 4), generator, dtype=torch.float32, device=CPU)
        for one, state in states:
            one.set_state(state)
        assert torch.equal(draw((2, 4), generator, dtype=torch.float32, device=CPU), first)


@pytest.mark.gpu
def test_a_cpu_generator_gives_the_same_noise_on_a_gpu() -> None:
    for make in (lambda: seeded(9), lambda: [seeded(9), seeded(10)]):
        there = draw((2, 5), make(), dtype=torch.float32, device=torch.device("cuda"))
        assert there.is_cuda
        assert torch.equal(there.cpu(), draw((2, 5), make(), dtype=torch.float32, device=CPU))
