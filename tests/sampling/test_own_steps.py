# SPDX-License-Identifier: MIT
"""Samplers on steps that a caller gives: timesteps, sigmas, a start in the middle, and rescaled guidance."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastdiff import BaseSampler, Stepper, create_sampler
from support.solver_cases import METHODS

SHAPE = (3, 2, 4)
LATENTS = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
PROMPT = torch.tensor([0.5, -0.25, 1.0], dtype=torch.float64).reshape(3, 1, 1)
SEEDS = [1, 2, 3]


def _model(x: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
    shift = 0.0 if condition is None else condition.to(x.dtype)
    return torch.tanh(x + shift) * 0.5 + 1e-4 * t.reshape(-1, 1, 1).to(x.dtype)


def _end(sampler: BaseSampler, latents: Tensor = LATENTS, **options: Any) -> Tensor:
    return sampler.sample(_model, latents, seeds=SEEDS, progress=False, **options).samples


# --- Timesteps and sigmas ---------------------------------------------------------------------------------------------


FORMS = (list, tuple, torch.tensor, np.array)


# Every form with one method, and every method with one form.
@pytest.mark.parametrize(
    ("method", "form"),
    [*(("ddim", form) for form in FORMS), *zip(METHODS, itertools.cycle(reversed(FORMS)), strict=False)],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_given_timesteps_are_those_of_a_spacing(method: str, form: Any) -> None:
    usual = create_sampler("linear", method, num_inference_steps=6, timestep_spacing="trailing")
    other = create_sampler("linear", method, num_inference_steps=3)
    own, given_steps = other.table, form([999, 832, 666, 499, 332, 166])
    first = LATENTS * usual.init_noise_sigma  # given steps take the first sample as it is
    assert torch.equal(_end(other, first, timesteps=given_steps), _end(usual))
    assert other.table is own, "the sampler keeps its own steps"
    other.set_timesteps(timesteps=given_steps)
    assert torch.equal(_end(other, first), _end(usual))
    assert other.config.num_inference_steps == 6
    assert torch.equal(other.timesteps, usual.timesteps)
    assert torch.equal(other.sigmas, usual.sigmas)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["linear", "flow"])
def test_sigmas_of_a_loop_give_the_loop_again(method: str, kind: str) -> None:
    if (kind, method) == ("flow", "edm_euler"):
        pytest.skip("EDM networks have no level without signal")
    usual = create_sampler(kind, method, num_inference_steps=5, timestep_spacing="trailing")
    path = usual.scheduler.path
    sigmas = [path.sigma_of(point) for point in usual.levels(5).points]
    assert sigmas[-1] == 0.0
    other = create_sampler(kind, method, num_inference_steps=9)
    for given_sigmas in (sigmas, sigmas[:-1]):
        # The way from α to σ and back rounds, and a timestep is interpolated.
        found = _end(other, LATENTS * usual.init_noise_sigma, sigmas=given_sigmas)
        torch.testing.assert_close(found, _end(usual), rtol=1e-7, atol=1e-7)


def test_sigmas_are_visited_as_given() -> None:
    sampler = create_sampler("scaled_linear", "euler")
    sampler.set_timesteps(3, sigmas=[14.6, 3.0, 0.5, 0.0], device="cpu")
    assert sampler.sigmas.tolist() == pytest.approx([14.6, 3.0, 0.5, 0.0])
    assert sampler.timesteps.dtype == torch.float32
    x = LATENTS
    for info in sampler.stream(_model, LATENTS):
        sigma, after = float(sampler.sigmas[info.index]), float(sampler.sigmas[info.index + 1])
        eps = _model(x, torch.full((3,), info.timestep))
        # Euler in x̂ = x/α (arXiv 2206.00364, algorithm 1), x = x̂/√(1 + σ²).
        x = (x * math.hypot(1, sigma) + (after - sigma) * eps) / math.hypot(1, after)
        # The timestep is float32 in the loop and float64 here.
        torch.testing.assert_close(info.sample, x, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"timesteps": [900, 500], "sigmas": [1.0]}, "sigmas is given beside timesteps"),
        ({"timesteps": [500, 900]}, "a smaller one than the level before it"),
        ({"timesteps": [900, 900]}, "a smaller one than the level before it"),
        ({"timesteps": [1000]}, "values from 0 to 999"),
        ({"timesteps": []}, "timesteps is empty"),
        ({"timesteps": "900"}, "timesteps is a str"),
        ({"timesteps": 900}, "timesteps is a int"),
        ({"timesteps": [[900]]}, "timesteps is a list that holds no row of numbers"),
        ({"timesteps": [900, math.nan]}, "timesteps holds NaN"),
        ({"sigmas": [1.0, -1.0]}, "sigmas holds -1.0"),
        ({"sigmas": [0.0]}, "sigmas holds 0.0"),
        ({"sigmas": [1.0, 2.0]}, "a smaller one than the level before it"),
        ({"start_step": 6}, "start_step is 6, expected 0 to 5 for 6 steps"),
        ({"start_step": -1}, "start_step is -1"),
        ({"start_step": 1.5}, "start_step has type float"),
        ({"start_step": True}, "start_step has type bool"),
    ],
    ids=str,
)
def test_unsuitable_steps_are_refused_and_nothing_changes(options: dict[str, Any], message: str) -> None:
    sampler = create_sampler("linear", "dpm_solver", num_inference_steps=6)
    table, config = sampler.table, sampler.config
    for refused in (
        lambda: sampler.sample(_model, LATENTS, **options),
        lambda: sampler.stream(_model, LATENTS, **options),
        lambda: sampler.set_timesteps(None if "start_step" not in options else 6, **options),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            refused()
    assert (sampler.table, sampler.config) == (table, config)
    assert sampler.table is table


def test_number_of_steps_agrees_with_the_steps() -> None:
    sampler = create_sampler("linear", "ddim", num_inference_steps=6)
    with pytest.raises(ValueError, match="num_inference_steps is 4, expected 2, the number of steps given"):
        sampler.set_timesteps(4, timesteps=[900, 10])
    with pytest.raises(TypeError, match="num_inference_steps has type NoneType"):
        sampler.set_timesteps()
    sampler.set_timesteps(4, device="meta")
    assert sampler.timesteps.device.type == sampler.sigmas.device.type == "meta"


# --- A start in the middle --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["cosine", "flow"])
@settings(max_examples=15)
@given(start=st.integers(1, 5), seed=st.integers(0, 2**31))
def test_loop_from_the_middle_is_the_rest_of_the_whole(kind: str, start: int, seed: int) -> None:
    """True of solvers without history: they go on from any sample."""
    sampler = create_sampler(kind, "ddim", num_inference_steps=6, timestep_spacing="trailing")
    latents = torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    states = [info.sample for info in sampler.stream(_model, latents)]
    rest = sampler.sample(_model, states[start - 1], start_step=start, progress=False)
    torch.testing.assert_close(rest.samples, states[-1], rtol=1e-12, atol=1e-12)
    assert rest.steps == 6 - start
    assert rest.sigmas == tuple(sampler.sigmas.tolist()[start:])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["scaled_linear", "flow"])
def test_noisy_samples_of_a_known_model_come_back(method: str, kind: str) -> None:
    """With a model that knows x0, every solver returns it from any start."""
    if method == "lcm" or (kind, method) == ("flow", "edm_euler"):
        pytest.skip("LCM reads consistency models alone, and EDM networks have no level without signal")
    clean = torch.randn(SHAPE, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    fields = {"eta": 0.0} if method == "euler_ancestral" else {}
    sampler = create_sampler(
        kind, method, num_inference_steps=8, timestep_spacing="trailing", prediction_type="sample", **fields
    )
    noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    start = sampler.add_noise(clean, noise, start_step=3)
    level = sampler.levels(8)[3]
    torch.testing.assert_close(start, level.alpha * clean + level.sigma * noise)
    result = sampler.sample(lambda x, t: clean, start, start_step=3, seeds=SEEDS, progress=False)
    torch.testing.assert_close(result.samples, clean, rtol=1e-9, atol=1e-9)
    sampler.set_timesteps(8, start_step=3)
    assert len(sampler.levels(8)) == 8
    again = sampler.sample(lambda x, t: clean, sampler.add_noise(clean, noise), seeds=SEEDS, progress=False)
    assert torch.equal(again.samples, result.samples)


def test_noise_unlike_the_samples_is_refused() -> None:
    sampler = create_sampler("linear", "ddim", num_inference_steps=6)
    for noise, what in ((LATENTS[:1], "shape"), (LATENTS.float(), "dtype"), (LATENTS.to("meta"), "device")):
        with pytest.raises(ValueError, match=f"add_noise: noise has {what}"):
            sampler.add_noise(LATENTS, noise)


def test_other_steps_are_compiled_once() -> None:
    sampler = create_sampler("linear", "ddim", num_inference_steps=6)
    made = [sampler._grid_for("sample", None, None, 2) for _ in range(2)]
    assert made[0] is made[1]
    for start in range(6):
        for steps in ([900, 500, 100, 50, 20, 10], None):
            sampler._grid_for("sample", steps, None, start)
    assert len(sampler._other_grids) == 8
    sampler.set_timesteps(6)
    assert not sampler._other_grids


# --- Rescaled guidance ------------------------------------------------------------------------------------------------


def _rescaled(x: Tensor, t: Tensor, scale: Any, share: float) -> Tensor:
    """arXiv 2305.08891, eq. 14 to 16, with torch's standard deviation over each sample."""
    u, c = _model(x, t, torch.zeros_like(PROMPT)), _model(x, t, PROMPT)
    guided = u + scale * (c - u)
    axes = tuple(range(1, x.dim()))
    rescaled = guided * (c.std(dim=axes, keepdim=True) / guided.std(dim=axes, keepdim=True))
    return share * rescaled + (1 - share) * guided


@pytest.mark.parametrize(
    ("backend", "bound"), [("cpu", {}), ("reference", {"thresholding": True, "sample_max_value": 1.5})], ids=str
)
@pytest.mark.parametrize("method", METHODS)
def test_rescaled_guidance_equals_a_model_that_is_rescaled(method: str, bound: dict[str, Any], backend: str) -> None:
    scales = torch.tensor([3.0, 7.5, 0.5], dtype=torch.float64)
    for scale, share in ((7.5, 0.7), (scales, 1.0)):
        sampler = create_sampler("linear", method, num_inference_steps=4, guidance_rescale=share, **bound)
        column = scale.reshape(-1, 1, 1) if isinstance(scale, Tensor) else scale
        found = sampler.sample(
            _model, LATENTS, PROMPT, torch.zeros_like(PROMPT), guidance_scale=scale, seeds=SEEDS, backend=backend,
            progress=False,
        )  # fmt: skip

        def rescaled(x: Tensor, t: Tensor, column: Any = column, share: float = share) -> Tensor:
            return _rescaled(x, t, column, share)

        expected = sampler.sample(rescaled, LATENTS, seeds=SEEDS, progress=False, backend=backend)
        # Float64, some tens of operations a step in another order.
        torch.testing.assert_close(found.samples, expected.samples, rtol=1e-9, atol=1e-9)


def test_rescale_of_zero_or_without_guidance_changes_no_bit() -> None:
    sampler = create_sampler("linear", "ddim", num_inference_steps=4)
    conditions = PROMPT, torch.zeros_like(PROMPT)
    usual = _end(sampler, prompt_embeds=conditions[0], negative_prompt_embeds=conditions[1])
    same = _end(sampler, prompt_embeds=conditions[0], negative_prompt_embeds=conditions[1], guidance_rescale=0.0)
    other = _end(sampler, prompt_embeds=conditions[0], negative_prompt_embeds=conditions[1], guidance_rescale=0.5)
    assert torch.equal(usual, same)
    assert not torch.equal(usual, other)
    assert torch.equal(_end(sampler, guidance_rescale=0.5), _end(sampler))


@pytest.mark.parametrize("share", [-0.1, 1.1, math.nan, "0.7"])
def test_share_outside_of_range_is_refused(share: Any) -> None:
    sampler = create_sampler("linear", "ddim", num_inference_steps=4)
    for make in (
        lambda: sampler.sample(_model, LATENTS, guidance_rescale=share),
        lambda: Stepper(sampler.table, guidance_rescale=share),
        lambda: create_sampler("linear", "ddim", guidance_rescale=share),
    ):
        with pytest.raises((TypeError, ValueError), match="guidance_rescale"):
            make()
