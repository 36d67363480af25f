# SPDX-License-Identifier: MIT
"""Loops that k-diffusion does not have, against the formulas of their papers, written here in float64."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastdiff import loops
from support.loop_cases import SIGMAS, LevelNoise, mixture, start, uncond_mixture
from support.seeds import TEST_SEED

SHAPE = (2, 2, 3, 3)
#: Both sides compute in float64, in another order: rounding errors of 1e-16 of numbers up to 60, with slopes up to 1e3.
TOLERANCE = 1e-10
LEVELS: list[float] = SIGMAS.double().tolist()


def denoise(x: Tensor, sigma: float) -> Tensor:
    return mixture(x, torch.full((len(x),), sigma, dtype=torch.float64))


def unguided(x: Tensor, sigma: float) -> Tensor:
    return uncond_mixture(x, torch.full((len(x),), sigma, dtype=torch.float64))


def both(x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    return mixture(x, sigma), uncond_mixture(x, sigma)


def split(sigma: float, sigma_next: float, eta: float) -> tuple[float, float]:
    up = min(sigma_next, eta * (sigma_next**2 * (sigma**2 - sigma_next**2) / sigma**2) ** 0.5)
    return (sigma_next**2 - up**2) ** 0.5, up


def pairs(levels: list[float]) -> list[tuple[int, float, float]]:
    return [(i, a, b) for i, (a, b) in enumerate(itertools.pairwise(levels))]


Reference = Callable[[Tensor, list[float], LevelNoise], Tensor]


def ddim(eta: float) -> Reference:
    def run(x: Tensor, levels: list[float], z: LevelNoise) -> Tensor:
        """Eq. 12 and 16 on x/√(1 + σ²), with ᾱ = 1/(1 + σ²)."""
        for _, a, b in pairs(levels):
            bar, bar_next = 1 / (1 + a**2), 1 / (1 + b**2)
            x0, y = denoise(x, a), x * bar**0.5
            noise = (y - bar**0.5 * x0) / (1 - bar) ** 0.5
            std = eta * ((1 - bar_next) / (1 - bar)) ** 0.5 * (1 - bar / bar_next) ** 0.5
            y = bar_next**0.5 * x0 + (max(1 - bar_next - std**2, 0.0)) ** 0.5 * noise
            if std:
                y = y + std * z(a, b)
            x = y / bar_next**0.5
        return x

    return run


def ddpm(x: Tensor, levels: list[float], z: LevelNoise) -> Tensor:
    """Eq. 6 and 7 on x/√(1 + σ²)."""
    for _, a, b in pairs(levels):
        bar, bar_next = 1 / (1 + a**2), 1 / (1 + b**2)
        beta = 1 - bar / bar_next
        y = bar_next**0.5 * beta / (1 - bar) * denoise(x, a)
        y = y + (1 - beta) ** 0.5 * (1 - bar_next) / (1 - bar) * x * bar**0.5
        if b:
            y = y + (beta * (1 - bar_next) / (1 - bar)) ** 0.5 * z(a, b)
        x = y / bar_next**0.5
    return x


def heunpp2(x: Tensor, levels: list[float], z: LevelNoise) -> Tensor:
    n = len(levels) - 1
    for i, a, b in pairs(levels):
        d = (x - denoise(x, a)) / a
        if i == n - 1:
            x = x + (b - a) * d
            continue
        second = x + (b - a) * d
        d2 = (second - denoise(second, b)) / b
        if i == n - 2:
            w2 = b / (2 * levels[0])
            x = x + (b - a) * ((1 - w2) * d + w2 * d2)
            continue
        c = levels[i + 2]
        third = second + (c - b) * d2
        d3 = (third - denoise(third, c)) / c
        w2, w3 = b / (3 * levels[0]), c / (3 * levels[0])
        x = x + (b - a) * ((1 - w2 - w3) * d + w2 * d2 + w3 * d3)
    return x


def heun_steps(x: Tensor, steps: list[tuple[float, float]], z: LevelNoise) -> Tensor:
    level = steps[0][0]
    for a, b in steps:
        if a > level:
            x = x + (a**2 - level**2) ** 0.5 * z(level, a)
        d = (x - denoise(x, a)) / a
        end = x + (b - a) * d
        x = end if b == 0 else x + (b - a) * 0.5 * (d + (end - denoise(end, b)) / b)
        level = b
    return x


def ipndm_v(x: Tensor, levels: list[float], z: LevelNoise) -> Tensor:
    slopes: list[tuple[float, Tensor]] = []
    for _, a, b in pairs(levels):
        x0 = denoise(x, a)
        slopes = [*slopes[-3:], (a, (x - x0) / a)]
        if b == 0:
            return x0
        times = np.array([time for time, _ in slopes])
        for j, (time, slope) in enumerate(slopes):
            others = np.delete(times, j)
            antiderivative = np.polyint(np.atleast_1d(np.poly(others)) / np.prod(time - others))
            x = x + float(np.polyval(antiderivative, b) - np.polyval(antiderivative, a)) * slope
    return x


def gradient_estimation(gamma: float, cfg_pp: bool = False) -> Reference:
    def run(x: Tensor, levels: list[float], z: LevelNoise) -> Tensor:
        last = None
        for _, a, b in pairs(levels):
            x0 = denoise(x, a)
            d = (x - (unguided(x, a) if cfg_pp else x0)) / a
            if b == 0:
                return x0
            x = x0 + b * d
            if last is not None:
                x = x + (b - a) * (gamma - 1) * (d - last)
            last = d
        return x

    return run


def res_multistep(eta: float, s_noise: float = 1.0, cfg_pp: bool = False) -> Reference:
    def run(x: Tensor, levels: list[float], z: LevelNoise) -> Tensor:
        last, last_down = None, 0.0
        for i, a, b in pairs(levels):
            x0 = denoise(x, a)
            base = unguided(x, a) if cfg_pp else x0
            down, up = split(a, b, eta)
            if down == 0 or last is None:
                x = x0 + down * (x - base) / a
            else:
                h = math.log(a / down)
                c2 = (-math.log(levels[i - 1]) + math.log(last_down)) / h
                one = (1 - math.exp(-h)) / h
                two = (1 - one) / h
                if cfg_pp:
                    x = x + x0 - base
                x = math.exp(-h) * x + h * ((one - two / c2) * base + two / c2 * last)
            if b and up:
                x = x + s_noise * up * z(a, b)
            last, last_down = base, down
        return x

    return run


def exponential_rk(
    nodes: list[float], weights: Callable[[float], list[list[float]]], eta: float, s_noise: float = 1.0
) -> Reference:
    """The weights are of h'·x0; the noise is one process with a fresh part for each stage."""

    def run(x: Tensor, levels: list[float], z: LevelNoise) -> Tensor:
        for _, a, b in pairs(levels):
            if b == 0:
                return denoise(x, a)
            h = math.log(a / b)
            outputs, current, level = [], x, a
            process, last = torch.zeros_like(x), 0.0
            for c, row in zip([*nodes, 1.0], weights(h * (1 + eta)), strict=True):
                outputs.append(denoise(current, level))
                target = a * (b / a) ** c if c < 1 else b
                current = target / a * math.exp(-c * h * eta) * x
                for weight, output in zip(row, outputs, strict=True):
                    current = current + h * (1 + eta) * weight * output
                if eta:
                    process = process * math.exp(-(c - last) * h * eta)
                    if c > last:
                        process = process + (1 - math.exp(-2 * (c - last) * h * eta)) ** 0.5 * z(level, target)
                    current = current + s_noise * target * process
                level, last = target, c
            x = current
        return x

    return run


def phi(k: int, z: float) -> float:
    return math.expm1(z) / z if k == 1 else (phi(1, z) - 1) / z


def seeds_2(r: float, kind: str, eta: float, s_noise: float = 1.0) -> Reference:
    def weights(h: float) -> list[list[float]]:
        b2 = phi(1, -h) / (2 * r) if kind == "phi_1" else phi(2, -h) / r
        return [[r * phi(1, -r * h)], [phi(1, -h) - b2, b2]]

    return exponential_rk([r], weights, eta, s_noise)


def seeds_3(r1: float, r2: float, eta: float) -> Reference:
    def weights(h: float) -> list[list[float]]:
        a32, b3 = r2**2 / r1 * phi(2, -r2 * h), phi(2, -h) / r2
        return [[r1 * phi(1, -r1 * h)], [r2 * phi(1, -r2 * h) - a32, a32], [phi(1, -h) - b3, 0.0, b3]]

    return exponential_rk([r1, r2], weights, eta)


def res_3s(c2: float, c3: float, eta: float) -> Reference:
    def weights(h: float) -> list[list[float]]:
        gamma = (3 * c3**2 - 2 * c3) / (c2 * (2 - 3 * c2))
        a32 = gamma * c2 * phi(2, -c2 * h) + c3**2 / c2 * phi(2, -c3 * h)
        b3 = phi(2, -h) / (gamma * c2 + c3)
        b2 = gamma * b3
        return [[c2 * phi(1, -c2 * h)], [c3 * phi(1, -c3 * h) - a32, a32], [phi(1, -h) - b2 - b3, b2, b3]]

    return exponential_rk([c2, c3], weights, eta)


def er_sde(stages: int, s_noise: float = 1.0) -> Reference:
    integrate = pytest.importorskip("scipy.integrate")

    def scaler(level: float) -> float:
        return level * (math.exp(level**0.3) + 10)

    def run(x: Tensor, levels: list[float], z: LevelNoise) -> Tensor:
        outputs: list[Tensor] = []
        slopes: list[Tensor | None] = []
        for i, a, b in pairs(levels):
            x0 = denoise(x, a)
            outputs.append(x0)
            if b == 0:
                return x0
            ratio, step = scaler(b) / scaler(a), b - a
            x = ratio * x + (1 - ratio) * x0
            slope = (x0 - outputs[i - 1]) / (a - levels[i - 1]) if i else None
            if i >= 1 and stages >= 2:
                first = integrate.quad(lambda t: 1 / scaler(t), b, a, epsabs=1e-14, epsrel=1e-13)[0]
                x = x + (step + scaler(b) * first) * slope
            if i >= 2 and stages >= 3:
                second = integrate.quad(lambda t, a=a: (t - a) / scaler(t), b, a, epsabs=1e-14, epsrel=1e-13)[0]
                bend = (slope - slopes[i - 1]) / ((a - levels[i - 2]) / 2)
                x = x + (step**2 / 2 + scaler(b) * second) * bend
            slopes.append(slope)
            x = x + s_noise * max(b**2 - a**2 * ratio**2, 0.0) ** 0.5 * z(a, b)
        return x

    return run


def euler_ancestral_cfg_pp(eta: float) -> Reference:
    def run(x: Tensor, levels: list[float], z: LevelNoise) -> Tensor:
        for _, a, b in pairs(levels):
            down, up = split(a, b, eta)
            x = denoise(x, a) + down * (x - unguided(x, a)) / a
            if up:
                x = x + up * z(a, b)
        return x

    return run


def dpmpp_2m_cfg_pp(x: Tensor, levels: list[float], z: LevelNoise) -> Tensor:
    last, last_h = None, 0.0
    for _, a, b in pairs(levels):
        x0, u = denoise(x, a), unguided(x, a)
        h = math.log(a / b) if b else math.inf
        e = math.exp(-h)
        change = -e * u
        if last is not None and b:
            change = change + (1 - e) / (2 * last_h / h) * (x0 - last)
        x = x0 + change + e * x
        last, last_h = u, h
    return x


def dpmpp_2s_ancestral_cfg_pp(eta: float) -> Reference:
    def run(x: Tensor, levels: list[float], z: LevelNoise) -> Tensor:
        for _, a, b in pairs(levels):
            x0, u = denoise(x, a), unguided(x, a)
            down, up = split(a, b, eta)
            if down == 0:
                x = x0
            else:
                middle = (a * down) ** 0.5
                inner = middle / a * (x + x0 - u) + (1 - middle / a) * x0
                x = down / a * (x + x0 - unguided(inner, middle)) + (1 - down / a) * denoise(inner, middle)
            if up:
                x = x + up * z(a, b)
        return x

    return run


def lcm(x: Tensor, levels: list[float], z: LevelNoise) -> Tensor:
    for _, a, b in pairs(levels):
        x = denoise(x, a)
        if b:
            x = x + b * z(a, b)
    return x


def tcd(gamma: float) -> Reference:
    """On x/√(1 + σ²), with the times of a continuous schedule: σ = tan(t·π/2)."""

    def run(x: Tensor, levels: list[float], z: LevelNoise) -> Tensor:
        for _, a, b in pairs(levels):
            if b == 0:
                return denoise(x, a)
            below = math.tan((1 - gamma) * math.atan(b))
            alpha, alpha_below = 1 / math.hypot(1, b), 1 / math.hypot(1, below)
            x0 = denoise(x, a)
            y = alpha_below * (x0 + below * (x - x0) / a)
            y = alpha / alpha_below * y + (1 - (alpha / alpha_below) ** 2) ** 0.5 * z(a, b)
            x = y / alpha
        return x

    return run


def ipndm(x: Tensor, levels: list[float], z: LevelNoise) -> Tensor:
    weights = [[1], [3 / 2, -1 / 2], [23 / 12, -16 / 12, 5 / 12], [55 / 24, -59 / 24, 37 / 24, -9 / 24]]
    slopes: list[Tensor] = []
    for _, a, b in pairs(levels):
        slopes = [(x - denoise(x, a)) / a, *slopes[:3]]
        x = x + (b - a) * sum(w * slope for w, slope in zip(weights[len(slopes) - 1], slopes, strict=True))
    return x


def deis(x: Tensor, levels: list[float], z: LevelNoise) -> Tensor:
    """∫ ε dσ with ε the polynomial in log σ through its last three values."""
    integrate = pytest.importorskip("scipy.integrate")
    slopes: list[tuple[float, Tensor]] = []
    for _, a, b in pairs(levels):
        x0 = denoise(x, a)
        slopes = [*slopes[-2:], (math.log(a), (x - x0) / a)]
        if b == 0:
            return x0
        for j, (node, slope) in enumerate(slopes):
            others = [other for k, (other, _) in enumerate(slopes) if k != j]

            def basis(sigma: float, node: float = node, others: list[float] = others) -> float:
                return math.prod((math.log(sigma) - other) / (node - other) for other in others)

            x = x + integrate.quad(basis, a, b, epsabs=1e-14, epsrel=1e-13)[0] * slope
    return x


Case = tuple[str, dict[str, Any], Reference]
CASES: list[Case] = [
    ("ddim", {}, ddim(0.0)),
    ("ddim", {"eta": 0.7}, ddim(0.7)),
    ("ddpm", {}, ddpm),
    ("heunpp2", {}, heunpp2),
    ("ipndm_v", {}, ipndm_v),
    ("ipndm", {}, ipndm),
    ("deis", {}, deis),
    ("lcm", {}, lcm),
    ("tcd", {"schedule": loops.ContinuousVDenoiser(None)}, tcd(0.3)),
    ("tcd", {"schedule": loops.ContinuousVDenoiser(None), "eta": 0.8}, tcd(0.8)),
    ("sa_solver", {"predictor_order": 1, "corrector_order": 0}, ddim(1.0)),
    ("gradient_estimation", {}, gradient_estimation(2.0)),
    ("gradient_estimation", {"ge_gamma": 1.5}, gradient_estimation(1.5)),
    ("res_multistep", {}, res_multistep(0.0)),
    ("res_multistep_ancestral", {}, res_multistep(1.0)),
    ("res_multistep_ancestral", {"eta": 0.5, "s_noise": 1.2}, res_multistep(0.5, 1.2)),
    ("res_2s", {}, seeds_2(0.5, "phi_2", 0.0)),
    ("res_2s", {"c2": 0.8, "eta": 0.5}, seeds_2(0.8, "phi_2", 0.5)),
    ("res_3s", {}, res_3s(0.5, 1.0, 0.0)),
    ("res_3s", {"c2": 0.4, "c3": 0.9, "eta": 0.5}, res_3s(0.4, 0.9, 0.5)),
    ("seeds_2", {}, seeds_2(0.5, "phi_1", 1.0)),
    ("seeds_2", {"eta": 0.6, "s_noise": 0.9, "r": 0.7, "solver_type": "phi_2"}, seeds_2(0.7, "phi_2", 0.6, 0.9)),
    ("seeds_3", {}, seeds_3(1 / 3, 2 / 3, 1.0)),
    ("exp_heun_2_x0", {}, seeds_2(1.0, "phi_2", 0.0)),
    ("exp_heun_2_x0_sde", {}, seeds_2(1.0, "phi_2", 1.0)),
    ("er_sde", {}, er_sde(3)),
    ("er_sde", {"max_stage": 2, "s_noise": 0.8}, er_sde(2, 0.8)),
    ("euler_cfg_pp", {}, euler_ancestral_cfg_pp(0.0)),
    ("euler_ancestral_cfg_pp", {}, euler_ancestral_cfg_pp(1.0)),
    ("dpmpp_2m_cfg_pp", {}, dpmpp_2m_cfg_pp),
    ("dpmpp_2s_ancestral_cfg_pp", {}, dpmpp_2s_ancestral_cfg_pp(1.0)),
    ("dpmpp_2s_ancestral_cfg_pp", {"eta": 0.4}, dpmpp_2s_ancestral_cfg_pp(0.4)),
    ("res_multistep_cfg_pp", {}, res_multistep(0.0, cfg_pp=True)),
    ("res_multistep_ancestral_cfg_pp", {}, res_multistep(1.0, cfg_pp=True)),
    ("gradient_estimation_cfg_pp", {}, gradient_estimation(2.0, cfg_pp=True)),
]
STOCHASTIC = ("ancestral", "seeds", "sde", "ddpm", "ddim", "res_2s", "res_3s", "lcm", "tcd", "sa_solver")


@pytest.mark.parametrize(
    ("name", "options", "reference"), CASES, ids=lambda value: "" if callable(value) else str(value)[:40]
)
def test_loop_equals_formula(name: str, options: dict[str, Any], reference: Reference) -> None:
    x = start(TEST_SEED, SHAPE, torch.float64)
    model = both if name.endswith("cfg_pp") else mixture
    mine, theirs = (LevelNoise(TEST_SEED, SHAPE, torch.float64) for _ in range(2))
    noise = {"noise_sampler": mine} if any(word in name for word in STOCHASTIC) else {}
    got = getattr(loops, f"sample_{name}")(model, x, LEVELS, disable=True, **noise, **options)
    torch.testing.assert_close(got, reference(x, LEVELS, theirs), rtol=TOLERANCE, atol=TOLERANCE)
    assert [pytest.approx(call) for call in mine.calls] == theirs.calls


def test_restart_equals_heun_steps() -> None:
    """Given restarts, and the default ones of 20 and of 40 steps."""
    x = start(TEST_SEED, SHAPE, torch.float64)

    def karras(n: int, low: float, high: float) -> list[float]:
        return [(high ** (1 / 7) + i / (n - 1) * (low ** (1 / 7) - high ** (1 / 7))) ** 7 for i in range(n)]

    def expect(levels: list[float], low: int, high: int, walk: int, times: int) -> list[tuple[float, float]]:
        steps = [(a, b) for _, a, b in pairs(levels)]
        down = karras(walk, levels[low], levels[high])
        return steps[:low] + [(a, b) for _, a, b in pairs(down)] * times + steps[low:]

    def nearest(levels: list[float], wanted: float) -> int:
        return int(np.argmin([abs(level - wanted) for level in levels]))

    cases: list[tuple[list[float], dict[str, Any], list[tuple[float, float]]]] = [
        (LEVELS, {"restart_list": {0.2: [4, 2, 1.5]}}, expect(LEVELS, 7, 4, 4, 2)),
        (LEVELS, {"restart_list": {}}, [(a, b) for _, a, b in pairs(LEVELS)]),
    ]
    for n, walk, times in ((20, 9, 1), (40, 10, 2)):
        given = [*karras(n, 0.03, 14.6), 0.0]
        levels = [*karras(n - walk * times, given[-2], given[0]), 0.0]
        steps = expect(levels, nearest(levels, 0.1), nearest(levels, 2.0), walk + 1, times)
        assert len(steps) == n
        cases.append((given, {}, steps))
    for levels, options, steps in cases:
        mine, theirs = (LevelNoise(TEST_SEED, SHAPE, torch.float64) for _ in range(2))
        got = loops.sample_restart(mixture, x, levels, disable=True, noise_sampler=mine, **options)
        torch.testing.assert_close(got, heun_steps(x, steps, theirs), rtol=1e-9, atol=1e-9)


def test_churn_of_heunpp2_is_noise_before_each_step() -> None:
    """The same loop by steps of one: each is raised by √(σ̂² − σ²)·z first."""
    x, z = start(TEST_SEED, SHAPE, torch.float64), LevelNoise(TEST_SEED, SHAPE, torch.float64)
    levels, n = LEVELS, len(LEVELS) - 1
    got = loops.sample_heunpp2(mixture, x, levels, disable=True, s_churn=2.0, s_noise=1.1, noise_sampler=z)
    gamma = min(2.0 / n, 2**0.5 - 1)
    for i in range(n):
        raised = levels[i] * (1 + gamma)
        x = x + 1.1 * (raised**2 - levels[i] ** 2) ** 0.5 * LevelNoise(TEST_SEED, SHAPE, torch.float64)(
            levels[i], raised
        )
        # One step of the formula, with the weights of the whole loop's first level.
        d = (x - denoise(x, raised)) / raised
        a, b = raised, levels[i + 1]
        if i == n - 1:
            x = x + (b - a) * d
            continue
        second = x + (b - a) * d
        d2 = (second - denoise(second, b)) / b
        if i == n - 2:
            w2 = b / (2 * levels[0])
            x = x + (b - a) * ((1 - w2) * d + w2 * d2)
            continue
        c = levels[i + 2]
        third = second + (c - b) * d2
        w2, w3 = b / (3 * levels[0]), c / (3 * levels[0])
        x = x + (b - a) * ((1 - w2 - w3) * d + w2 * d2 + w3 * (third - denoise(third, c)) / c)
    torch.testing.assert_close(got, x, rtol=TOLERANCE, atol=TOLERANCE)


def test_flow_loops_are_euler_and_heun_in_time() -> None:
    """On samples (1 − σ)·x0 + σ·ε from pure noise, with a model of x0 and with one of the velocity."""
    times = [1.0, 0.8, 0.55, 0.3, 0.1, 0.0]
    x = start(TEST_SEED, SHAPE, torch.float64) / 14.6

    def velocity(x: Tensor, t: float) -> Tensor:
        return torch.sin(3 * x) - t * x

    def denoised(x: Tensor, sigma: Tensor) -> Tensor:
        return x - float(sigma[0]) * velocity(x, float(sigma[0]))

    wrapped = loops.FlowPathDenoiser(lambda x, t: velocity(x, float(t[0]) / 1000))
    euler = heun = x
    for a, b in itertools.pairwise(times):
        euler = euler + (b - a) * velocity(euler, a)
        slope = velocity(heun, a)
        if b:
            slope = 0.5 * (slope + velocity(heun + (b - a) * slope, b))
        heun = heun + (b - a) * slope
    for model in (denoised, wrapped):
        for function, want in ((loops.sample_flow_euler, euler), (loops.sample_flow_heun, heun)):
            torch.testing.assert_close(function(model, x, times, disable=True), want, rtol=1e-10, atol=1e-10)
    with pytest.raises(TypeError, match="FlowPathDenoiser"):
        loops.sample_flow_euler(loops.FlowDenoiser(wrapped.inner_model), x, times)
    with pytest.raises(TypeError, match="x0 \\+ σ·ε"):
        loops.sample_euler(wrapped, x, times)
    with pytest.raises(ValueError, match="schedule"):
        loops.sample_tcd(denoised, x, times)


#: Order of accuracy on the mixture, from 16 to 32 steps evenly spaced in log σ; a multistep method is still above it.
ORDERS: dict[str, tuple[dict[str, Any], float, float]] = {
    "euler": ({}, 0.8, 1.2),
    "res_multistep": ({}, 1.8, 2.3),
    "res_2s": ({}, 1.8, 2.3),
    "res_3s": ({}, 2.7, 3.6),
    "exp_heun_2_x0": ({}, 1.8, 2.3),
    "seeds_2": ({"eta": 0.0}, 1.8, 2.3),
    "seeds_3": ({"eta": 0.0}, 2.7, 3.6),
    "dpmpp_2m": ({}, 1.8, 2.3),
    "dpm_2": ({}, 1.7, 2.4),
    "heun": ({}, 1.7, 2.4),
    "unipc": ({"order": 2, "lower_order_final": False}, 2.6, 3.6),
    "unipc_bh2": ({"order": 3, "lower_order_final": False}, 3.4, 5.0),
    "sa_solver": ({"tau": 0.0, "predictor_order": 2, "corrector_order": 3, "lower_order_final": False}, 2.85, 3.3),
}


def test_orders_of_accuracy() -> None:
    integrate = pytest.importorskip("scipy.integrate")
    high, low = 4.0, 0.2
    x = (start(TEST_SEED, (1, 24), torch.float64) * (high / 14.6)).clamp(-6.0, 6.0)

    def slope(t: float, values: Any) -> Any:
        at = torch.from_numpy(np.ascontiguousarray(values))[None]
        return (math.exp(t) * (at - denoise(at, math.exp(t))) / math.exp(t))[0].numpy()

    truth = torch.from_numpy(
        integrate.solve_ivp(
            slope, (math.log(high), math.log(low)), x[0].numpy(), method="DOP853", rtol=1e-12, atol=1e-13
        ).y[:, -1]
    )
    found = {}
    for name, (options, least, most) in ORDERS.items():
        errors = []
        for n in (16, 32):
            sigmas = np.geomspace(high, low, n + 1).tolist()
            end = getattr(loops, f"sample_{name}")(mixture, x, sigmas, disable=True, **options)
            errors.append(float((end[0] - truth).square().mean().sqrt()))
        found[name] = (math.log2(errors[0] / errors[1]), least, most)
    assert {name: order for name, (order, least, most) in found.items() if not least <= order <= most} == {}
