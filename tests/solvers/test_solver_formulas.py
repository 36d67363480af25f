# SPDX-License-Identifier: MIT
"""Each solver's rows against its paper's formula, written out a second time, on numbers instead of symbols."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from fastdiff.row_layout import Variance
from fastdiff.schedules.levels import Level, Levels, levels_from_half_log_snr, with_intermediate_levels
from fastdiff.solvers import (
    Churn,
    Prediction,
    PredictionType,
    ddim,
    ddpm,
    dpm_multistep,
    dpm_singlestep,
    euler,
    euler_ancestral,
    heun,
)
from fastdiff.solvers.table import StepTable
from support.loops import PREDICTION_TYPES, Array, ElementModel, Outputs, evaluate, level_of, output_for
from support.solver_cases import ALGORITHMS

#: Both sides do some tens of operations a step on numbers of size 10 at most: 20·2⁻⁵³·10·(6 steps) = 1e-13.
TOLERANCE = 1e-11
SHAPE = (4,)

_random = np.random.default_rng(3)
START, NOISE = _random.standard_normal(SHAPE), [_random.standard_normal(SHAPE) for _ in range(16)]
GRID = (-1.6, -1.1, -0.4, 0.1, 0.9, 1.5)
CLEAN = (*GRID, math.inf)


def _x0(x: Array, half_log_snr: float) -> Array:
    return np.tanh(x + 0.3 * half_log_snr)


def _epsilon(x: Array, level: Level) -> Array:
    return (x - level.alpha * _x0(x, level.timestep)) / level.sigma


def _model(kind: PredictionType = PredictionType.EPSILON, variance: Array | None = None) -> ElementModel:
    def model(x: Array, half_log_snr: float) -> Outputs:
        return Outputs(output_for(kind, level_of(half_log_snr), x, _x0(x, half_log_snr)), None, variance)

    return model


def _run(table: StepTable, **options: object) -> Array:
    return evaluate(table, _model(**options), START, NOISE)  # type: ignore[arg-type]


def _assert_close(ours: Array, theirs: Array) -> None:
    np.testing.assert_allclose(ours, theirs, rtol=TOLERANCE, atol=TOLERANCE)


# ------------------------------------------------------------------------------------------------------- DDPM and DDIM


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
@pytest.mark.parametrize(
    "variance_type", ["fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", "learned", "learned_range"]
)
@pytest.mark.parametrize("clip", [math.inf, 0.6])
def test_ddpm_is_equations_6_and_7(variance_type: str, kind: PredictionType, clip: float) -> None:
    """arXiv 2006.11239, eq. 6 and 7 in β_t and ᾱ, as diffusers writes them; 2102.09672, eq. 15 for learned_range."""
    levels = levels_from_half_log_snr(CLEAN)
    v = np.array([0.2, 0.5, 0.9, 0.01]) if variance_type == "learned" else np.array([-1.0, -0.3, 0.4, 1.0])
    x = START
    for i in range(len(levels)):
        t, s = levels[i], levels[i + 1]
        ac, ac_prev = t.alpha**2, s.alpha**2
        alpha = ac / ac_prev
        beta = 1.0 - alpha
        x0 = np.clip((x - math.sqrt(1 - ac) * _epsilon(x, t)) / math.sqrt(ac), -clip, clip)
        mean = math.sqrt(ac_prev) * beta / (1 - ac) * x0 + math.sqrt(alpha) * (1 - ac_prev) / (1 - ac) * x
        small = max((1 - ac_prev) / (1 - ac) * beta, 1e-20)
        variance = {
            "fixed_small": small,
            "fixed_small_log": math.exp(math.log(small)),
            "fixed_large": beta,
            # diffusers takes the root of log β here, which is no variance; what it means is β.
            "fixed_large_log": math.exp(math.log(beta)),
            "learned": v,
            "learned_range": np.exp((v + 1) / 2 * math.log(beta) + (1 - v) / 2 * math.log(small)),
        }[variance_type]
        x = mean + (np.sqrt(variance) * NOISE[i] if i + 1 < len(levels) else 0.0)
    table = ddpm(levels, Prediction(kind, clip), variance_type=variance_type)
    learned = variance_type.startswith("learned")
    assert (table.variance is not Variance.FIXED) == learned
    _assert_close(_run(table, kind=kind, variance=v if learned else None), x)


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
@pytest.mark.parametrize("use_clipped", [False, True])
@pytest.mark.parametrize(("eta", "clip"), [(0.0, math.inf), (0.4, math.inf), (1.0, 0.6), (0.4, 0.6), (0.0, 0.6)])
def test_ddim_is_equations_12_and_16(eta: float, clip: float, use_clipped: bool, kind: PredictionType) -> None:
    """arXiv 2010.02502: x0 of eq. 9, σ of eq. 16, the update of eq. 12, with diffusers' use_clipped_model_output."""
    levels = levels_from_half_log_snr(CLEAN)
    x = START
    for i in range(len(levels)):
        ac, ac_prev = levels[i].alpha ** 2, levels[i + 1].alpha ** 2
        epsilon = _epsilon(x, levels[i])
        x0 = np.clip((x - math.sqrt(1 - ac) * epsilon) / math.sqrt(ac), -clip, clip)
        sigma = eta * math.sqrt((1 - ac_prev) / (1 - ac)) * math.sqrt(1 - ac / ac_prev)
        if use_clipped:
            epsilon = (x - math.sqrt(ac) * x0) / math.sqrt(1 - ac)
        x = math.sqrt(ac_prev) * x0 + math.sqrt(1 - ac_prev - sigma**2) * epsilon + sigma * NOISE[i]
    table = ddim(levels, Prediction(kind, clip), eta=eta, use_clipped_model_output=use_clipped)
    _assert_close(_run(table, kind=kind), x)


def test_ddim_refuses_an_eta_that_leaves_no_direction() -> None:
    levels = levels_from_half_log_snr(CLEAN)
    with pytest.raises(
        ValueError, match=r"ddim: eta is 3.0, which asks for more noise .*expected at most 1 .*; lower eta"
    ):
        ddim(levels, Prediction(), eta=3.0)
    for eta in (-0.1, math.nan, math.inf):
        with pytest.raises(ValueError, match=r"ddim: eta is .*expected a number of 0 or more; use 0"):
            ddim(levels, Prediction(), eta=eta)


# ---------------------------------------------------------------------------------------------------------- DPM-Solver


def _first_order(algorithm: str, x: Array, d: Array, s: Level, t: Level, z: Array) -> Array:
    """From s to t given x0 or ε at s: DPM-Solver eq. 3.7, ++ eq. 13, SDE eq. 18 of 2211.01095 and of its appendix."""
    h = t.half_log_snr - s.half_log_snr
    if algorithm == "dpmsolver":
        return t.alpha / s.alpha * x - t.sigma * (math.exp(h) - 1) * d
    if algorithm == "dpmsolver++":
        return t.sigma / s.sigma * x - t.alpha * (math.exp(-h) - 1) * d
    if algorithm == "sde-dpmsolver":
        return (
            t.alpha / s.alpha * x - 2 * t.sigma * (math.exp(h) - 1) * d + t.sigma * math.sqrt(math.exp(2 * h) - 1) * z
        )
    decay = t.sigma / s.sigma * math.exp(-h)
    return decay * x + t.alpha * (1 - math.exp(-2 * h)) * d + t.sigma * math.sqrt(1 - math.exp(-2 * h)) * z


def _weights(algorithm: str, h: float, t: Level) -> tuple[float, float, float]:
    """What D1 is multiplied by (midpoint, heun) and D2, on top of the first-order step: diffusers' coefficients."""
    e = math.exp(h)
    if algorithm == "dpmsolver":
        heun_weight = -t.sigma * ((e - 1) / h - 1)
        return -0.5 * t.sigma * (e - 1), heun_weight, -t.sigma * ((e - 1 - h) / h**2 - 0.5)
    if algorithm == "dpmsolver++":
        return -0.5 * t.alpha * (1 / e - 1), t.alpha * ((1 / e - 1) / h + 1), -t.alpha * ((1 / e - 1 + h) / h**2 - 0.5)
    if algorithm == "sde-dpmsolver":
        # No library has the third order of the noise SDE: twice the ODE's, as its orders 1 and 2 are.
        heun_weight = -2 * t.sigma * ((e - 1) / h - 1)
        return -t.sigma * (e - 1), heun_weight, -2 * t.sigma * ((e - 1 - h) / h**2 - 0.5)
    e2 = math.exp(-2 * h)
    heun_weight = t.alpha * ((1 - e2) / (-2 * h) + 1)
    return 0.5 * t.alpha * (1 - e2), heun_weight, t.alpha * ((1 - e2 - 2 * h) / (2 * h) ** 2 - 0.5)


def _read(algorithm: str, x: Array, level: Level) -> Array:
    return _x0(x, level.timestep) if algorithm.endswith("++") else _epsilon(x, level)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("solver_type", ["midpoint", "heun"])
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize(("final", "euler_at_final"), [(True, False), (False, False), (False, True)])
def test_dpm_multistep_is_algorithm_2(
    algorithm: str, solver_type: str, order: int, final: bool, euler_at_final: bool
) -> None:
    """arXiv 2211.01095, algorithm 2 and the SDE forms of its appendix, with diffusers' third order."""
    levels = levels_from_half_log_snr(GRID if euler_at_final else CLEAN)
    n, x, past = len(levels), START, []
    for i in range(n):
        s, t = levels[i], levels[i + 1]
        d = _read(algorithm, x, s)
        past = [*past, d][-3:]
        now = min(order, i + 1, n - i if final else 3)
        if t.sigma == 0.0:
            # The limit h → ∞ is the predicted clean sample.
            x = _x0(x, s.timestep)
            continue
        h = t.half_log_snr - s.half_log_snr
        x = _first_order(algorithm, x, d, s, t, NOISE[i])
        if now == 1 or (euler_at_final and i == n - 1):
            continue
        r0 = (s.half_log_snr - levels[i - 1].half_log_snr) / h
        d1_0 = (past[-1] - past[-2]) / r0
        midpoint, heun_weight, second = _weights(algorithm, h, t)
        if now == 2:
            x = x + (midpoint if solver_type == "midpoint" else heun_weight) * d1_0
            continue
        r1 = (levels[i - 1].half_log_snr - levels[i - 2].half_log_snr) / h
        d1_1 = (past[-2] - past[-3]) / r1
        d1 = d1_0 + r0 / (r0 + r1) * (d1_0 - d1_1)
        x = x + heun_weight * d1 + second * (d1_0 - d1_1) / (r0 + r1)
    table = dpm_multistep(
        levels,
        Prediction(),
        algorithm_type=algorithm,
        solver_order=order,
        solver_type=solver_type,
        lower_order_final=final,
        euler_at_final=euler_at_final,
    )
    _assert_close(_run(table), x)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_dpm_multistep_exact_third_order_interpolates_a_parabola(algorithm: str) -> None:
    """The exact form integrates e^(±λ) times the parabola through the last three outputs: checked by quadrature."""
    integrate = pytest.importorskip("scipy.integrate")
    levels = levels_from_half_log_snr(GRID[:4])
    table = dpm_multistep(
        levels, Prediction(), algorithm_type=algorithm, solver_order=3, lower_order_final=False, third_order="exact"
    )
    data, factor = algorithm.endswith("++"), 2.0 if algorithm.startswith("sde") else 1.0
    row, s, t = table.source[2], levels[2], levels[3]
    for node in range(3):
        # The Lagrange polynomial that is 1 at this node: its integral is what the output there is multiplied by.
        others = [GRID[k] for k in range(3) if k != node]

        def integrand(u: float, node: int = node, others: list[float] = others) -> float:
            value = math.prod((u - other) / (GRID[node] - other) for other in others)
            growth = math.exp(factor * (u - t.half_log_snr)) if data else math.exp(t.half_log_snr - u)
            return value * growth

        integral, _ = integrate.quad(integrand, s.half_log_snr, t.half_log_snr, epsabs=1e-13, epsrel=1e-13)
        weight = factor * (t.alpha if data else -t.sigma) * integral
        columns = row.prev_sample.coefficients
        # Of the current output: x0 = (x − σ·m)/α in the data forms, m itself in the others.
        found = columns[1] * (-s.alpha / s.sigma if data else 1.0) if node == 2 else columns[3 + node]
        assert found == pytest.approx(weight, rel=1e-10)


@pytest.mark.parametrize("algorithm", ["dpmsolver", "dpmsolver++"])
@pytest.mark.parametrize("r1", [0.5, 0.3])
def test_dpm_singlestep_second_order_is_algorithm_1(algorithm: str, r1: float) -> None:
    """arXiv 2206.00927, algorithm 4 (its algorithm 1 at r = 1/2), and 2211.01095, algorithm 1, in the papers' terms."""
    coarse = levels_from_half_log_snr(GRID)
    x = START
    for s, t in zip(coarse.points[:-1], coarse.points[1:], strict=True):
        h = t.half_log_snr - s.half_log_snr
        mid = level_of(s.half_log_snr + r1 * h)
        d = _read(algorithm, x, s)
        u = _first_order(algorithm, x, d, s, mid, START)
        gap = _read(algorithm, u, mid) - d
        scale = -t.sigma * (math.exp(h) - 1) if algorithm == "dpmsolver" else -t.alpha * (math.exp(-h) - 1)
        x = _first_order(algorithm, x, d, s, t, START) + scale / (2 * r1) * gap
    levels = with_intermediate_levels(coarse, [r1])
    table = dpm_singlestep(levels, Prediction(), algorithm_type=algorithm, solver_order=2)
    _assert_close(_run(table), x)


@pytest.mark.parametrize(("r1", "r2"), [(1 / 3, 2 / 3), (0.25, 0.6)])
def test_dpm_singlestep_third_order_is_algorithm_2(r1: float, r2: float) -> None:
    """arXiv 2206.00927, algorithm 5 (its algorithm 2 at r = 1/3, 2/3), in the paper's terms."""
    coarse = levels_from_half_log_snr(GRID)
    x = START
    for s, t in zip(coarse.points[:-1], coarse.points[1:], strict=True):
        h = t.half_log_snr - s.half_log_snr
        l1, l2 = level_of(s.half_log_snr + r1 * h), level_of(s.half_log_snr + r2 * h)
        e0 = _epsilon(x, s)
        u1 = l1.alpha / s.alpha * x - l1.sigma * math.expm1(r1 * h) * e0
        d1 = _epsilon(u1, l1) - e0
        u2 = l2.alpha / s.alpha * x - l2.sigma * math.expm1(r2 * h) * e0
        u2 = u2 - l2.sigma * r2 / r1 * (math.expm1(r2 * h) / (r2 * h) - 1) * d1
        d2 = _epsilon(u2, l2) - e0
        x = t.alpha / s.alpha * x - t.sigma * math.expm1(h) * e0 - t.sigma / r2 * (math.expm1(h) / h - 1) * d2
    levels = with_intermediate_levels(coarse, [r1, r2])
    table = dpm_singlestep(levels, Prediction(), algorithm_type="dpmsolver", solver_order=3)
    _assert_close(_run(table), x)


# ------------------------------------------------------------------------------------------- Euler, Heun and ancestral


def _edm(levels: Levels, churn: Churn, *, second_order: bool) -> Array:
    """Algorithm 2 of arXiv 2206.00364 in its own terms, x̂ = x/α and D = x0, with α·x̂ where it ends."""
    sigmas = [level.noise_ratio for level in levels.points]
    n = len(levels)

    def denoise(x_hat: Array, sigma: float) -> Array:
        level = level_of(-math.log(sigma))
        return _x0(level.alpha * x_hat, level.timestep)

    rows = 0
    raised_first = min(churn.s_churn / n, math.sqrt(2) - 1) if churn.s_tmin <= sigmas[0] <= churn.s_tmax else 0.0
    # The first churn is part of the initial noise: the loop begins at the raised level.
    x_hat = START / level_of(-math.log(sigmas[0] * (1 + raised_first))).alpha
    for i in range(n):
        gamma = min(churn.s_churn / n, math.sqrt(2) - 1) if churn.s_tmin <= sigmas[i] <= churn.s_tmax else 0.0
        raised = sigmas[i] * (1 + gamma)
        if i > 0:
            x_hat = x_hat + math.sqrt(raised**2 - sigmas[i] ** 2) * churn.s_noise * NOISE[rows - 1]
        slope = (x_hat - denoise(x_hat, raised)) / raised
        following = x_hat + (sigmas[i + 1] - raised) * slope
        rows += 1
        if second_order and sigmas[i + 1] != 0.0:
            other = (following - denoise(following, sigmas[i + 1])) / sigmas[i + 1]
            following = x_hat + (sigmas[i + 1] - raised) * (0.5 * slope + 0.5 * other)
            rows += 1
        x_hat = following
    return levels[n].alpha * x_hat


CHURNS = [Churn(), Churn(1.2, 0.3, 3.0, 1.02), Churn(30.0, 0.0, math.inf, 1.0), Churn(2.0)]


@pytest.mark.parametrize("churn", CHURNS, ids=lambda churn: f"churn-{churn.s_churn}")
@pytest.mark.parametrize("clean", [True, False])
@pytest.mark.parametrize(("make", "second_order"), [(euler, False), (heun, True)])
def test_edm_solvers_are_algorithm_2(
    make: Callable[..., StepTable], second_order: bool, churn: Churn, clean: bool
) -> None:
    levels = levels_from_half_log_snr(CLEAN if clean else GRID)
    table = make(levels, Prediction(), churn=churn)
    _assert_close(_run(table), _edm(levels, churn, second_order=second_order))


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
@pytest.mark.parametrize(("eta", "s_noise"), [(0.0, 1.0), (0.5, 1.0), (1.0, 1.03), (1.6, 1.0)])
def test_euler_ancestral_is_k_diffusions(eta: float, s_noise: float, kind: PredictionType) -> None:
    """get_ancestral_step and sample_euler_ancestral of k-diffusion, on x̂ = x/α."""
    levels = levels_from_half_log_snr(CLEAN)
    x_hat = START / levels[0].alpha
    for i in range(len(levels)):
        now, following = levels[i].noise_ratio, levels[i + 1].noise_ratio
        up = min(following, eta * (following**2 * (now**2 - following**2) / now**2) ** 0.5)
        down = (following**2 - up**2) ** 0.5
        slope = (x_hat - _x0(levels[i].alpha * x_hat, levels[i].timestep)) / now
        x_hat = x_hat + slope * (down - now) + NOISE[i] * s_noise * up
    table = euler_ancestral(levels, Prediction(kind), eta=eta, s_noise=s_noise)
    _assert_close(_run(table, kind=kind), x_hat)
