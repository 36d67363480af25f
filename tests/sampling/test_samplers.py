# SPDX-License-Identifier: MIT
"""Samplers end to end, with toy models: accepted inputs, callbacks, refusals, unchanged arguments."""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastdiff import (
    BaseSampler,
    StepInfo,
    create_sampler,
    ops,
)
from fastdiff.schedules.levels import VariancePreservingPath
from fastdiff.schedules.timesteps import sigma_schedule, timestep_schedule
from support.solver_cases import DETERMINISTIC, METHODS, model_calls

SHAPE = (3, 2, 4, 4)


def _latents(dtype: torch.dtype = torch.float32, shape: tuple[int, ...] = SHAPE, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def _model(x: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
    """Smooth model that depends on timestep and condition and treats each sample separately."""
    shape = [-1] + [1] * (x.dim() - 1)
    shift = 0.0 if condition is None else condition.to(x.dtype).reshape(shape)
    return 0.5 * torch.tanh(x + shift) + (t.to(x.dtype) / 2000).reshape(shape)


def _sampler(method: str = "ddim", steps: int = 5, **fields: Any) -> BaseSampler:
    return create_sampler("linear", method, **{"timestep_spacing": "trailing", "num_inference_steps": steps, **fields})


def _sample(sampler: BaseSampler, model: Callable[..., Any] = _model, *conditions: Tensor, **options: Any) -> Tensor:
    latents = options.pop("latents", None)
    options = {"progress": False, "generator": torch.Generator().manual_seed(7), **options}
    return sampler.sample(model, _latents() if latents is None else latents, *conditions, **options).samples


# ------------------------------------------------------------------------------ what is accepted


WRAPS: dict[str, Callable[[Tensor], Any]] = {
    "tensor": lambda y: y,
    "tuple": lambda y: (y, "rest"),
    "list": lambda y: [y],
    "dict": lambda y: {"sample": y},
    "object": lambda y: SimpleNamespace(sample=y),
    "wider": lambda y: y.double(),
}


# One loop unwraps the outputs of all methods: every type with one method, and every method with one type.
@pytest.mark.parametrize(
    ("method", "wrap"),
    [*(("ddim", wrap) for wrap in WRAPS), *zip(METHODS, itertools.cycle(reversed(WRAPS)), strict=False)],
)
def test_sampler_accepts_model_output_types(method: str, wrap: str) -> None:
    plain = _sample(_sampler(method))
    assert torch.equal(_sample(_sampler(method), lambda x, t: WRAPS[wrap](_model(x, t))), plain)
    assert plain.shape == SHAPE
    assert plain.dtype == torch.float32
    assert torch.isfinite(plain).all()


@pytest.mark.parametrize("answer", [None, "x", {"other": torch.zeros(SHAPE)}, (), SimpleNamespace(sample=3)], ids=repr)
def test_sampler_refuses_invalid_outputs(answer: object) -> None:
    with pytest.raises(TypeError, match=r"sample: model returned a \w+, expected a tensor, a tuple .*; return the"):
        _sample(_sampler(), lambda x, t: answer)


def test_sampler_passes_timesteps_to_model() -> None:
    told = []

    def model(x: Tensor, t: Tensor, *, extra: str) -> Tensor:
        assert t.shape == (3,)
        assert extra == "passed on"
        told.append(float(t[0]))
        return _model(x, t)

    _sample(_sampler(), model, model_kwargs={"extra": "passed on"})
    assert told == [999.0, 799.0, 599.0, 399.0, 199.0]


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing", "cosine"])
def test_sampler_timesteps_follow_the_spacing(spacing: str) -> None:
    sampler = _sampler(steps=7, timestep_spacing=spacing)
    assert torch.equal(sampler.timesteps, timestep_schedule(spacing, 7, 1000))
    assert sampler.timesteps.dtype == torch.int64
    assert sampler.init_noise_sigma == pytest.approx(1.0, rel=1e-15)


@pytest.mark.parametrize("spacing", ["karras", "exponential", "beta", "lu"])
@pytest.mark.parametrize("method", METHODS)
def test_sampler_sigma_spacings_place_the_levels(method: str, spacing: str) -> None:
    if spacing == "beta":
        pytest.importorskip("scipy")
    sampler = _sampler(method, steps=6, sigma_spacing=spacing)
    sigmas = sampler.scheduler.sigmas
    expected = sigma_schedule(spacing, 6, float(sigmas[0]), float(sigmas[-1]))
    levels = sampler.levels(6)
    np.testing.assert_allclose([p.noise_ratio for p in levels.points[:-1]], expected, rtol=1e-12)
    assert levels[6].sigma == 0.0
    assert sampler.timesteps[0] == 999
    assert sampler.timesteps[len(sampler.timesteps) - 1] == 0
    assert torch.isfinite(_sample(sampler)).all()


def test_sampler_karras_has_alias() -> None:
    short, long = _sampler(use_karras_sigmas=True), _sampler(sigma_spacing="karras")
    assert torch.equal(short.table.coefficients, long.table.coefficients)
    assert not torch.equal(short.table.coefficients, _sampler().table.coefficients)


def test_sampler_may_end_at_noise_of_timestep_0() -> None:
    sampler = _sampler(set_alpha_to_one=False)
    assert sampler.levels(5)[5].sigma == pytest.approx(float((1 - sampler.scheduler.alphas_cumprod[0]).sqrt()))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_sampler_keeps_dtype_and_layout(method: str, dtype: torch.dtype) -> None:
    latents = _latents(dtype)
    plain = _sample(_sampler(method), latents=latents)
    assert plain.dtype == dtype
    assert torch.isfinite(plain).all()
    # Element by element the same arithmetic, and the same draws: the layout changes no bit.
    other = _sample(_sampler(method), latents=latents.to(memory_format=torch.channels_last))
    assert torch.equal(other, plain)
    if method in DETERMINISTIC:  # without noise, which torch draws in the order of memory
        assert other.is_contiguous(memory_format=torch.channels_last)
    # x0 is of order 1 and ε off by no more than the dtype's roundings: float64's own loop is near.
    exact = _sample(_sampler(method), latents=_latents(torch.float64)) if method in DETERMINISTIC else None
    if exact is not None:
        # Five steps, each amplified by 1/α = 160 of the first level at most: 5·160·2 roundings.
        scale = 1600 * torch.finfo(dtype).eps * float(exact.abs().max())
        assert (plain.double() - exact).abs().max() <= scale


@pytest.mark.parametrize("method", METHODS)
def test_sampler_on_cpu_agrees_with_reference(method: str) -> None:
    latents = _latents(torch.float64)
    default = _sample(_sampler(method), latents=latents)
    reference = _sample(_sampler(method), latents=latents, backend="reference")
    assert ops.backend_for(latents) == ("reference" if ops.cpu_build() is None else "cpu")
    # A row sums at most 4 products here, each off by 2⁻⁵³; the five steps pass errors on by 1/α = 160 at most.
    np.testing.assert_allclose(default, reference, rtol=0, atol=5 * 4 * 160 * 2**-53 * float(default.abs().max()))


def test_sampler_accepts_expanded_and_empty_latents() -> None:
    expanded = _latents(shape=(1, 2, 4, 4)).expand(3, 2, 4, 4)
    assert torch.equal(_sample(_sampler(), latents=expanded), _sample(_sampler(), latents=expanded.contiguous()))
    assert _sample(_sampler(), latents=torch.empty(0, 2, 4, 4)).shape == (0, 2, 4, 4)


# ------------------------------------------------------------------------------ zero SNR, variance, thresholds


ZERO_SNR: list[tuple[str, dict[str, Any]]] = [
    *((method, {}) for method in METHODS if method != "dpm_solver"),
    ("ddim", {"eta": 1.0}),
    *(
        ("dpm_solver", {"algorithm_type": algorithm, "solver_mode": mode, "solver_order": order})
        for algorithm in ("dpmsolver", "dpmsolver++", "sde-dpmsolver", "sde-dpmsolver++")
        for mode in ("multistep", "singlestep")
        for order in (1, 2, 3)
    ),
]


@pytest.mark.parametrize(("method", "fields"), ZERO_SNR, ids=lambda value: str(value))
def test_sampler_starts_from_pure_noise_with_v_prediction(method: str, fields: dict[str, Any]) -> None:
    sampler = _sampler(method, steps=7, rescale_betas_zero_snr=True, prediction_type="v_prediction", **fields)
    assert sampler.levels(7)[0].alpha == 0.0
    assert torch.isfinite(sampler.table.coefficients[:, 3:]).all()
    end = _sample(sampler)
    assert torch.isfinite(end).all()
    # A model that is sure of x0 = 1/2 leads there: v = α·ε − σ·x0 with ε = (x − α/2)/σ; at σ = 0 nothing is left.
    path = VariancePreservingPath(sampler.scheduler.alphas_cumprod)

    def sure(x: Tensor, t: Tensor) -> Tensor:
        level = path.at_timestep(float(t[0]))
        alpha, sigma = level.alpha, level.sigma
        return alpha * (x - alpha * 0.5) / sigma - sigma * 0.5

    end = _sample(sampler, sure, latents=_latents(torch.float64))
    # Ending at x0 takes away all but the rounding of the last step; LCM's c_skip keeps (0.05/142)² of the sample.
    tolerance = 1e-6 if method == "lcm" else 1e-9
    torch.testing.assert_close(end, torch.full_like(end, 0.5), rtol=0, atol=tolerance)


@pytest.mark.parametrize("method", METHODS)
def test_sampler_refuses_epsilon_at_pure_noise(method: str) -> None:
    with pytest.raises(
        ValueError, match=r"prediction_type is 'epsilon' at timestep 999.*expected a level with ᾱ > 0; use v_"
    ):
        _sampler(method, rescale_betas_zero_snr=True)


@pytest.mark.parametrize("mode", ["batched", "sequential"])
@pytest.mark.parametrize("variance_type", ["learned", "learned_range"])
def test_sampler_uses_learned_variance_with_guidance(variance_type: str, mode: str) -> None:
    """Check on one step that the conditional half's second output scales the noise."""

    def model(x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        v = torch.sigmoid(x + condition.reshape(-1, 1, 1, 1))
        return torch.cat([_model(x, t, condition), v], dim=1)

    sampler = _sampler("ddpm", steps=2, variance_type=variance_type, guidance_mode=mode)
    condition, negative = torch.full((3,), 0.4), torch.full((3,), -0.3)
    seen: list[StepInfo] = []
    latents = _latents(torch.float64)
    conditions = (condition.double(), negative.double())
    _sample(sampler, model, *conditions, latents=latents, guidance_scale=3.0, callback=seen.append)
    t, s = sampler.levels(2)[0], sampler.levels(2)[1]
    time = torch.full((3,), 999.0)
    cond, uncond = (_model(latents, time, c) for c in conditions)
    x0 = (latents - t.sigma * (uncond + 3.0 * (cond - uncond))) / t.alpha
    beta = t.sigma**2 - (t.alpha / s.alpha * s.sigma) ** 2
    v = torch.sigmoid(latents + 0.4)
    small = beta * (s.sigma / t.sigma) ** 2
    variance = v if variance_type == "learned" else (v + 1) / 2 * math.log(beta) + (1 - v) / 2 * math.log(small)
    std = variance.sqrt() if variance_type == "learned" else (0.5 * variance).exp()
    z = torch.randn(SHAPE, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    expected = s.alpha * beta / t.sigma**2 * x0 + t.alpha / s.alpha * s.sigma**2 / t.sigma**2 * latents + std * z
    # conditions of 0.4 are float32's 0.4: one part in 1e8 of the condition.
    torch.testing.assert_close(seen[0].sample, expected, rtol=1e-6, atol=1e-5)


def test_sampler_error_explains_second_output() -> None:
    def two(x: Tensor, t: Tensor) -> Tensor:
        return torch.cat([x, x], dim=1)

    with pytest.raises(ValueError, match=r"returned shape \[3, 4, 4, 4\], expected \[3, 2, 4, 4\]; set variance_type="):
        _sample(_sampler("ddpm"), two)
    with pytest.raises(
        ValueError, match=r"returned shape \[3, 2, 4, 4\], expected \[3, 4, 4, 4\]; return the variance"
    ):
        _sample(_sampler("ddpm", variance_type="learned_range"))


@pytest.mark.parametrize("method", METHODS)
def test_sampler_clips_x0(method: str) -> None:
    """The last step returns x0, so the result has its bound; a model with ε = 0 has x0 = x/α, far beyond it."""

    def zero(x: Tensor, t: Tensor) -> Tensor:
        return torch.zeros_like(x)

    clipped = _sample(_sampler(method, clip_sample=True, clip_sample_range=0.7), zero)
    # PNDM and IPNDM add up differences of ε times α_s·σ̂_t, 20 in the first step: ε is 4 at most, a rounding 6e-8.
    tolerance = 2e-5 if method in ("pndm", "ipndm") else 1e-6
    assert float(clipped.abs().max()) == pytest.approx(0.7, rel=tolerance)
    assert float(_sample(_sampler(method), zero).abs().max()) > 0.8
    # 0.7 is clip_sample's; thresholding takes its place, divides by the bound, and so ends at 1.
    bounded = _sample(_sampler(method, clip_sample=True, clip_sample_range=0.7, thresholding=True), zero)
    assert float(bounded.abs().max()) == pytest.approx(1.0, rel=tolerance)


def test_sampler_thresholds_by_quantile() -> None:
    latents = _latents(torch.float64)
    sampler = _sampler(steps=1, thresholding=True, dynamic_thresholding_ratio=0.8, sample_max_value=500.0)
    end = _sample(sampler, lambda x, t: torch.zeros_like(x), latents=latents)
    x0 = latents / sampler.levels(1)[0].alpha
    bound = torch.quantile(x0.abs().flatten(1), 0.8, dim=1).reshape(-1, 1, 1, 1)
    assert bound.min() > 1.0
    torch.testing.assert_close(end, x0.clamp(-bound, bound) / bound, rtol=1e-12, atol=0)
    # One element a sample, and samples without further dimensions, have quantiles too.
    for shape in ((3, 1), (3,)):
        assert _sample(sampler, lambda x, t: torch.zeros_like(x), latents=_latents(shape=shape)).shape == shape


# ------------------------------------------------------------------------------ guidance


@pytest.mark.parametrize("method", METHODS)
def test_sampler_guidance_modes_agree(method: str) -> None:
    conditions = torch.tensor([0.5, -0.2, 0.9]), torch.zeros(3)
    ends = [
        _sample(_sampler(method, guidance_scale=4.0, guidance_mode=mode), _model, *conditions)
        for mode in ("batched", "sequential")
    ]
    assert torch.equal(*ends)
    assert not torch.equal(ends[0], _sample(_sampler(method), _model, *conditions))

    # Guidance by the formula, on a model that combines the two itself.
    def combined(x: Tensor, t: Tensor) -> Tensor:
        cond, uncond = (_model(x, t, c) for c in conditions)
        return uncond + 4.0 * (cond - uncond)

    # float32: 1/α = 160 times a few roundings of outputs of size 4.
    torch.testing.assert_close(ends[0], _sample(_sampler(method), combined), rtol=0, atol=160 * 5 * 4 * 2**-24 * 10)


@pytest.mark.parametrize(
    ("mode", "scale", "batches"), [("batched", 3.0, [6]), ("sequential", 3.0, [3, 3]), ("batched", 1.0, [3])]
)
def test_sampler_makes_model_calls_that_guidance_needs(mode: str, scale: float, batches: list[int]) -> None:
    calls: list[int] = []

    def model(x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        assert len(t) == len(condition) == len(x)
        calls.append(len(x))
        return _model(x, t, condition)

    sampler = _sampler(steps=2, guidance_mode=mode)
    _sample(sampler, model, torch.ones(3), torch.zeros(3), guidance_scale=scale)
    assert calls == batches * 2


def test_sampler_guidance_of_one_condition_needs_sequential_calls() -> None:
    with pytest.raises(
        ValueError, match=r"sample: negative_prompt_embeds is missing, expected .*guidance_mode='sequential'"
    ):
        _sample(_sampler(guidance_scale=2.0), _model, torch.ones(3, dtype=torch.int64))
    alone = _sample(_sampler(guidance_scale=2.0, guidance_mode="sequential"), _model, torch.ones(3))
    assert torch.equal(alone, _sample(_sampler(guidance_scale=2.0), _model, torch.ones(3), torch.zeros(3)))
    with pytest.raises(ValueError, match=r"negative_prompt_embeds has shape \[2\], expected \[3\] like prompt_embeds"):
        _sample(_sampler(guidance_scale=2.0), _model, torch.ones(3), torch.zeros(2))


@pytest.mark.parametrize("scale", [math.nan, math.inf])
def test_sampler_refuses_non_finite_guidance_scale(scale: float) -> None:
    with pytest.raises(ValueError, match=r"guidance_scale is \w+, expected a finite number"):
        _sample(_sampler(steps=1), _model, torch.ones(3), torch.zeros(3), guidance_scale=scale)


# ------------------------------------------------------------------------------ callback and progress


@pytest.mark.parametrize("method", METHODS)
def test_sampler_callback_sees_each_step(method: str) -> None:
    seen: list[StepInfo] = []
    copies: list[Tensor] = []

    def callback(info: StepInfo) -> None:
        seen.append(info)
        copies.append(info.sample.clone())

    sampler = _sampler(method)
    end = _sample(sampler, callback=callback)
    calls = model_calls(method, 5)
    assert [info.index for info in seen] == list(range(calls))
    assert {info.total for info in seen} == {calls}
    assert [info.timestep for info in seen] == list(sampler.table.timesteps)
    assert all(torch.equal(info.sample, copy) for info, copy in zip(seen, copies, strict=True)), "shown, then written"
    assert len({info.sample.data_ptr() for info in seen}) == calls
    assert torch.equal(end, seen[-1].sample)
    assert torch.equal(end, _sample(sampler)), "a callback changes nothing"
    assert seen[0].model_output.shape == SHAPE


def test_sampler_callback_can_stop_the_loop() -> None:
    sampler = _sampler()
    result = sampler.sample(_model, _latents(), callback=lambda info: info.index < 2, progress=False)
    assert result.steps == 3
    # None and other falsy answers go on.
    assert sampler.sample(_model, _latents(), callback=lambda info: 0, progress=False).steps == 5
    assert sampler.sample(_model, _latents(), progress=False).steps == 5


def test_sampler_result_reports_times() -> None:
    result = _sampler().sample(_model, _latents(), progress=False)
    assert result.steps == 5
    assert result.model_time > 0
    assert result.step_time > 0
    assert result.model_time + result.step_time <= result.processing_time
    assert 0 < result.step_share < 1
    assert result.peak_memory > 0


def test_sampler_progress_is_shown_or_not(capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tqdm")
    _sampler().sample(_model, _latents(), progress=False)
    assert capfd.readouterr() == ("", "")
    _sampler().sample(_model, _latents(), progress=True)
    shown = capfd.readouterr().err
    assert "sampling" in shown
    assert "5/5" in shown


def test_sampler_works_without_tqdm(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch is the only dependency of a default call."""
    monkeypatch.setitem(sys.modules, "tqdm", None)
    assert _sampler().sample(_model, _latents()).steps == 5
