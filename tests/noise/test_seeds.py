# SPDX-License-Identifier: MIT
"""Seeds and the model's own dtype through a whole loop."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fastdiff
from fastdiff import Purpose, as_seeds, ops, spawn_seeds
from support import solver_cases

STOCHASTIC: list[tuple[str, dict[str, Any]]] = [
    *solver_cases.STOCHASTIC,
    ("ddpm", {"variance_type": "learned_range"}),
]
SHAPE = (3, 4, 5, 7)


def model_for(config: dict[str, Any]) -> Any:
    """Elementwise, so that a sample does not depend on its neighbours."""

    def model(x: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        y = x * 0.3 if cond is None else x * cond.reshape(-1, 1, 1, 1).to(x.dtype)
        return torch.cat([y, y.tanh()], dim=1) if config.get("variance_type") == "learned_range" else y

    return model


@pytest.mark.parametrize(("method", "config"), STOCHASTIC)
@pytest.mark.parametrize("guided", [False, True])
def test_a_sample_comes_out_the_same_alone_and_in_any_batch(method: str, config: dict[str, Any], guided: bool) -> None:
    sampler = fastdiff.create_sampler("linear", method, num_inference_steps=6, **config)
    seeds = [7, 2**64 - 1, 12]
    model = model_for(config)

    def run(chosen: list[int]) -> Tensor:
        latents = fastdiff.randn((len(chosen), *SHAPE[1:]), chosen)
        conditions = [torch.full((len(chosen),), value) for value in (0.2, 0.1)] if guided else [None, None]
        scale = 3.0 if guided else 1.0
        return sampler.sample(model, latents, *conditions, guidance_scale=scale, seeds=chosen, progress=False).samples

    together = run(seeds)
    assert torch.equal(run(seeds[::-1]), together.flip(0))
    for i, seed in enumerate(seeds):
        assert torch.equal(run([seed])[0], together[i])
    assert not torch.equal(run([8])[0], together[0])


def test_steps_draw_for_their_own_purpose_and_step() -> None:
    sampler = fastdiff.create_sampler("linear", "ddpm", num_inference_steps=4)
    seeds = spawn_seeds(3, 3)
    x = fastdiff.randn(SHAPE, seeds)
    by_seeds, by_hand = sampler.stepper(seeds=seeds), sampler.stepper()
    expected = got = x
    for step in range(4):
        z = fastdiff.randn(SHAPE, seeds, step, Purpose.STEP)
        assert not torch.equal(z, x), "latents have a purpose of their own"
        expected = by_hand.step(expected, expected * 0.3, noise=z)
        got = by_seeds.step(got, got * 0.3)
        assert torch.equal(got, expected)


def test_torchs_generators_are_left_alone_where_seeds_draw() -> None:
    sampler = fastdiff.create_sampler("linear", "ddpm", num_inference_steps=3)
    before = torch.random.get_rng_state()
    sampler.sample(model_for({}), fastdiff.randn(SHAPE, [1, 2, 3]), seeds=[1, 2, 3], progress=False)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"seeds": [1, 2]}, ValueError, r"^randn: seeds holds 2, expected one for each of 3 samples; "),
        ({"seeds": [1.5, 2, 3]}, TypeError, r"^randn: seeds holds a float, expected ints; "),
        (
            {"seeds": [1, 2, 3], "generator": torch.Generator()},
            ValueError,
            r"^sample: generator is given beside seeds, expected one source of noise; ",
        ),
    ],
)
def test_bad_seeds_are_refused(options: dict[str, Any], error: type[Exception], message: str) -> None:
    sampler = fastdiff.create_sampler("linear", "ddpm", num_inference_steps=3)
    with pytest.raises(error, match=message):
        sampler.sample(model_for({}), torch.randn(SHAPE), progress=False, **options)


@pytest.mark.parametrize("mode", ["batched", "sequential"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_model_is_called_in_its_own_dtype_on_what_the_step_has_written(mode: str, dtype: torch.dtype) -> None:
    sampler = fastdiff.create_sampler("linear", "ddim", num_inference_steps=4, guidance_mode=mode)
    seen: list[Tensor] = []
    samples: list[Tensor] = []

    def model(x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        assert x.dtype == dtype
        seen.append(x.clone())
        return x * cond.reshape(-1, 1, 1, 1).to(x.dtype)

    latents = torch.randn(SHAPE)
    result = sampler.sample(
        model, latents, torch.full((3,), 0.2), torch.full((3,), 0.1), guidance_scale=2.0, model_dtype=dtype,
        callback=lambda info: samples.append(info.sample.clone()), progress=False,
    )  # fmt: skip
    assert result.samples.dtype == torch.float32
    calls = 2 if mode == "sequential" else 1
    for step, before in enumerate([latents, *samples[:-1]]):
        for call in range(calls):
            expected = before.to(dtype)
            assert torch.equal(seen[step * calls + call], expected if calls == 2 else torch.cat([expected] * 2))


@pytest.mark.parametrize("guided", [False, True])
def test_a_model_may_return_its_own_input(guided: bool) -> None:
    # Its output is then the memory that the step writes the next input to.
    sampler = fastdiff.create_sampler("linear", "ddim", num_inference_steps=5)
    latents = torch.randn(SHAPE)
    conditions = [torch.ones(3), torch.zeros(3)] if guided else [None, None]

    def run(model: Any) -> Tensor:
        return sampler.sample(
            model, latents, *conditions, guidance_scale=3.0 if guided else 1.0, progress=False
        ).samples

    assert torch.equal(run(lambda x, t, *_: x), run(lambda x, t, *_: x.clone()))


def test_seeds_reach_a_step_in_any_batch_dimension() -> None:
    # One sample without a batch dimension has one seed.
    x = torch.randn(())
    table = fastdiff.create_sampler("linear", "ddpm").table.coefficients_as(torch.float32)
    (one,) = ops.step(x, x, table, 3, seeds=as_seeds([9], 1, "cpu"), noise_step=3)
    (other,) = ops.step(x[None], x[None], table, 3, seeds=as_seeds([9], 1, "cpu"), noise_step=3)
    assert torch.equal(one[None], other)
