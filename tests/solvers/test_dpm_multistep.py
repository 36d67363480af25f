# SPDX-License-Identifier: MIT
"""The rows of multistep DPM-Solver(++) against its papers' algorithms."""

from __future__ import annotations

import math

import pytest

from fastdiff.schedules.levels import Level, levels_from_half_log_snr
from fastdiff.solvers import Prediction, dpm_multistep
from support.formulas import CLEAN, GRID, NOISE, START, assert_close, first_order_step, read_output, run, x0_of
from support.solver_cases import ALGORITHMS


def _weights(algorithm: str, h: float, t: Level) -> tuple[float, float, float]:
    """The weights of D1 (midpoint, heun) and of D2, on top of the first-order step: diffusers' coefficients."""
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
        d = read_output(algorithm, x, s)
        past = [*past, d][-3:]
        now = min(order, i + 1, n - i if final else 3)
        if t.sigma == 0.0:
            # The limit h → ∞ is the predicted clean sample.
            x = x0_of(x, s.timestep)
            continue
        h = t.half_log_snr - s.half_log_snr
        x = first_order_step(algorithm, x, d, s, t, NOISE[i])
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
    assert_close(run(table), x)


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
