# SPDX-License-Identifier: MIT
"""Seeded noise for code that draws from torch's generators: its numbers, its refusals, and diffusers' own steps."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor
from torch.nn import functional

import fastdiff
from fastdiff import Purpose
from fastdiff.diffusers import CLASSES
from fastdiff.noise.brownian_path import BrownianPath
from fastdiff.noise.seeded_draws import SeededDraws
from fastdiff.philox import purpose_of_draw
from support.dropin_helpers import Loop, classes, made, quiet
from support.noise_cases import NOISE_CASES, NoiseCase

SHAPE = (2, 3, 4, 5)
SEEDS = [7, 2**63 + 1]


def expected(draw: int = 0, step: int = 3, dtype: torch.dtype = torch.float32) -> Tensor:
    return fastdiff.randn(SHAPE, SEEDS, step, purpose_of_draw(draw), dtype=dtype)


def test_draws_are_those_of_the_seeds_one_after_another() -> None:
    before = torch.get_rng_state()
    with SeededDraws(SEEDS, 3) as draws:
        found = [torch.randn(SHAPE), torch.randn(*SHAPE), torch.randn_like(torch.empty(SHAPE)), randn_tensor(SHAPE)]
    assert draws.draws == 4
    for draw, noise in enumerate(found):
        assert torch.equal(noise, expected(draw))
    assert torch.equal(found[0], fastdiff.randn(SHAPE, SEEDS, 3, Purpose.STEP))
    assert torch.equal(torch.get_rng_state(), before)


def test_dtypes_layouts_and_seeds() -> None:
    channels_last = torch.empty(SHAPE, dtype=torch.float16).to(memory_format=torch.channels_last)
    with SeededDraws(torch.tensor([7, 2**63 + 1 - 2**64]), 3):
        half = torch.randn(SHAPE, dtype=torch.float16)
        like = torch.randn_like(channels_last)
        other = torch.randn_like(channels_last, dtype=torch.float64, memory_format=torch.contiguous_format)
        wanted = torch.randn(SHAPE, requires_grad=True)
    assert torch.equal(half, expected(0, dtype=torch.float16))
    assert torch.equal(like, expected(1, dtype=torch.float16))
    assert like.stride() == channels_last.stride()
    assert torch.equal(other, expected(2, dtype=torch.float64))
    assert other.is_contiguous()
    assert wanted.requires_grad
    assert torch.equal(wanted, expected(3))


def test_the_default_dtype_counts() -> None:
    torch.set_default_dtype(torch.float64)
    try:
        with SeededDraws(SEEDS, 3):
            assert torch.randn(SHAPE).dtype == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("listed", [False, True], ids=["one", "a list"])
def test_generators_are_not_asked(listed: bool) -> None:
    generators = [torch.Generator().manual_seed(k) for k in (1, 2)]
    states = [g.get_state() for g in generators]
    with SeededDraws(SEEDS, 3):
        for draw in range(2):
            noise = randn_tensor(SHAPE, generator=generators if listed else generators[0])
            assert torch.equal(noise, expected(draw))
    assert all(torch.equal(g.get_state(), state) for g, state in zip(generators, states, strict=True))


RANDOM: dict[str, Callable[[], Any]] = {
    "rand": lambda: torch.rand(SHAPE),
    "rand_like": lambda: torch.rand_like(torch.empty(SHAPE)),
    "randint": lambda: torch.randint(5, SHAPE),
    "randint_like": lambda: torch.randint_like(torch.empty(SHAPE), 5),
    "randperm": lambda: torch.randperm(2),
    "normal": lambda: torch.normal(0.0, 1.0, SHAPE),
    "normal of tensors": lambda: torch.normal(torch.zeros(SHAPE), torch.ones(SHAPE)),
    "normal_": lambda: torch.empty(SHAPE).normal_(),
    "uniform_": lambda: torch.empty(SHAPE).uniform_(),
    "exponential_": lambda: torch.empty(SHAPE).exponential_(),
    "bernoulli": lambda: torch.bernoulli(torch.full(SHAPE, 0.5)),
    "multinomial": lambda: torch.multinomial(torch.ones(2, 3), 1),
    "poisson": lambda: torch.poisson(torch.ones(SHAPE)),
    "dropout": lambda: functional.dropout(torch.ones(SHAPE)),
    "gumbel_softmax": lambda: functional.gumbel_softmax(torch.ones(SHAPE)),
    "distribution": lambda: torch.distributions.Normal(0.0, 1.0).sample((2,)),
    "init": lambda: torch.nn.init.trunc_normal_(torch.empty(SHAPE)),
    "randn out": lambda: torch.randn(SHAPE, out=torch.empty(SHAPE)),
    "a generator's": lambda: torch.rand(SHAPE, generator=torch.Generator()),
}


@pytest.mark.parametrize("name", RANDOM)
def test_other_random_operations_are_refused(name: str) -> None:
    before = torch.get_rng_state()
    message = r"use_philox: the step draws by aten\.\w+.*; call use_philox\(None\)"
    with SeededDraws(SEEDS, 3), pytest.raises(RuntimeError, match=message):
        RANDOM[name]()
    assert torch.equal(torch.get_rng_state(), before)
    # The block is over, and the generators draw again.
    RANDOM[name]()


@pytest.mark.parametrize("shape", [(), (3,), (1, 3, 4, 5), (3, 2, 4, 5), (4, 3, 4, 5)])
def test_shapes_without_a_place_for_each_sample_are_refused(shape: tuple[int, ...]) -> None:
    before = torch.get_rng_state()
    with SeededDraws(SEEDS, 3) as draws:
        with pytest.raises(RuntimeError, match=r"draws noise of shape \[.*\], expected \[2, \.\.\.\], for 2 samples"):
            torch.randn(shape)
        assert draws.draws == 0
    assert torch.equal(torch.get_rng_state(), before)


def test_one_draw_for_all_samples_is_refused() -> None:
    generator = torch.Generator()

    def draw(shape: tuple[int, ...], error: type[Exception] | None = None) -> None:
        with SeededDraws(SEEDS, 3):
            torch.randn((1, *SHAPE[1:]), generator=generator)
            torch.randn(shape, generator=generator)
            if error is not None:
                raise error
            torch.randn((1, *SHAPE[1:]), generator=generator)

    with pytest.raises(RuntimeError, match=r"draws noise of shape \[1\], expected \[2"):
        draw((1, *SHAPE[1:]))
    with pytest.raises(RuntimeError, match=r"draws noise of shape \[2, 3, 4, 5\], expected \[2"):
        draw(SHAPE)
    with pytest.raises(KeyError):
        draw((1, *SHAPE[1:]), KeyError)


def test_the_block_ends_with_an_exception() -> None:
    def fail() -> None:
        with SeededDraws(SEEDS, 3):
            raise KeyError

    before = torch.get_rng_state()
    with pytest.raises(KeyError):
        fail()
    torch.randn(SHAPE)
    assert not torch.equal(torch.get_rng_state(), before)


def test_other_threads_draw_as_ever() -> None:
    torch.manual_seed(5)
    alone = torch.randn(SHAPE)
    torch.manual_seed(5)
    found: list[Tensor] = []
    with SeededDraws(SEEDS, 3):
        thread = threading.Thread(target=lambda: found.append(torch.randn(SHAPE)))
        thread.start()
        thread.join()
    assert torch.equal(found[0], alone)


def test_fastdiffs_own_noise_is_drawn_within() -> None:
    outside = BrownianPath(SHAPE, SEEDS)(3.0, 1.0)
    with SeededDraws(SEEDS, 3) as draws:
        assert torch.equal(BrownianPath(SHAPE, SEEDS)(3.0, 1.0), outside)
        assert draws.draws == 0


class Seeded(Loop):
    """A loop of diffusers' own class whose noise belongs to the seeds 100, 101, …; it notes the draws of each call."""

    def begin(self) -> Seeded:
        self.counts = ""
        batch = self.case.shape[0]
        if hasattr(self.scheduler, "noise_sampler"):
            self.scheduler.noise_sampler = BrownianPath(self.case.shape, range(100, 100 + batch))
        return self

    def seeded(self, call: Callable[[], Any]) -> tuple[Any, int]:
        with SeededDraws(range(100, 100 + self.case.shape[0]), len(self.counts)) as draws:
            return call(), draws.draws

    def step(self, *args: Any, **kwargs: Any) -> Any:
        result, count = self.seeded(lambda: self.scheduler.step(*args, **kwargs))
        self.counts += str(count)
        return result

    def undo(self, t: Any) -> bool:
        undone, count = self.seeded(lambda: super(Seeded, self).undo(t))
        if undone:
            assert count == 250
            self.counts += "u"
        return undone  # type: ignore[no-any-return]


@pytest.mark.parametrize("noise", ["none", "generators"])
@pytest.mark.parametrize("each", NOISE_CASES, ids=str)
def test_diffusers_own_steps(each: NoiseCase, noise: str) -> None:
    case = each.case(noise=noise)
    loop = Seeded(case, made(case, classes(each.name)[0]).scheduler).begin()
    states: list[list[Tensor]] = []
    loop.run(watch=lambda loop: states.append(loop.random_states()), step=loop.step)
    assert loop.error is None, loop.error
    wanted = each.draws.replace("1", "0") if each.interval else each.draws  # the sampler's noise is no draw
    assert loop.counts == wanted
    torch.manual_seed(case.seed)
    fresh = Loop(case, loop.scheduler)
    with quiet():
        fresh.start()
    for state in states:
        assert all(map(torch.equal, state, fresh.random_states()))


def test_every_class_has_a_case() -> None:
    assert {f"{each.name}Scheduler" for each in NOISE_CASES} == set(CLASSES)
