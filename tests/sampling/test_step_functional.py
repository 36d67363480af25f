# SPDX-License-Identifier: MIT
"""The single steps for other people's loops, against the papers' formulas and against diffusers' own steps."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fastdiff.ops import backend_for
from fastdiff.sampling import cfg_combine, ddim_step, ddpm_step, dpm_solver_step, euler_step
from support.oracle import DTYPES, FORMULA_ROUNDING, SCHEDULER_ROUNDING, Case, assert_within_rounding, plain_row

PREDICTIONS = ("epsilon", "v_prediction", "sample", "flow_prediction")
ALGORITHMS = ("dpmsolver", "dpmsolver++", "sde-dpmsolver", "sde-dpmsolver++")
VARIANCES = ("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", "learned", "learned_range")
SEEDS = st.integers(0, 2**32 - 1)
SIGNAL = st.floats(0.02, 0.9)  # ᾱ of the sample
CLIPS = st.sampled_from([None, 0.5, 1.0])


def tensors(seed: int, count: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    gen = torch.Generator().manual_seed(seed)
    return list(torch.randn(count, 3, 2, 5, generator=gen, dtype=torch.float64).to(dtype))


def reading(kind: str, x: Tensor, m: Tensor, alpha: float, sigma: float, clip: float | None) -> tuple[Tensor, ...]:
    """x0 (clipped), the model's own ε, and the ε that belongs to the clipped x0; from x = α·x0 + σ·ε."""
    x0, eps = {
        "epsilon": lambda: ((x - sigma * m) / alpha, m),
        "v_prediction": lambda: (alpha * x - sigma * m, alpha * m + sigma * x),
        "sample": lambda: (m, (x - alpha * m) / sigma),
        "flow_prediction": lambda: ((x - sigma * m) / (alpha + sigma), (x + alpha * m) / (alpha + sigma)),
    }[kind]()
    if clip is not None:
        x0 = x0.clamp(-clip, clip)
    return x0, eps, (x - alpha * x0) / sigma


def assert_close(got: Tensor, expected: Tensor, tolerance: float = FORMULA_ROUNDING) -> None:
    assert got.dtype == expected.dtype
    assert float((got - expected).abs().max()) <= tolerance


# --- The formulas ----------------------------------------------------------------------------------------------------


@given(seed=SEEDS, dtype=st.sampled_from(DTYPES), a_sample=st.booleans())
def test_cfg_combine_is_guidance_to_rounding(seed: int, dtype: torch.dtype, a_sample: bool) -> None:
    c, u = tensors(seed, 2, dtype)
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    scale = torch.tensor([0.0, 1.0, 7.5], dtype=compute) if a_sample else torch.tensor([7.5], dtype=compute)
    result = cfg_combine(c, u, scale if a_sample else 7.5)
    case = Case(c, c, plain_row(dtype, prev_m=1.0), uncond=u, guidance=scale)
    assert_within_rounding(case, [result], backend_for(c))
    assert cfg_combine(c, u, 7.5, out=u) is u


@given(
    seed=SEEDS,
    a=SIGNAL,
    gain=st.floats(0.05, 1.0),
    kind=st.sampled_from(PREDICTIONS),
    clip=CLIPS,
    variance=st.sampled_from(VARIANCES),
)
def test_ddpm_step_draws_from_the_posterior(
    seed: int, a: float, gain: float, kind: str, clip: float | None, variance: str
) -> None:
    x, m, z, v = tensors(seed, 4)
    a_prev = a + gain * (1 - a)  # from just above ᾱ to 1 itself
    x0, _, _ = reading(kind, x, m, math.sqrt(a), math.sqrt(1 - a), clip)
    beta = 1 - a / a_prev
    expected = math.sqrt(a_prev) * beta / (1 - a) * x0 + math.sqrt(a / a_prev) * (1 - a_prev) / (1 - a) * x
    second = None
    if variance == "learned":
        second = v.abs()
    elif variance == "learned_range":
        second = v.clamp(-1, 1)
    if a_prev < 1:
        small = max((1 - a_prev) / (1 - a) * beta, 1e-20)
        if second is not None:
            fraction = (v.clamp(-1, 1) + 1) / 2
            spread = torch.exp(fraction * math.log(beta) + (1 - fraction) * math.log(small))
            expected = expected + (second if variance == "learned" else spread).sqrt() * z
        else:
            expected = expected + math.sqrt(small if "small" in variance else beta) * z
    got = ddpm_step(
        x, m, alpha_cumprod=a, alpha_cumprod_prev=a_prev, noise=z, variance_type=variance, variance=second,
        prediction_type=kind, clip_range=clip,
    )  # fmt: skip
    assert_close(got, expected)


@given(
    seed=SEEDS,
    a=SIGNAL,
    gain=st.floats(0.05, 1.0),
    eta=st.sampled_from([0.0, 0.5, 1.0]),
    kind=st.sampled_from(PREDICTIONS),
    clip=CLIPS,
    use_clipped=st.booleans(),
)
def test_ddim_step_is_equation_12(
    seed: int, a: float, gain: float, eta: float, kind: str, clip: float | None, use_clipped: bool
) -> None:
    x, m, z = tensors(seed, 3)
    a_prev = a + gain * (1 - a)
    x0, own, consistent = reading(kind, x, m, math.sqrt(a), math.sqrt(1 - a), clip)
    std = eta * math.sqrt((1 - a_prev) / (1 - a) * (1 - a / a_prev))
    direction = consistent if use_clipped else own
    expected = math.sqrt(a_prev) * x0 + math.sqrt(max(1 - a_prev - std**2, 0.0)) * direction + std * z
    got = ddim_step(
        x, m, alpha_cumprod=a, alpha_cumprod_prev=a_prev, eta=eta, noise=z, prediction_type=kind, clip_range=clip,
        use_clipped_model_output=use_clipped,
    )  # fmt: skip
    assert_close(got, expected)


def dpm_formula(
    algorithm: str, solver_type: str, third: str, x: Tensor, ms: list[Tensor], z: Tensor, lambdas: list[float]
) -> Tensor:
    """The updates as diffusers writes them; `ms` newest first, `lambdas` of oldest, ..., current, target."""
    e = math.expm1
    lam = list(reversed(lambdas))  # target, current, one before, two before
    a_t, a_s = (1 / math.sqrt(1 + math.exp(-2 * value)) for value in lam[:2])
    s_t, s_s = (1 / math.sqrt(1 + math.exp(2 * value)) for value in lam[:2])
    h = lam[0] - lam[1]
    # Of D0, D1 (heun's weight) and D2 (as in diffusers), and D2 with the weight that Taylor's formula gives it.
    if algorithm == "dpmsolver++":
        w = (-a_t * e(-h), a_t * (e(-h) / h + 1), -a_t * ((e(-h) + h) / h**2 - 0.5))
        out, exact = s_t / s_s * x, 2 * w[2]
    elif algorithm == "dpmsolver":
        w = (-s_t * e(h), -s_t * (e(h) / h - 1), -s_t * ((e(h) - h) / h**2 - 0.5))
        out, exact = a_t / a_s * x, 2 * w[2]
    elif algorithm == "sde-dpmsolver++":
        k = -e(-2 * h)
        w = (a_t * k, a_t * (k / (-2 * h) + 1), a_t * ((k - 2 * h) / (2 * h) ** 2 - 0.5))
        out = s_t / s_s * math.exp(-h) * x + s_t * math.sqrt(k) * z
        exact = 2 * a_t * (0.5 - (2 * h - k) / (2 * h) ** 2)
    else:
        w = (-2 * s_t * e(h), -2 * s_t * (e(h) / h - 1), -2 * s_t * ((e(h) - h) / h**2 - 0.5))
        out, exact = a_t / a_s * x + s_t * math.sqrt(e(2 * h)) * z, 2 * w[2]
    out = out + w[0] * ms[0]
    if len(ms) == 1:
        return out
    r0 = (lam[1] - lam[2]) / h
    first = (ms[0] - ms[1]) / r0
    if len(ms) == 2:
        return out + (0.5 * w[0] if solver_type == "midpoint" else w[1]) * first
    r1 = (lam[2] - lam[3]) / h
    second = (ms[1] - ms[2]) / r1
    d1 = first + r0 / (r0 + r1) * (first - second)
    d2 = (first - second) / (r0 + r1)
    return out + w[1] * d1 + (w[2] if third == "compatible" else exact) * d2


@given(
    seed=SEEDS,
    order=st.integers(1, 3),
    start=st.floats(-2.5, -1.0),
    steps=st.lists(st.floats(0.2, 1.4), min_size=3, max_size=3),
    algorithm=st.sampled_from(ALGORITHMS),
    solver_type=st.sampled_from(["midpoint", "heun"]),
    third=st.sampled_from(["compatible", "exact"]),
    kind=st.sampled_from(PREDICTIONS),
    clip=CLIPS,
)
def test_dpm_solver_step_is_the_multistep_formula(
    seed: int, order: int, start: float, steps: list[float], algorithm: str, solver_type: str, third: str, kind: str,
    clip: float | None,
) -> None:  # fmt: skip
    x, m, z, newer, older = tensors(seed, 5)
    lambdas = [start]
    for step in steps[:order]:
        lambdas.append(lambdas[-1] + step)
    alphas_cumprod = [1 / (1 + math.exp(-2 * value)) for value in lambdas]
    current = alphas_cumprod[-2]
    x0, _, consistent = reading(kind, x, m, math.sqrt(current), math.sqrt(1 - current), clip)
    model = x0 if algorithm.endswith("++") else consistent
    previous = [older, newer][3 - order :]
    got, kept = dpm_solver_step(
        x, m, alphas_cumprod=alphas_cumprod, previous=previous, algorithm_type=algorithm, solver_type=solver_type,
        third_order=third, noise=z, prediction_type=kind, clip_range=clip,
    )  # fmt: skip
    assert_close(kept, model)
    assert_close(got, dpm_formula(algorithm, solver_type, third, x, [model, *reversed(previous)], z, lambdas))


@given(
    seed=SEEDS,
    sigma=st.floats(0.2, 15.0),
    fraction=st.one_of(st.just(0.0), st.floats(0.0, 0.95)),
    eta=st.sampled_from([0.0, 0.7, 1.0]),
    s_noise=st.sampled_from([1.0, 1.003]),
    kind=st.sampled_from(PREDICTIONS),
)
def test_euler_step_follows_the_slope_and_puts_noise_back(
    seed: int, sigma: float, fraction: float, eta: float, s_noise: float, kind: str
) -> None:
    x, m, z = tensors(seed, 3)
    after = fraction * sigma
    alpha = 1 / math.sqrt(1 + sigma**2)
    x0, _, _ = reading(kind, alpha * x, m, alpha, sigma * alpha, None)
    up = min(after, eta * math.sqrt(after**2 * (sigma**2 - after**2) / sigma**2))
    down = math.sqrt(after**2 - up**2)
    expected = x + (down - sigma) * (x - x0) / sigma + up * s_noise * z
    got = euler_step(x, m, sigma=sigma, sigma_next=after, eta=eta, s_noise=s_noise, noise=z, prediction_type=kind)
    assert_close(got, expected)


STEPS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "ddpm": (ddpm_step, {"alpha_cumprod": 0.3, "alpha_cumprod_prev": 0.5}),
    "ddim": (ddim_step, {"alpha_cumprod": 0.3, "alpha_cumprod_prev": 0.5, "eta": 1.0}),
    "dpm": (
        lambda *a, **k: dpm_solver_step(*a, algorithm_type="sde-dpmsolver", **k)[0],
        {"alphas_cumprod": [0.3, 0.5]},
    ),
    "euler": (euler_step, {"sigma": 3.0, "sigma_next": 1.0, "eta": 1.0}),
}


@pytest.mark.parametrize("name", STEPS)
@given(seed=SEEDS, a_sample=st.booleans())
def test_guidance_in_a_step_is_guidance_before_it(name: str, seed: int, a_sample: bool) -> None:
    step, scalars = STEPS[name]
    x, m, u, z = tensors(seed, 4)
    scale = torch.tensor([0.0, 1.0, 7.5], dtype=torch.float64)[:, None, None] if a_sample else 3.0
    expected = step(x, u + scale * (m - u), noise=z, **scalars)
    given_scale = scale.flatten() if isinstance(scale, Tensor) else scale
    assert_close(step(x, m, uncond=u, guidance_scale=given_scale, noise=z, **scalars), expected)


@pytest.mark.parametrize("name", STEPS)
def test_noise_drawn_with_a_generator_is_torchs_and_reproducible(name: str) -> None:
    step, scalars = STEPS[name]
    x, m = tensors(torch.seed() % 2**32, 2, torch.float32)
    drawn = [step(x, m, generator=torch.Generator().manual_seed(s), **scalars) for s in (5, 5, 6)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    z = torch.randn(x.shape, generator=torch.Generator().manual_seed(5))
    assert torch.equal(drawn[0], step(x, m, noise=z, **scalars))


def test_a_step_may_be_taken_in_place_and_a_backend_forced() -> None:
    for name, (step, scalars) in STEPS.items():
        x, m, z = tensors(1, 3)
        expected = step(x, m, noise=z, **scalars)
        assert_close(step(x, m, noise=z, backend="reference", **scalars), expected)
        target = x.clone()
        out = (target, torch.empty_like(x)) if name == "dpm" else target
        assert torch.equal(step(target, m, noise=z, out=out, **scalars), expected)
        assert torch.equal(target, expected)


NAN = math.nan


@pytest.mark.parametrize(
    ("step", "scalars"),
    [
        (ddpm_step, {"alpha_cumprod": 0.5, "alpha_cumprod_prev": 0.5}),
        (ddpm_step, {"alpha_cumprod": 0.5, "alpha_cumprod_prev": 0.4}),
        (ddpm_step, {"alpha_cumprod": 1.0, "alpha_cumprod_prev": 1.0}),
        (ddpm_step, {"alpha_cumprod": -0.1, "alpha_cumprod_prev": 0.4}),
        (ddpm_step, {"alpha_cumprod": 0.5, "alpha_cumprod_prev": 1.1}),
        (ddpm_step, {"alpha_cumprod": NAN, "alpha_cumprod_prev": 0.5}),
        (ddpm_step, {"alpha_cumprod": 0.0, "alpha_cumprod_prev": 0.5}),  # ε says nothing of x0 at ᾱ = 0
        (ddpm_step, {"alpha_cumprod": 0.4, "alpha_cumprod_prev": 0.5, "variance_type": "small"}),
        (ddpm_step, {"alpha_cumprod": 0.4, "alpha_cumprod_prev": 0.5, "variance_type": "learned"}),
        (ddpm_step, {"alpha_cumprod": 0.4, "alpha_cumprod_prev": 0.5, "prediction_type": "noise"}),
        (ddpm_step, {"alpha_cumprod": 0.4, "alpha_cumprod_prev": 0.5, "clip_range": 0.0}),
        (ddpm_step, {"alpha_cumprod": 0.4, "alpha_cumprod_prev": 0.5, "clip_range": NAN}),
        (ddpm_step, {"alpha_cumprod": 0.4, "alpha_cumprod_prev": 0.5, "guidance_scale": 2.0}),
        (ddim_step, {"alpha_cumprod": 0.4, "alpha_cumprod_prev": 0.5, "eta": -0.1}),
        (ddim_step, {"alpha_cumprod": 0.4, "alpha_cumprod_prev": 0.5, "eta": 40.0}),
        (ddim_step, {"alpha_cumprod": 0.4, "alpha_cumprod_prev": 0.5, "eta": NAN}),
        (dpm_solver_step, {"alphas_cumprod": [0.4]}),
        (dpm_solver_step, {"alphas_cumprod": [0.4, 0.5, 0.6]}),
        (dpm_solver_step, {"alphas_cumprod": [0.1, 0.2, 0.3, 0.4, 0.5], "previous": [torch.ones(3, 2, 5)] * 3}),
        (dpm_solver_step, {"alphas_cumprod": [0.5, 0.4]}),
        (dpm_solver_step, {"alphas_cumprod": [0.4, 0.5], "algorithm_type": "dpm"}),
        (dpm_solver_step, {"alphas_cumprod": [0.4, 0.5], "solver_type": "bh2"}),
        (dpm_solver_step, {"alphas_cumprod": [0.4, 0.5], "third_order": "best"}),
        (euler_step, {"sigma": 1.0, "sigma_next": 1.0}),
        (euler_step, {"sigma": 1.0, "sigma_next": 2.0}),
        (euler_step, {"sigma": 1.0, "sigma_next": -0.5}),
        (euler_step, {"sigma": math.inf, "sigma_next": 1.0}),
        (euler_step, {"sigma": NAN, "sigma_next": 1.0}),
        (euler_step, {"sigma": 1.0, "sigma_next": NAN}),
        (euler_step, {"sigma": 1.0, "sigma_next": 0.5, "eta": -1.0}),
        (euler_step, {"sigma": 1.0, "sigma_next": 0.5, "eta": 1.0, "s_noise": NAN}),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_a_scalar_that_means_nothing_is_refused(step: Callable[..., Any], scalars: dict[str, Any]) -> None:
    x, m = tensors(0, 2, torch.float32)
    with pytest.raises(ValueError, match=r"^[\w.]+: .+, expected .+; .+|^\w+: \w+ is '.+', expected one of .+; "):
        step(x, m, **scalars)


# --- diffusers -------------------------------------------------------------------------------------------------------


def scheduler_of(name: str, **config: Any) -> Any:
    diffusers = pytest.importorskip("diffusers")
    scheduler = getattr(diffusers, name)(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, **config)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    return scheduler


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize("clip", [None, 1.0])
def test_ddpm_step_is_diffusers_own(kind: str, variance: str, clip: float | None) -> None:
    scheduler = scheduler_of(
        "DDPMScheduler",
        prediction_type=kind,
        variance_type=variance,
        clip_sample=clip is not None,
    )
    scheduler.set_timesteps(10)
    x, m = tensors(torch.seed() % 2**32, 2)
    for t, after in zip(scheduler.timesteps[:-1].tolist(), scheduler.timesteps[1:].tolist(), strict=True):
        theirs = scheduler.step(m, t, x, generator=torch.Generator().manual_seed(t)).prev_sample
        ours = ddpm_step(
            x, m, alpha_cumprod=float(scheduler.alphas_cumprod[t]), variance_type=variance, prediction_type=kind,
            alpha_cumprod_prev=float(scheduler.alphas_cumprod[after]), clip_range=clip,
            generator=torch.Generator().manual_seed(t),
        )  # fmt: skip
        assert_close(ours, theirs)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("clip", [None, 1.0])
def test_ddim_step_is_diffusers_own(kind: str, eta: float, clip: float | None) -> None:
    scheduler = scheduler_of("DDIMScheduler", prediction_type=kind, clip_sample=clip is not None)
    scheduler.set_timesteps(10)
    x, m, z = tensors(torch.seed() % 2**32, 3)
    for t, after in zip(scheduler.timesteps[:-1].tolist(), scheduler.timesteps[1:].tolist(), strict=True):
        for use_clipped in (False, True):
            theirs = scheduler.step(m, t, x, eta, use_clipped, variance_noise=z).prev_sample
            ours = ddim_step(
                x, m, alpha_cumprod=float(scheduler.alphas_cumprod[t]), eta=eta, noise=z, prediction_type=kind,
                alpha_cumprod_prev=float(scheduler.alphas_cumprod[after]), clip_range=clip,
                use_clipped_model_output=use_clipped,
            )  # fmt: skip
            assert_close(ours, theirs)


@pytest.mark.parametrize("algorithm", ["dpmsolver", "dpmsolver++", "sde-dpmsolver", "sde-dpmsolver++"])
@pytest.mark.parametrize("solver_type", ["midpoint", "heun"])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_dpm_solver_step_is_diffusers_own(algorithm: str, solver_type: str, order: int) -> None:
    if algorithm == "sde-dpmsolver" and order == 3:
        pytest.skip("diffusers has no third order of sde-dpmsolver")
    scheduler = scheduler_of(
        "DPMSolverMultistepScheduler", algorithm_type=algorithm, solver_type=solver_type, solver_order=order,
        lower_order_final=False, final_sigmas_type="sigma_min",
    )  # fmt: skip
    scheduler.set_timesteps(8)
    scheduler.sigmas = scheduler.sigmas.double()
    signal = (1 / (1 + scheduler.sigmas**2)).tolist()
    x, *models = tensors(torch.seed() % 2**32, 8, torch.float32)
    z = torch.randn(x.shape)
    previous: list[Tensor] = []
    for i, m in enumerate(models[:5]):
        theirs = scheduler.step(m, scheduler.timesteps[i], x, variance_noise=z).prev_sample
        x, kept = dpm_solver_step(
            x, m, alphas_cumprod=signal[i - len(previous) : i + 2], previous=previous, algorithm_type=algorithm,
            solver_type=solver_type, noise=z,
        )  # fmt: skip
        assert_close(x, theirs, SCHEDULER_ROUNDING * max(1.0, float(kept.abs().max()) / 30))
        previous = [*previous, kept][-(order - 1) :] if order > 1 else []


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("ancestral", [False, True])
def test_euler_step_is_diffusers_own(kind: str, ancestral: bool) -> None:
    name = "EulerAncestralDiscreteScheduler" if ancestral else "EulerDiscreteScheduler"
    scheduler = scheduler_of(name, prediction_type=kind)
    scheduler.set_timesteps(8)
    scheduler.sigmas = scheduler.sigmas.double()
    x, *models = tensors(torch.seed() % 2**32, 9, torch.float32)
    x = x * float(scheduler.sigmas[0])
    for i, m in enumerate(models):
        t = scheduler.timesteps[i]
        scheduler.scale_model_input(x, t)
        theirs = scheduler.step(m, t, x, generator=torch.Generator().manual_seed(i)).prev_sample
        x = euler_step(
            x, m, sigma=float(scheduler.sigmas[i]), sigma_next=float(scheduler.sigmas[i + 1]), prediction_type=kind,
            eta=float(ancestral), generator=torch.Generator().manual_seed(i),
        )  # fmt: skip
        assert_close(x, theirs, SCHEDULER_ROUNDING)
