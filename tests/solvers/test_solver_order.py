# SPDX-License-Identifier: MIT
"""Order of convergence of every solver, measured on a mixture of Gaussians with known score.

The loop runs with `Stepper` in float64, so the table, the loop and the compiled step are measured.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest

from fastdiff import SamplingMethod
from fastdiff.schedules.levels import Levels, levels_from_half_log_snr, with_intermediate_levels
from fastdiff.solvers import (
    Prediction,
    ddim,
    ddpm,
    deis,
    dpm_multistep,
    dpm_singlestep,
    euler,
    euler_ancestral,
    heun,
    ipndm,
    lms,
    pndm,
    sa_solver,
    unipc,
)
from fastdiff.solvers.table import StepTable
from support.solver_cases import DETERMINISTIC, Form
from support.solver_loops import Array, Outputs, level_of, run_loop

MEANS, STDS, WEIGHTS = np.array([-1.5, 0.3, 1.2]), np.array([0.3, 0.5, 0.2]), np.array([0.3, 0.45, 0.25])
FIRST, LAST = -4.0, 2.5  # λ = log(α/σ)
START = np.random.default_rng(0).standard_normal(64)


def _epsilon(x: Array, half_log_snr: float) -> Array:
    """Return ε = −σ·∇log p of the mixture at λ."""
    level = level_of(half_log_snr)
    variance = (level.alpha * STDS) ** 2 + level.sigma**2
    apart = x[:, None] - level.alpha * MEANS
    log_density = np.log(WEIGHTS) - 0.5 * np.log(variance) - 0.5 * apart**2 / variance
    share = np.exp(log_density - log_density.max(axis=1, keepdims=True))
    share /= share.sum(axis=1, keepdims=True)
    return level.sigma * (share * apart / variance).sum(axis=1)


@functools.cache
def _truth() -> Array:
    """Solve the probability-flow ODE dx/dλ = σ²·x − σ·ε with much higher accuracy than the solvers."""
    integrate = pytest.importorskip("scipy.integrate")

    def slope(half_log_snr: float, x: Array) -> Array:
        sigma = level_of(half_log_snr).sigma
        return sigma**2 * x - sigma * _epsilon(x, half_log_snr)

    solution = integrate.solve_ivp(slope, (FIRST, LAST), START, method="DOP853", rtol=1e-13, atol=1e-14)
    return solution.y[:, -1]


def _levels(steps: int) -> Levels:
    return levels_from_half_log_snr(np.linspace(FIRST, LAST, steps + 1).tolist())


def _multistep(**options: object) -> Callable[[int], StepTable]:
    return lambda n: dpm_multistep(_levels(n), Prediction(), lower_order_final=False, **options)  # type: ignore[arg-type]


def _singlestep(order: int, **options: object) -> Callable[[int], StepTable]:
    fractions = {1: [], 2: [1 / 2], 3: [1 / 3, 2 / 3]}[order]

    def make(n: int) -> StepTable:
        levels = with_intermediate_levels(_levels(n), fractions)
        return dpm_singlestep(levels, Prediction(), solver_order=order, **options)  # type: ignore[arg-type]

    return make


def _graded(steps: int) -> Levels:
    """Return levels whose first step is cut into halves of halves.

    A method of order p that starts with Euler's step makes an error of its square there, which on even steps hides p.
    """
    start, first, *others = (level.half_log_snr for level in _levels(steps).points)
    return levels_from_half_log_snr([start, *(start + (first - start) / 2**j for j in range(12, -1, -1)), *others])


def _unipc(**options: object) -> Callable[[int], StepTable]:
    return lambda n: unipc(_levels(n), Prediction(), lower_order_final=False, **options)  # type: ignore[arg-type]


def _registered(method: SamplingMethod) -> Callable[[int], StepTable]:
    options = {"lower_order_final": False} if "lower_order_final" in method.entry.options else {}
    grid = _graded if method is SamplingMethod.LMS else _levels
    return lambda n: Form(method, options)(grid(n), Prediction())


#: Name: (table of n steps, slope, RMSE at 20 steps where the literature's code was measured).
CASES: dict[str, tuple[Callable[[int], StepTable], float, float | None]] = {
    "DDIM": (lambda n: ddim(_levels(n), Prediction()), 1.0, 8.04e-2),
    "Euler": (lambda n: euler(_levels(n), Prediction()), 1.0, 8.04e-2),
    "Euler ancestral, eta 0": (lambda n: euler_ancestral(_levels(n), Prediction(), eta=0.0), 1.0, 8.04e-2),
    "Heun": (lambda n: heun(_levels(n), Prediction()), 2.0, 1.29e-2),
    "DPM-Solver-1": (_multistep(algorithm_type="dpmsolver", solver_order=1), 1.0, 8.04e-2),
    "DPM-Solver-2S midpoint": (_singlestep(2, algorithm_type="dpmsolver"), 2.0, 6.05e-3),
    "DPM-Solver-2S heun": (_singlestep(2, algorithm_type="dpmsolver", solver_type="heun"), 2.0, None),
    "DPM-Solver++2S midpoint": (_singlestep(2), 2.0, None),
    "DPM-Solver++2S heun": (_singlestep(2, solver_type="heun"), 2.0, None),
    "DPM-Solver-3S midpoint": (_singlestep(3, algorithm_type="dpmsolver"), 3.0, 1.46e-4),
    "DPM-Solver-3S heun": (_singlestep(3, algorithm_type="dpmsolver", solver_type="heun"), 3.0, None),
    "DPM-Solver++3S midpoint": (_singlestep(3), 3.0, None),
    "DPM-Solver++3S heun": (_singlestep(3, solver_type="heun"), 3.0, None),
    "DPM-Solver++2M midpoint": (_multistep(solver_order=2), 2.0, 6.17e-3),
    "DPM-Solver++2M heun": (_multistep(solver_order=2, solver_type="heun"), 2.0, None),
    "DPM-Solver-2M midpoint": (_multistep(algorithm_type="dpmsolver", solver_order=2), 2.0, None),
    "DPM-Solver-2M heun": (_multistep(algorithm_type="dpmsolver", solver_order=2, solver_type="heun"), 2.0, None),
    "DPM-Solver++3M compatible": (_multistep(solver_order=3), 2.0, 2.96e-3),
    "DPM-Solver++3M exact": (_multistep(solver_order=3, third_order="exact"), 3.0, 2.71e-3),
    "DPM-Solver-3M compatible": (_multistep(algorithm_type="dpmsolver", solver_order=3), 2.0, None),
    "DPM-Solver-3M exact": (_multistep(algorithm_type="dpmsolver", solver_order=3, third_order="exact"), 3.0, None),
    "UniPC-1 bh2": (_unipc(solver_order=1), 2.0, None),
    "UniPC-2 bh1": (_unipc(unipc_type="bh1"), 3.0, None),
    "UniPC-2 bh2": (_unipc(), 3.0, None),
    "UniPC-2 bh2, noise": (_unipc(predict_x0=False), 3.0, None),
    "UniPC-3 bh2": (_unipc(solver_order=3), 4.0, None),
    "UniPC-3 bh1, noise": (_unipc(solver_order=3, unipc_type="bh1", predict_x0=False), 4.0, None),
    "UniP-3": (_unipc(solver_order=3, use_corrector=False), 3.0, None),
    "DEIS-3": (lambda n: deis(_levels(n), Prediction(), solver_order=3), 3.0, None),
    "SA-Solver, tau 0": (lambda n: sa_solver(_levels(n), Prediction(), tau=0.0, lower_order_final=False), 2.0, None),
    "LMS-3": (lambda n: lms(_graded(n), Prediction(), multistep_order=3), 3.0, None),
    "IPNDM-2": (lambda n: ipndm(_levels(n), Prediction(), multistep_order=2), 2.0, None),
    "PNDM, Runge-Kutta start": (lambda n: pndm(_levels(n), Prediction(), skip_prk_steps=False), 2.0, None),
}

CASES |= {
    f"{method}, by the registry": (_registered(SamplingMethod(method)), float(SamplingMethod(method).entry.order), None)
    for method in DETERMINISTIC
}


def _error(table: StepTable) -> float:
    end = run_loop(table, lambda x, half_log_snr: Outputs(_epsilon(x, half_log_snr)), START)
    return float(np.sqrt(np.mean((end - _truth()) ** 2)))


@functools.cache
def _measured(name: str) -> tuple[float, float]:
    """Return the RMSE at 20 steps, and the slope from 320 to 640 steps."""
    make = CASES[name][0]
    return _error(make(20)), math.log2(_error(make(320)) / _error(make(640)))


@pytest.mark.parametrize("name", CASES)
def test_order_matches_paper(name: str) -> None:
    slope = _measured(name)[1]
    if name.endswith("3M exact"):
        # Multistep methods come down to their slope slowly, from above or below: the next power of h still shows.
        assert 2.9 <= slope <= 3.3
    else:
        assert slope == pytest.approx(CASES[name][1], abs=0.1)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case[2] is not None])
def test_order_constant_matches_independent_values(name: str) -> None:
    """Compare errors at one step size: a wrong constant does not change the slope."""
    assert _measured(name)[0] == pytest.approx(CASES[name][2], rel=0.05)


def test_order_table_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with capsys.disabled():
        print(f"\n{'solver':28}{'RMSE at 20':>12}{'slope 320-640':>15}")
        for name in CASES:
            error, slope = _measured(name)
            print(f"{name:28}{error:12.3e}{slope:15.3f}")


def test_order_of_weak_error_is_one_for_stochastic_solvers() -> None:
    """On Gaussian data the affine rows give the end's variance exactly, noise included; its error falls as 1/n."""
    scale = 0.5  # data N(0, 0.25)

    def variance_error(make: Callable[[Levels], StepTable], steps: int) -> float:
        levels = _levels(steps)
        variance = (levels[0].alpha * scale) ** 2 + levels[0].sigma ** 2
        for row in make(levels).source:
            t = level_of(row.timestep)
            of_x, of_m, *_, of_z = row.prev_sample.coefficients
            # ε of that data is a multiple of x.
            factor = of_x + of_m * t.sigma / ((t.alpha * scale) ** 2 + t.sigma**2)
            variance = factor**2 * variance + of_z**2
        end = level_of(LAST)
        return abs(variance - (end.alpha * scale) ** 2 - end.sigma**2)

    stochastic: dict[str, Callable[[Levels], StepTable]] = {
        "ddpm": lambda levels: ddpm(levels, Prediction()),
        "ddim, eta 1/2": lambda levels: ddim(levels, Prediction(), eta=0.5),
        "ancestral, eta 1/2": lambda levels: euler_ancestral(levels, Prediction(), eta=0.5),
        "sde-dpmsolver": partial(
            dpm_multistep, prediction=Prediction(), algorithm_type="sde-dpmsolver", solver_order=1
        ),
    }
    for name, make in stochastic.items():
        slope = math.log2(variance_error(make, 320) / variance_error(make, 640))
        assert slope == pytest.approx(1.0, abs=0.1), name
