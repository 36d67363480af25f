# SPDX-License-Identifier: MIT
"""SA-Solver against the integrals of its paper, by quadrature, with last sample and noise kept as it has them."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fastdiff.schedules.levels import Levels, levels_from_half_log_snr
from fastdiff.solvers import Prediction, dpm_multistep, sa_solver
from support.formulas import CLEAN, GRID, NOISE, START, assert_close, epsilon_of, run, x0_of
from support.solver_loops import Array


def _update(levels: Levels, i: int, x: Array, z: Array, nodes: list[float], outputs: list[Array], tau: float,
            data: bool) -> Array:  # fmt: skip
    """Equations 14 and 17 of arXiv 2309.05019: step from level i with the outputs at the nodes λ."""
    integrate = pytest.importorskip("scipy.integrate")
    t, s = levels[i], levels[i + 1]
    start, end = t.half_log_snr, s.half_log_snr
    h, c = end - start, 1.0 + tau**2
    areas = []
    for node in nodes:
        others = [other for other in nodes if other != node]

        def weight(u: float, node: float = node, others: list[float] = others) -> float:
            lagrange = math.prod((u - other) / (node - other) for other in others)
            return lagrange * (math.exp(c * (u - end)) * s.alpha if data else -math.exp(end - u) * s.sigma)

        areas.append(c * integrate.quad(weight, start, end, epsabs=1e-13, epsrel=1e-13)[0])
    if data and len(nodes) == 2:  # the difference is weighed as if the exponential were constant
        other = 0 if nodes[1] == start else 1
        total = sum(areas)
        areas[other] = c * s.alpha * h * (h / 2) / (nodes[other] - start)
        areas[1 - other] = total - areas[other]
    if data:
        base = math.exp(-(tau**2) * h) * s.sigma / t.sigma * x
        base = base + s.sigma * math.sqrt(1 - math.exp(-2 * tau**2 * h)) * z
    else:
        base = s.alpha / t.alpha * x + tau * s.sigma * math.sqrt(math.exp(2 * h) - 1) * z
    return base + sum(a * output for a, output in zip(areas, outputs, strict=True))


@pytest.mark.parametrize("data", [True, False])
@pytest.mark.parametrize(("predictor", "corrector"), [(1, 1), (2, 2), (3, 4), (4, 0)])
def test_sa_solver_follows_its_formula(predictor: int, corrector: int, data: bool) -> None:
    levels, tau = levels_from_half_log_snr(GRID), 0.7
    n, x, outputs, last = len(levels), START, [], START
    now = 0
    for i in range(n):
        new = x0_of(x, levels[i].timestep) if data else epsilon_of(x, levels[i])
        outputs = [new, *outputs]
        if corrector and i > 0:
            nodes = [levels[i - j].half_log_snr for j in range(now)]
            x = _update(levels, i - 1, last, NOISE[i - 1], nodes, outputs[:now], tau, data)
        last, left = x, n - i
        used = min(predictor, i + 1, left)
        now = min(corrector, i + 2, left + 1)
        nodes = [levels[i - j].half_log_snr for j in range(used)]
        x = _update(levels, i, x, NOISE[i], nodes, outputs[:used], tau, data)
    table = sa_solver(
        levels, Prediction(), predictor_order=predictor, corrector_order=corrector, tau=tau, predict_x0=data
    )
    assert_close(run(table), x)


def test_sa_solver_of_order_one_is_dpm_solver() -> None:
    """One output and no corrector: DPM-Solver++ of order 1 for τ = 0, its SDE form for τ = 1."""
    levels = levels_from_half_log_snr(CLEAN)
    for tau, algorithm in ((0.0, "dpmsolver++"), (1.0, "sde-dpmsolver++")):
        ours = sa_solver(levels, Prediction(), predictor_order=1, corrector_order=0, tau=tau)
        theirs = dpm_multistep(levels, Prediction(), solver_order=1, algorithm_type=algorithm)
        for row, other in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(row.prev_sample.coefficients, other.prev_sample.coefficients, atol=1e-13)


def test_sa_solver_adds_noise_in_its_range_alone() -> None:
    levels = levels_from_half_log_snr(CLEAN)
    table = sa_solver(levels, Prediction(), s_tmin=0.5, s_tmax=2.0)
    expected = tuple(0.5 <= level.noise_ratio <= 2.0 for level in levels.points[:-1])
    assert any(expected)
    assert table.draws_noise == expected


@pytest.mark.parametrize("options", [{"predictor_order": 0}, {"corrector_order": 5}, {"tau": -1.0}])
def test_sa_solver_refuses_options_out_of_range(options: dict[str, float]) -> None:
    (name,) = options
    with pytest.raises(ValueError, match=f"^sa_solver: {name} is "):
        sa_solver(levels_from_half_log_snr(GRID), Prediction(), **options)  # type: ignore[arg-type]
