# SPDX-License-Identifier: MIT
"""`use_philox` over every class and every option of noise: whose numbers they are, and how large."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import fastdiff
from fastdiff.philox import purpose_of_draw
from support.dropin_cases import Case
from support.dropin_helpers import Loop, classes, made, quiet, set_timesteps, values_of
from support.noise_cases import NOISE_CASES, NoiseCase

SEEDS = [11, 2**63 + 5, 2**32 + 11]
NOISY = [each for each in NOISE_CASES if each.kind != "none"]
INTERVALS = [each for each in NOISE_CASES if each.interval]
#: One case of each kind, and one that diffusers' own code takes for want of a plan.
KINDS = [
    next(each for each in NOISE_CASES if each.kind == kind and each.finite) for kind in ("once", "twice", "interval")
] + [next(each for each in NOISE_CASES if each.config.get("corrector_order") == 4)]  # fmt: skip


class SampleLoop(Loop):
    """A loop of some of a batch's samples: each sample's start and its model's outputs are the same in every batch."""

    def __init__(self, each: NoiseCase, which: Sequence[int], scheduler: Any = None, noise: str = "none") -> None:
        whole = each.case(noise="none")
        self.whole, self.which = whole, list(which)
        self.seeds: list[int] | None = [SEEDS[b] for b in which]
        case = whole.of(shape=(len(self.which), *whole.shape[1:]), noise=noise)
        super().__init__(case, made(case, classes(each.name)[1]).scheduler if scheduler is None else scheduler)

    def start(self) -> None:
        if self.seeds is not None:
            self.scheduler.use_philox(self.seeds)
        super().start()
        random = torch.Generator().manual_seed(self.case.seed)
        scale = float(getattr(self.scheduler, "init_noise_sigma", 1.0))
        self.sample = (torch.randn(self.whole.shape, generator=random) * scale)[self.which]
        self.fixed = {
            "original_image": torch.randn(self.whole.shape, generator=random)[self.which],
            "mask": (torch.randn(self.whole.shape, generator=random) > 0).float()[self.which],
        }

        def model(sample: Tensor) -> Tensor:
            shape = (self.whole.shape[0], self.whole.shape[1] * (1 + self.case.doubled), *self.whole.shape[2:])
            return torch.randn(shape, generator=random).abs()[self.which] * 0.5

        self.model: Any = model
        self.states = self.random_states()

    def run(self, *args: Any, **kwargs: Any) -> SampleLoop:
        super().run(*args, **kwargs)
        if self.error is not None:
            raise self.error
        assert len(self.outputs) > 0
        return self

    def tensors(self) -> Iterator[Tensor]:
        """The samples and predictions of all steps."""
        for output in self.outputs:
            yield from (value for value in values_of(output) if isinstance(value, Tensor))


def assert_same(loop: SampleLoop, other: SampleLoop, places: Sequence[int]) -> None:
    """All results of `loop` are those of `other` at these places of the batch, bit by bit."""
    found, expected = list(loop.tensors()), list(other.tensors())
    assert len(found) == len(expected) > 0
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs[list(places)], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("noise", ["none", "generators"])
@pytest.mark.parametrize("each", NOISE_CASES, ids=str)
def test_generators_are_not_asked(each: NoiseCase, noise: str) -> None:
    loop = SampleLoop(each, [0, 1, 2], noise=noise).run()
    assert len(loop.states) == {"none": 1, "generators": 4}[noise]
    assert all(map(torch.equal, loop.random_states(), loop.states))


@pytest.mark.parametrize("each", NOISE_CASES, ids=str)
def test_a_sample_is_the_same_alone_and_at_any_place(each: NoiseCase) -> None:
    together = SampleLoop(each, [0, 1, 2]).run()
    for which in ([0], [1], [2], [2, 0], [1, 1, 2]):
        assert_same(SampleLoop(each, which).run(), together, which)


@pytest.mark.parametrize("each", NOISE_CASES, ids=str)
def test_a_second_loop_is_the_first(each: NoiseCase) -> None:
    first = SampleLoop(each, [0, 1, 2]).run()
    set_timesteps(first.case, first.scheduler)
    second = SampleLoop(each, [0, 1, 2], first.scheduler)
    second.seeds = None  # they were given
    assert_same(second.run(), first, [0, 1, 2])


@pytest.mark.parametrize("each", NOISY, ids=str)
def test_other_seeds_are_other_noise(each: NoiseCase) -> None:
    loop, other = SampleLoop(each, [0, 1]), SampleLoop(each, [0, 1])
    other.seeds = [SEEDS[0], SEEDS[2]]
    loop.run()
    other.run()
    same = [mine.isnan().all() or torch.equal(mine[0], theirs[0])
            for mine, theirs in zip(loop.tensors(), other.tensors(), strict=True)]  # fmt: skip
    assert all(same)
    if each.finite:
        ends = [values_of(run.outputs[-1])[0][1] for run in (loop, other)]
        assert not torch.equal(*ends)


class NoiseLoop(Loop):
    """A loop in which samples and model outputs are zero at each step, so that a step returns its noise alone.

    Attributes:
        made: the noise of each step.
    """

    def __init__(self, each: NoiseCase, cls: type, shape: tuple[int, ...], seeds: Sequence[int] | None) -> None:
        case = each.case(shape=shape, noise="generator")
        super().__init__(case, made(case, cls).scheduler)
        self.made: list[Tensor] = []
        if seeds is not None:
            self.scheduler.use_philox(seeds)

    def start(self) -> None:
        super().start()
        self.zero()
        self.fixed = {name: torch.zeros_like(value) for name, value in self.fixed.items()}

        def model(sample: Tensor) -> Tensor:
            return torch.zeros(sample.shape[0], sample.shape[1] * (1 + self.case.doubled), *sample.shape[2:])

        self.model: Any = model

    def zero(self) -> None:
        self.sample = torch.zeros(self.case.shape)

    def take(self, result: Any) -> None:
        super().take(result)
        self.made.append(self.sample)
        self.zero()

    def undo(self, t: Any) -> bool:
        undone = super().undo(t)
        if undone:
            self.made.append(self.sample)
            self.zero()
        return undone

    def run(self, *args: Any, **kwargs: Any) -> NoiseLoop:
        super().run(*args, **kwargs)
        if self.error is not None:
            raise self.error
        return self


def statistics_shape(each: NoiseCase) -> tuple[int, ...]:
    return (2, 64, 48) if each.per_token else (2, 3, 32, 32)


@pytest.mark.parametrize("each", NOISY, ids=str)
def test_noise_is_as_large_as_diffusers(each: NoiseCase) -> None:
    shape = statistics_shape(each)
    theirs, ours = (
        NoiseLoop(each, cls, shape, seeds).run()
        for cls, seeds in zip(classes(each.name), (None, SEEDS[:2]), strict=True)
    )
    assert len(ours.made) == len(theirs.made) == len(each.draws)
    noisy = 0
    for mine, other in zip(ours.made, theirs.made, strict=True):
        if not bool(torch.isfinite(other).all()):
            assert torch.equal(torch.isfinite(mine), torch.isfinite(other))
            continue
        deviations = mine.double().std(), other.double().std()
        # The deviation of n numbers has one of (2·n)**-0.5, so has the other; 5.3 is exceeded once in 10⁷ times. What
        # is not noise but rounding, below 1e-6, may be rounded otherwise.
        assert abs(deviations[0] - deviations[1]) <= 5.3 * mine.numel() ** -0.5 * deviations[1] + 1e-6
        assert (
            abs(mine.double().mean() - other.double().mean()) <= 5.3 * (2 / mine.numel()) ** 0.5 * deviations[1] + 1e-6
        )
        noisy += bool(deviations[1] > 1e-3)
    assert noisy > 0 or not each.finite or "learned" in str(each)


@pytest.mark.parametrize("each", [each for each in NOISY if not each.interval and "u" not in each.draws], ids=str)
def test_noise_is_that_of_randn(each: NoiseCase) -> None:
    shape = statistics_shape(each)
    loop = NoiseLoop(each, classes(each.name)[1], shape, SEEDS[:2]).run()
    rows = math.prod(shape[:2]) if each.per_token else 1  # each token has a scale of its own
    drawn: list[Tensor] = []
    for step, (noise, draws) in enumerate(zip(loop.made, each.draws, strict=True)):
        if draws != "0":
            # The last draw of a step is what it adds.
            numbers = fastdiff.randn(shape, SEEDS[:2], step, purpose_of_draw(int(draws) - 1), dtype=torch.float64)
            drawn.append(numbers.reshape(rows, -1))
        if not drawn or not bool(torch.isfinite(noise).all()) or float(noise.std()) < 1e-3:
            continue
        # Solvers that keep the last sample add up the noise of several steps.
        basis, wanted = torch.stack(drawn, -1), noise.double().reshape(rows, -1, 1)
        left = wanted - basis @ torch.linalg.lstsq(basis, wanted).solution
        assert left.abs().max() <= 1e-5 * noise.abs().max()


@pytest.mark.parametrize("each", INTERVALS, ids=str)
def test_noise_of_intervals_starts_at_a_large_sample(each: NoiseCase) -> None:
    shape = (1, 3, 32, 32)
    results = []
    for cls in classes(each.name):
        scheduler = made(each.case(shape=shape), cls).scheduler
        if cls is classes(each.name)[1]:
            scheduler.use_philox([1])
        x, t = torch.full(shape, 1000.0), scheduler.timesteps[0]
        with quiet():
            y = scheduler.step(0.1 * scheduler.scale_model_input(x, t), t, x, return_dict=False)[0]
        results.append((float(y.double().mean()), float(y.double().std())))
    (theirs, deviation), (ours, other) = results
    # 3072 numbers: see above.
    assert abs(theirs - ours) <= 5.3 * (2 / 3072) ** 0.5 * deviation
    assert abs(deviation - other) <= 5.3 * 3072**-0.5 * deviation


def cosine_noise(steps: int) -> tuple[list[float], list[Tensor]]:
    """Of CosineDPMSolverMultistep, the levels and the normalized noise between them."""
    each = NoiseCase("CosineDPMSolverMultistep", "", {"sigma_schedule": "exponential", "solver_order": 1})
    loop = NoiseLoop(each, classes(each.name)[1], (2, 3, 8, 8), SEEDS[:2])
    set_timesteps(each.case(steps=steps), loop.scheduler)
    levels = loop.scheduler.sigmas.tolist()
    loop.run()
    weights = [b * math.sqrt(-math.expm1(-2.0 * math.log(a / b))) for a, b in itertools.pairwise(levels) if b > 0]
    return levels[: len(weights) + 1], [noise / w for noise, w in zip(loop.made, weights, strict=False)]


def sde_noise(steps: int) -> tuple[list[float], list[Tensor]]:
    """Of DPMSolverSDE, the levels and the normalized noise between them, that of the second-order steps."""
    each = NoiseCase("DPMSolverSDE", "", {"timestep_spacing": "linspace"})
    loop = NoiseLoop(each, classes(each.name)[1], (2, 3, 8, 8), SEEDS[:2])
    set_timesteps(each.case(steps=steps), loop.scheduler)
    sigmas = loop.scheduler.sigmas.tolist()
    loop.run()
    levels = [sigmas[0], *sigmas[1:-1:2]]
    weights = [min(b, math.sqrt(b * b * (a * a - b * b) / (a * a))) for a, b in itertools.pairwise(levels)]
    return levels, [noise / w for noise, w in zip(loop.made[1::2], weights, strict=False)]


@pytest.mark.parametrize(("noises", "few", "many"), [(cosine_noise, 5, 9), (sde_noise, 4, 7)], ids=["Cosine", "SDE"])
def test_a_path_is_the_same_for_another_number_of_steps(noises: Any, few: int, many: int) -> None:
    (levels, coarse), (finer, fine) = noises(few), noises(many)
    compared = 0
    for i, (a, b) in enumerate(itertools.pairwise(levels)):
        if 2 * i + 2 >= len(finer) or i >= len(coarse):
            break
        middle = finer[2 * i + 1]
        assert finer[2 * i] == pytest.approx(a, rel=1e-5)
        assert finer[2 * i + 2] == pytest.approx(b, rel=1e-5)
        parts = fine[2 * i] * math.sqrt(a - middle) + fine[2 * i + 1] * math.sqrt(middle - b)
        # Levels that are rounded otherwise, by up to 4·2⁻²⁴, are other times: the path moves by √(2·8·2⁻²⁴·a) between
        # them, and at most 6.8 times that.
        assert (coarse[i] * math.sqrt(a - b) - parts).abs().max() <= 6.8 * math.sqrt(16 * 2.0**-24 * a)
        compared += 1
    assert compared >= 2


@pytest.mark.parametrize("each", KINDS, ids=str)
def test_without_seeds_generators_draw_again(each: NoiseCase) -> None:
    def run(scheduler: Any) -> SampleLoop:
        loop = SampleLoop(each, [0, 1, 2], scheduler, noise="generator")
        loop.seeds = None
        return loop.run()

    first = SampleLoop(each, [0, 1, 2]).run()
    first.scheduler.use_philox(None)
    set_timesteps(first.case, first.scheduler)
    assert_same(run(first.scheduler), run(made(first.case, classes(each.name)[1]).scheduler), [0, 1, 2])


@pytest.mark.parametrize("each", KINDS, ids=str)
def test_new_seeds_count_from_the_next_loop_on(each: NoiseCase) -> None:
    used = SampleLoop(each, [0, 1]).run()
    set_timesteps(used.case, used.scheduler)
    other = SampleLoop(each, [1, 2])
    assert_same(SampleLoop(each, [1, 2], used.scheduler).run(), other.run(), [0, 1])


@pytest.mark.parametrize("each", KINDS, ids=str)
def test_a_stepper_has_the_noise_of_its_seeds(each: NoiseCase) -> None:
    alone = SampleLoop(each, [0, 1, 2]).run()
    set_timesteps(alone.case, alone.scheduler)
    stepper = SampleLoop(each, [0, 1, 2], alone.scheduler.stepper())
    assert_same(stepper.run(), alone, [0, 1, 2])


@pytest.mark.parametrize("each", [each for each in KINDS if each.kind != "twice"], ids=str)
def test_guided_steps_have_the_same_noise(each: NoiseCase) -> None:
    def run(guided: bool) -> SampleLoop:
        loop = SampleLoop(each, [0, 1, 2])

        def step(output: Tensor, t: Any, sample: Tensor, **kwargs: Any) -> Any:
            if guided:
                return loop.scheduler.guided_step(output, output, 7.5, t, sample, **kwargs)
            return loop.scheduler.step(output, t, sample, **kwargs)

        return loop.run(step=step)

    for mine, other in zip(run(True).tensors(), run(False).tensors(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5 * float(other.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("each", KINDS, ids=str)
def test_other_dtypes_have_the_same_noise(each: NoiseCase, dtype: torch.dtype) -> None:
    shape = (2, 3, 8, 8)

    def noise(dtype: torch.dtype) -> list[Tensor]:
        loop = NoiseLoop(each, classes(each.name)[1], shape, SEEDS[:2])
        loop.case = loop.case.of(dtype=dtype)
        loop.zero = lambda: setattr(loop, "sample", torch.zeros(shape, dtype=dtype))  # type: ignore[method-assign]
        output = torch.zeros(shape, dtype=dtype)
        return loop.run(step=lambda _, *args, **kwargs: loop.scheduler.step(output, *args, **kwargs)).made

    for mine, other in zip(noise(dtype), noise(torch.float32), strict=True):
        assert mine.dtype == dtype
        # The noise, and the result, are rounded to the dtype; scalars of half types are diffusers' own.
        unit = max(torch.finfo(dtype).eps, 2.0**-20)
        assert (mine.double() - other.double()).abs().max() <= 4 * unit * max(1e-3, float(other.abs().max()))


@pytest.mark.parametrize("each", KINDS, ids=str)
def test_as_many_seeds_as_samples(each: NoiseCase) -> None:
    loop = SampleLoop(each, [0, 1])
    loop.seeds = SEEDS
    states: list[Tensor] = []
    with pytest.raises(ValueError, match="seeds"):
        loop.run()
    states = loop.random_states()
    assert all(map(torch.equal, states, loop.states))
    assert isinstance(loop.case, Case)
