# SPDX-License-Identifier: MIT
"""Whole loops: every solver, prediction type, dtype and backend against the float64 formulas."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch

from fastdiff import Stepper, ops
from fastdiff.row_layout import Variance
from fastdiff.schedules import create_noise_scheduler
from fastdiff.schedules.levels import Levels, levels_from_timesteps
from fastdiff.solvers import Prediction, PredictionType, ddim, ddpm, dpm_multistep, euler, euler_ancestral, heun
from fastdiff.solvers.table import StepTable
from support.solver_cases import ALGORITHMS
from support.solver_loops import (
    PREDICTION_TYPES,
    SOLVERS,
    UNIT_ROUNDOFF,
    Array,
    ElementModel,
    Outputs,
    Sensitivity,
    error_bound,
    evaluate,
    run_loop,
    sensitivity,
)

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
SHAPE = (2, 3, 5)
GUIDANCE = 2.5
#: Unevenly spaced, so that no coefficient vanishes by chance.
TIMESTEPS = (880, 700, 560, 390, 210, 60)

_random = np.random.default_rng(0)
SHIFT, START = _random.standard_normal(SHAPE), _random.standard_normal(SHAPE)
NOISE = [_random.standard_normal(SHAPE) for _ in range(3 * len(TIMESTEPS))]


@functools.cache
def _levels(timesteps: tuple[int, ...], *, clean: bool) -> Levels:
    alphas_cumprod = create_noise_scheduler("linear").alphas_cumprod
    return levels_from_timesteps(
        alphas_cumprod, timesteps, final_alpha_cumprod=1.0 if clean else float(alphas_cumprod[5])
    )


def _model(variance: Variance) -> ElementModel:
    """Smooth, nonlinear model without saturation; it ignores the time, which no backend uses."""

    def model(x: Array, _: float) -> Outputs:
        cond, uncond = 0.6 * np.tanh(0.9 * x + 0.3 * SHIFT) + 0.02 * x, 0.5 * np.tanh(0.8 * x - 0.2 * SHIFT)
        if variance is Variance.FIXED:
            return Outputs(cond, uncond)
        # v of learned_range lies in [-1, 1]; of learned it is the variance itself.
        v = np.tanh(x)
        return Outputs(cond, uncond, v if variance is Variance.LEARNED_RANGE else 0.5 + 0.4 * v)

    return model


@functools.cache
def _compiled(
    solver: str, kind: PredictionType, timesteps: tuple[int, ...], clean: bool
) -> tuple[StepTable, ElementModel, Sensitivity]:
    table = SOLVERS[solver](_levels(timesteps, clean=clean), Prediction(kind))
    model = _model(table.variance)
    return table, model, sensitivity(table, model, START, NOISE, guidance=GUIDANCE)


def _check(
    backends: list[str],
    solver: str,
    kind: PredictionType,
    dtype: torch.dtype,
    timesteps: tuple[int, ...] = TIMESTEPS,
    *,
    clean: bool = True,
    device: str = "cpu",
) -> None:
    table, model, found = _compiled(solver, kind, timesteps, clean)
    # What the loop is given is rounded before it starts, for both.
    start, *noise = (torch.from_numpy(a).to(dtype).double().numpy() for a in (START, *NOISE))
    expected = evaluate(table, model, start, noise, guidance=GUIDANCE)
    bound = error_bound(found, dtype)
    ends = {}
    for name in backends:
        end = run_loop(table, model, start, noise, guidance=GUIDANCE, dtype=dtype, backend=name, device=device)
        ends[name] = end
        assert np.isfinite(end).all()
        # Derived in `error_bound`: rounding by rounding, each carried to the end by the measured response.
        worst = float((np.abs(end - expected) / bound).max())
        assert worst <= 1.0, f"{name}, {dtype}, {kind.value}: {worst:.2f} bounds from the float64 formulas"
    # Two loops that each keep the bound are at most two of them apart.
    first, *others = ends.values()
    for end in others:
        assert (np.abs(end - first) <= 2.0 * bound).all()


@pytest.mark.parametrize("solver", SOLVERS)
def test_loop_cpu_and_reference_agree_with_formulas(solver: str) -> None:
    backends = ["reference"] if ops.cpu_build() is None else ["reference", "cpu"]
    for dtype in DTYPES:
        for kind in PREDICTION_TYPES:
            _check(backends, solver, kind, dtype, clean=False)
        _check(backends, solver, PredictionType.EPSILON, dtype, clean=True)


#: Every form of every method but DPM-Solver, whose 56 differ in coefficients and histories: every fifth.
INTERPRETED = [i for i, name in enumerate(SOLVERS) if "dpmsolver" not in name or i % 5 == 0]


@pytest.mark.skipif(ops.backend_status()["triton"] != "available", reason=ops.backend_status()["triton"])
@pytest.mark.parametrize("index", INTERPRETED, ids=[list(SOLVERS)[i] for i in INTERPRETED])
def test_loop_triton_agrees_with_formulas(index: int) -> None:
    # An interpreted launch costs tens of milliseconds: three steps, and types and dtypes in turn.  There are four of
    # both: the shift brings all pairs.
    kind, dtype = PREDICTION_TYPES[index % 4], DTYPES[(index + index // 4) % 4]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    _check(["reference", "triton"], list(SOLVERS)[index], kind, dtype, TIMESTEPS[::2], clean=False, device=device)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_loop_cuda_agrees_with_formulas(dtype: torch.dtype) -> None:
    if ops.backend_status()["cuda"] != "available":
        pytest.skip(ops.backend_status()["cuda"])
    for solver in SOLVERS:
        for kind in PREDICTION_TYPES:
            _check(["reference", "cuda"], solver, kind, dtype, clean=False, device="cuda")


@pytest.mark.parametrize(("dtype", "roundings"), list(zip(DTYPES, (20, 20, 300, 300), strict=True)), ids=str)
def test_loop_bound_is_tight(dtype: torch.dtype, roundings: int) -> None:
    """Check that the bound is far below the samples, a few roundings in the narrowest dtype."""
    relative = []
    for solver in SOLVERS:
        table, model, found = _compiled(solver, PredictionType.EPSILON, TIMESTEPS, False)
        end = evaluate(table, model, START, NOISE, guidance=GUIDANCE)
        relative.append(error_bound(found, dtype).max() / np.abs(end).max())
    assert np.median(relative) < roundings * UNIT_ROUNDOFF[dtype]


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("solver", ["ddim-clipped", "ddpm-fixed_small", "multistep-dpmsolver++-2-midpoint", "heun"])
def test_loop_with_clipping_agrees_with_formulas(solver: str, backend: str) -> None:
    if ops.backend_status()[backend] != "available":
        pytest.skip(ops.backend_status()[backend])
    table = SOLVERS[solver](_levels(TIMESTEPS, clean=True), Prediction(PredictionType.EPSILON, 0.7))
    model = _model(table.variance)
    found = sensitivity(table, model, START, NOISE, guidance=GUIDANCE)
    expected = evaluate(table, model, START, NOISE, guidance=GUIDANCE)
    end = run_loop(table, model, START, NOISE, guidance=GUIDANCE, dtype=torch.float64, backend=backend)
    unclipped = SOLVERS[solver](_levels(TIMESTEPS, clean=True), Prediction(PredictionType.EPSILON))
    assert np.abs(evaluate(unclipped, model, START, NOISE, guidance=GUIDANCE) - expected).max() > 0.1
    # Clamping shrinks errors; the floor of a few roundings is for elements that end clipped, with no response at all.
    assert (np.abs(end - expected) <= error_bound(found, torch.float64) + 4e-16).all()


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_loop_with_thresholding_agrees_with_formulas(backend: str) -> None:
    """Compare dynamic thresholding with numpy's quantile on one DDIM loop."""
    if ops.backend_status()[backend] != "available":
        pytest.skip(ops.backend_status()[backend])
    levels = _levels(TIMESTEPS, clean=True)
    table = ddim(levels, Prediction(PredictionType.EPSILON, thresholding=True), use_clipped_model_output=True)
    stepper = Stepper(table, dynamic_thresholding_ratio=0.9, sample_max_value=2.0, backend=backend)
    x, sample = START, torch.from_numpy(START)
    model = _model(Variance.FIXED)
    seen = []
    for i in range(len(levels)):
        t, s = levels[i], levels[i + 1]
        answer = model(sample.numpy(), 0.0)
        sample = stepper.step(sample, torch.from_numpy(answer.cond))
        x0 = (x - t.sigma * answer.cond) / t.alpha
        bound = np.clip(np.quantile(np.abs(x0).reshape(2, -1), 0.9, axis=1), 1.0, 2.0)[:, None, None]
        seen += list(bound.ravel())
        x0 = np.clip(x0, -bound, bound) / bound
        x = s.alpha * x0 + s.sigma * (x - t.alpha * x0) / t.sigma
        # One row's sums of at most 3 products of size 1, times (α_s/α_t)·(σ_s/σ_t) < 10: 1e-13 is 50 such roundings.
        np.testing.assert_allclose(sample.numpy(), x, rtol=0, atol=1e-13 * (i + 1))
    assert min(seen) < max(seen) == 2.0, "some thresholds at the bound, some below it"


def test_loops_on_one_table_have_separate_history() -> None:
    """Registers are written in place: alternating loops over one table are independent."""
    table = dpm_multistep(_levels(TIMESTEPS, clean=True), Prediction(), solver_order=3)
    model = _model(Variance.FIXED)
    steppers = [Stepper(table), Stepper(table)]
    samples = [torch.from_numpy(START.copy()), torch.from_numpy(-START)]
    for _ in range(len(table)):
        for k in range(2):
            output = torch.from_numpy(model(samples[k].numpy(), 0.0).cond)
            samples[k] = steppers[k].step(samples[k], output, out=samples[k])
    for start, sample in zip((START, -START), samples, strict=True):
        alone = run_loop(table, lambda x, t: Outputs(model(x, t).cond), start)
        # The same calls in the same order: the same bits.
        np.testing.assert_array_equal(sample.numpy(), alone)


def test_stepper_refuses_to_run_past_the_end_and_to_change_samples() -> None:
    table = dpm_multistep(_levels(TIMESTEPS[:2], clean=False), Prediction(), lower_order_final=False)
    stepper = Stepper(table)
    x = torch.zeros(2, 3)
    stepper.step(x, x)
    with pytest.raises(
        ValueError, match=r"step: .*\[2, 3\].*expected .*\[3, 3\]|step: .*\[3, 3\].*expected .*\[2, 3\]"
    ):
        stepper.step(torch.zeros(3, 3), torch.zeros(3, 3))
    assert stepper.index == 1
    with pytest.raises(ValueError, match=r"model_output has shape \[2, 4\]"):
        stepper.step(x, torch.zeros(2, 4))
    assert stepper.index == 1, "a step that failed does not count"
    stepper.step(x, x)
    assert stepper.done
    with pytest.raises(IndexError, match=r"step: index is 2, expected less than the table's 2 rows; .*new stepper"):
        stepper.step(x, x)


# ----------------------------------------------------------------------------------------------------------- diffusers


PEER_START = np.random.default_rng(4).standard_normal((1, 4))


def _diffusers(name: str, **options: object) -> object:
    schedulers = pytest.importorskip("diffusers.schedulers")
    return getattr(schedulers, name)(beta_schedule="scaled_linear", timestep_spacing="leading", **options)


#: diffusers' class, its options, our solver.  Where they mean different things, the case is left out:
#: - DDPM: fixed_large_log (the root of a logarithm there) and the noise of fixed_large on the last step (none here).
#: - Euler with linspace: σ̂ at fractional timesteps is interpolated linearly there, log σ̂ here; so "leading" throughout.
#: - Euler with churn: the noise goes in before the call there, at the end of the step before it here.
#: - "sample" with Euler-ancestral, and the third order of sde-dpmsolver: not implemented there.
#: - DPM-Solver's noise and SDE forms to σ = 0, of which diffusers itself warns: they end at σ_min in both.
#: - Zero terminal SNR: diffusers puts a small number in the place of ᾱ = 0.
PEERS: dict[str, tuple[str, dict[str, object], Callable[..., StepTable]]] = {
    "ddim": ("DDIMScheduler", {"clip_sample": False}, ddim),
    "ddim, eta, clip": ("DDIMScheduler", {"clip_sample": True}, partial(ddim, eta=0.7)),
    "ddpm": ("DDPMScheduler", {"clip_sample": False}, ddpm),
    "ddpm, clip": ("DDPMScheduler", {"clip_sample": True}, ddpm),
    "ddpm, large": (
        "DDPMScheduler",
        {"clip_sample": False, "variance_type": "fixed_large"},
        partial(ddpm, variance_type="fixed_large"),
    ),
    "euler": ("EulerDiscreteScheduler", {}, euler),
    "ancestral": ("EulerAncestralDiscreteScheduler", {}, euler_ancestral),
    "heun": ("HeunDiscreteScheduler", {}, heun),
    **{
        f"{algorithm}-{order}-{solver_type}": (
            "DPMSolverMultistepScheduler",
            {
                "algorithm_type": algorithm,
                "solver_order": order,
                "solver_type": solver_type,
                "final_sigmas_type": "zero" if algorithm.endswith("++") else "sigma_min",
            },
            partial(dpm_multistep, algorithm_type=algorithm, solver_order=order, solver_type=solver_type),
        )
        for algorithm in ALGORITHMS
        for order, solver_type in ((1, "midpoint"), (2, "midpoint"), (2, "heun"), (3, "midpoint"))
        if not (algorithm == "sde-dpmsolver" and order == 3)
    },
}


@pytest.mark.filterwarnings(
    "ignore:__array__ implementation:DeprecationWarning", "ignore:`algorithm_types:FutureWarning"
)  # diffusers'
@pytest.mark.parametrize(
    ("peer", "prediction_type"),
    [
        (peer, kind)
        for peer in PEERS
        for kind in ("epsilon", "v_prediction", "sample")
        if (peer, kind) != ("ancestral", "sample")
    ],
)
def test_loop_equals_diffusers(peer: str, prediction_type: str) -> None:
    """Compare with seven steps of diffusers' scheduler on float64 tensors, with the same timesteps, noise and model."""
    name, options, make = PEERS[peer]
    scheduler: object = _diffusers(name, prediction_type=prediction_type, **options)
    scheduler.set_timesteps(7)  # type: ignore[attr-defined]
    told = [float(t) for t in scheduler.timesteps]  # type: ignore[attr-defined]
    alphas_cumprod = scheduler.alphas_cumprod.double()  # type: ignore[attr-defined]
    ends_at = float(alphas_cumprod[0]) if options.get("final_sigmas_type") == "sigma_min" else 1.0
    levels = levels_from_timesteps(alphas_cumprod, sorted(set(told), reverse=True), final_alpha_cumprod=ends_at)
    clip = 1.0 if options.get("clip_sample") else math.inf
    table = make(levels, Prediction(PredictionType(prediction_type), clip))

    def model(x: Array, t: float) -> Outputs:
        return Outputs(np.tanh(0.8 * x + 0.001 * t) + 0.05)

    generator = torch.Generator().manual_seed(0)
    noise = [torch.randn(PEER_START.shape, generator=generator, dtype=torch.float64) for _ in told]
    arrays = [z.numpy() for z in noise]
    x_hat = "Euler" in name or "Heun" in name
    scale = 1.0 / levels[0].alpha if x_hat else 1.0
    sample = torch.from_numpy(PEER_START * scale)
    for i, t in enumerate(scheduler.timesteps):  # type: ignore[attr-defined]
        seen = scheduler.scale_model_input(sample, t).double().numpy()  # type: ignore[attr-defined]
        given: dict[str, object] = {}
        if name == "DDIMScheduler":
            given = {"eta": 0.7 if "eta" in peer else 0.0, "variance_noise": noise[i]}
        elif name == "DPMSolverMultistepScheduler":
            given = {"variance_noise": noise[i]}
        elif name in ("DDPMScheduler", "EulerAncestralDiscreteScheduler"):
            given = {"generator": generator.manual_seed(0) if i == 0 else generator}
        output = torch.from_numpy(model(seen, told[i]).cond)
        sample = scheduler.step(output, t, sample, **given).prev_sample.double()  # type: ignore[attr-defined]
    ours = evaluate(table, model, PEER_START, arrays)
    # diffusers computes its scalars, and some of its updates, in float32: no further off than a float32 loop may be.
    bound = error_bound(sensitivity(table, model, PEER_START, arrays), torch.float32)
    difference = np.abs(sample.numpy() * (levels[len(levels)].alpha if x_hat else 1.0) - ours)
    assert (difference <= bound).all(), (difference / bound).max()
