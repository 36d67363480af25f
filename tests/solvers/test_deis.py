# SPDX-License-Identifier: MIT
"""DEIS against the integrals of its paper, by quadrature."""

from __future__ import annotations

import math

import pytest

from fastdiff.schedules.levels import levels_from_half_log_snr
from fastdiff.solvers import Prediction, deis
from support.formulas import CLEAN, GRID, START, assert_close, epsilon_of, run


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("final", [False, True])
def test_deis_follows_its_formula(order: int, final: bool) -> None:
    integrate = pytest.importorskip("scipy.integrate")
    levels = levels_from_half_log_snr(CLEAN if final else GRID)
    n, x, outputs = len(levels), START, []
    for i in range(n):
        t, s = levels[i], levels[i + 1]
        outputs = [epsilon_of(x, t), *outputs][:order]
        now = min(len(outputs), n - i if final else order)
        nodes = [math.log(levels[i - j].noise_ratio) for j in range(now)]
        total = x / t.alpha
        for j in range(now):
            others = [node for k, node in enumerate(nodes) if k != j]

            def weight(rho: float, j: int = j, others: list[float] = others, nodes: list[float] = nodes) -> float:
                return math.prod((math.log(rho) - other) / (nodes[j] - other) for other in others)

            area = integrate.quad(weight, t.noise_ratio, s.noise_ratio, epsabs=1e-13, epsrel=1e-13)[0]
            total = total + area * outputs[j]
        x = s.alpha * total
    assert_close(run(deis(levels, Prediction(), solver_order=order, lower_order_final=final)), x)


def test_deis_refuses_an_order_out_of_range() -> None:
    with pytest.raises(ValueError, match=r"^deis: solver_order is 4, expected an integer from 1 to 3"):
        deis(levels_from_half_log_snr(GRID), Prediction(), solver_order=4)
