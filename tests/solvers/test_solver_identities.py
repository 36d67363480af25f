# SPDX-License-Identifier: MIT
"""Different papers' names for one sampler: the tables must agree to the rounding of float64."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdiff.row_layout import Variance
from fastdiff.schedules import create_noise_scheduler
from fastdiff.schedules.levels import (
    Levels,
    levels_from_flow_times,
    levels_from_half_log_snr,
    levels_from_sigmas,
    levels_from_timesteps,
    with_intermediate_levels,
)
from fastdiff.solvers import (
    Prediction,
    PredictionType,
    ddim,
    ddpm,
    dpm_multistep,
    dpm_singlestep,
    euler,
    euler_ancestral,
)
from fastdiff.solvers.affine import Affine
from fastdiff.solvers.table import StepTable
from support.loops import (
    PREDICTION_TYPES,
    SOLVERS,
    Array,
    ElementModel,
    MakeTable,
    Outputs,
    level_of,
    output_for,
    walk,
)
from support.solver_cases import ALGORITHMS

#: Relative to the largest coefficient of a row.  A coefficient takes some ten operations; where 1 − e^h or 1 − f²
#: cancels in one form and not in the other, steps of h ≥ 0.02 lose at most a factor of 50: 10·50·2⁻⁵³ = 6e-14.
TOLERANCE = 1e-12

EPSILON = Prediction()
SHAPE = (2, 3)


@st.composite
def vp_levels(draw: st.DrawFn, *, clean: bool | None = None) -> Levels:
    """Two to six variance-preserving levels between λ = −5 and 5, and maybe the clean sample after them."""
    steps = draw(st.lists(st.floats(0.02, 2.0), min_size=1, max_size=5))
    values = np.cumsum([draw(st.floats(-5.0, -1.0)), *steps]).tolist()
    if draw(st.booleans()) if clean is None else clean:
        values.append(math.inf)
    return levels_from_half_log_snr(values)


def _assert_same_maps(tables: dict[str, StepTable]) -> None:
    (first_name, first), *others = tables.items()
    for name, table in others:
        assert len(table) == len(first)
        for i, (row, other) in enumerate(zip(first.source, table.source, strict=True)):
            ours, theirs = np.array(row.prev_sample.coefficients), np.array(other.prev_sample.coefficients)
            error = np.abs(ours - theirs).max() / np.abs(ours).max()
            assert error <= TOLERANCE, f"row {i}: {first_name} {row.prev_sample}, {name} {other.prev_sample}"
            assert row.timestep == other.timestep


def _deterministic_first_order(levels: Levels, prediction: Prediction) -> dict[str, StepTable]:
    return {
        "ddim": ddim(levels, prediction),
        "dpm-solver-1": dpm_multistep(levels, prediction, algorithm_type="dpmsolver", solver_order=1),
        "dpm-solver++-1": dpm_multistep(levels, prediction, algorithm_type="dpmsolver++", solver_order=1),
        "singlestep dpm-solver-1": dpm_singlestep(levels, prediction, algorithm_type="dpmsolver", solver_order=1),
        "singlestep dpm-solver++-1": dpm_singlestep(levels, prediction, solver_order=1),
        "euler": euler(levels, prediction),
        "ancestral, eta 0": euler_ancestral(levels, prediction, eta=0.0),
    }


def _posterior_samplers(levels: Levels, prediction: Prediction) -> dict[str, StepTable]:
    sde = {"algorithm_type": "sde-dpmsolver++", "solver_order": 1}
    return {
        "ddpm": ddpm(levels, prediction),
        "ddpm, log": ddpm(levels, prediction, variance_type="fixed_small_log"),
        "ddim, eta 1": ddim(levels, prediction, eta=1.0),
        "ancestral, eta 1": euler_ancestral(levels, prediction, eta=1.0),
        "sde-dpm++-1": dpm_multistep(levels, prediction, **sde),  # type: ignore[arg-type]
        "singlestep sde-dpm++-1": dpm_singlestep(levels, prediction, **sde),  # type: ignore[arg-type]
    }


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
@given(levels=vp_levels())
@settings(max_examples=40)
def test_identity_of_deterministic_first_order_solvers(kind: PredictionType, levels: Levels) -> None:
    """DDIM = DPM-Solver-1 = DPM-Solver++1 = Euler in σ̂."""
    _assert_same_maps(_deterministic_first_order(levels, Prediction(kind)))


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
@given(levels=vp_levels())
@settings(max_examples=40)
def test_identity_of_posterior_samplers(kind: PredictionType, levels: Levels) -> None:
    """DDPM = DDIM(η = 1) = Euler-ancestral(η = 1) = SDE-DPM-Solver++1, noise included."""
    _assert_same_maps(_posterior_samplers(levels, Prediction(kind)))


@pytest.mark.parametrize("family", [_deterministic_first_order, _posterior_samplers])
@pytest.mark.parametrize("clip", [math.inf, 0.8])
def test_identity_holds_over_whole_loops(
    family: Callable[[Levels, Prediction], dict[str, StepTable]], clip: float
) -> None:
    """Twelve steps on a training schedule, through the stepper, with the same noise; clipped ones too."""
    alphas_cumprod = create_noise_scheduler("scaled_linear").alphas_cumprod
    levels = levels_from_timesteps(alphas_cumprod, range(935, 0, -80))
    random = np.random.default_rng(1)
    start, noise = random.standard_normal(SHAPE), [random.standard_normal(SHAPE) for _ in range(len(levels))]
    tables = family(levels, Prediction(clip_range=clip))
    if clip < math.inf:
        # DDIM's own ε is not the clipped x0's, which all others go by.
        eta = 0.0 if family is _deterministic_first_order else 1.0
        tables = {**tables, "ddim": ddim(levels, Prediction(clip_range=clip), eta=eta, use_clipped_model_output=True)}
        tables.pop("ddim, eta 1", None)
    ends = {name: walk(table, lambda x, t: Outputs(np.tanh(x)), start, noise) for name, table in tables.items()}
    first = next(iter(ends.values()))
    for name, end in ends.items():
        # Twelve rows of TOLERANCE at most, each passed on by the later ones, which multiply a sample by α_end/α_t at
        # most: all in all 1/α = 12 here.
        np.testing.assert_allclose(end, first, rtol=0, atol=12 * TOLERANCE, err_msg=name)


@given(times=st.lists(st.floats(0.01, 0.999), min_size=2, max_size=6, unique_by=lambda t: round(t, 2)))
@settings(max_examples=50)
def test_identity_flow_euler_is_ddim_on_the_straight_path(times: list[float]) -> None:
    """Euler's step of the flow ODE, x + (t′ − t)·v, is DDIM with α = 1 − t and σ = t."""
    times = [1.0, *sorted(times, reverse=True), 0.0]
    table = ddim(levels_from_flow_times(times), Prediction(PredictionType.FLOW_PREDICTION))
    for row, t, s in zip(table.source, times[:-1], times[1:], strict=True):
        of_sample, of_output, *others = row.prev_sample.coefficients
        # (1 − s)/(1 − t) never appears: the flow form has no pole at t = 1.
        assert of_sample == pytest.approx(1.0, abs=TOLERANCE)
        assert of_output == pytest.approx(s - t, abs=TOLERANCE)
        assert others == [0.0] * 6
        assert row.timestep == 1000.0 * t


def test_identity_flow_solvers_of_first_order_agree() -> None:
    levels = levels_from_flow_times([0.95, 0.7, 0.5, 0.2, 0.05, 0.0])
    _assert_same_maps(_deterministic_first_order(levels, Prediction(PredictionType.FLOW_PREDICTION)))
    _assert_same_maps(_posterior_samplers(levels, Prediction(PredictionType.FLOW_PREDICTION)))


def _converted(kind: PredictionType, belief: Callable[[Array, float], Array], variance: Array | None) -> ElementModel:
    """A model of one kind that believes in the same x0 as the models of the others."""
    return lambda x, t: Outputs(output_for(kind, level_of(t), x, belief(x, t)), None, variance)


@pytest.mark.parametrize("solver", SOLVERS)
def test_identity_of_prediction_types_for_every_solver(solver: str) -> None:
    """ε, v, x0 and flow are one model told in four ways: every solver must end at the same sample."""
    levels = with_intermediate_levels(levels_from_half_log_snr([-2.0, -0.8, 0.4, 2.0, math.inf]), [0.4])
    random = np.random.default_rng(2)
    start, noise = random.standard_normal(SHAPE), [random.standard_normal(SHAPE) for _ in range(20)]

    def belief(x: Array, half_log_snr: float) -> Array:
        return np.tanh(x + 0.1 * half_log_snr)

    ends = []
    for kind in PREDICTION_TYPES:
        table = SOLVERS[solver](levels, Prediction(kind))
        variance = None if table.variance is Variance.FIXED else np.full(SHAPE, 0.3)
        ends.append(walk(table, _converted(kind, belief, variance), start, noise))
    assert np.abs(ends[0]).max() > 0.1
    for end in ends[1:]:
        # A dozen rows of TOLERANCE, largest between ε and x0 at λ = −2, where x0 = (x − σε)/α takes 1/α = 7.5 times.
        np.testing.assert_allclose(end, ends[0], rtol=0, atol=20 * TOLERANCE)


# ---------------------------------------------------------------------------------------------- SDE singlestep solvers

SDE = tuple(name for name in ALGORITHMS if name.startswith("sde"))
SdeCase = tuple[str, int, str]


def _noise_after(table: StepTable, rows: int) -> list[float]:
    """What the sample holds of each row's draw, for a model whose output is 0 wherever it is asked."""
    registers: list[np.ndarray] = [np.zeros(rows)] * 4
    carried = np.zeros(rows)
    for i, row in enumerate(table.source[:rows]):
        draw = np.eye(rows)[i]
        # The sample's own part starts at 0, and so does the model's: what is left is the noise.
        tensors = [carried, np.zeros(rows), row.prediction[0] * carried, *registers, draw]

        def apply(form: Affine, tensors: list[np.ndarray] = tensors) -> np.ndarray:
            return sum((c * t for c, t in zip(form.coefficients, tensors, strict=True)), np.zeros(rows))

        kept = [apply(form) for form in row.kept]
        carried = apply(row.prev_sample)
        for register, value in zip(row.slots, kept, strict=True):
            registers[register] = value
    return carried.tolist()


@pytest.mark.parametrize("solver_type", ["midpoint", "heun"])
@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("algorithm", SDE)
@given(start=st.floats(-4.0, 1.0), steps=st.lists(st.floats(0.05, 1.0), min_size=3, max_size=3))
@settings(max_examples=20)
def test_singlestep_sde_noise_is_one_brownian_path(
    algorithm: str, order: int, solver_type: str, start: float, steps: list[float]
) -> None:
    """The noise of a step's rows adds up to the variance of the exact step over them, whatever lies in between."""
    levels = levels_from_half_log_snr(np.cumsum([start, *steps[:order]]).tolist())
    # A zero output means a constant x0 for the data form and a constant ε for the noise form: both are exact then.
    prediction = Prediction(PredictionType.SAMPLE if algorithm.endswith("++") else PredictionType.EPSILON)
    table = dpm_singlestep(levels, prediction, algorithm_type=algorithm, solver_order=order, solver_type=solver_type)
    t, s = levels[0], levels[order]
    if algorithm.endswith("++"):
        # The posterior of DDPM over the whole step.
        expected = s.sigma**2 * (1.0 - (s.noise_ratio / t.noise_ratio) ** 2)
    else:
        expected = s.alpha**2 * (t.noise_ratio**2 - s.noise_ratio**2)
    assert sum(z * z for z in _noise_after(table, order)) == pytest.approx(expected, rel=TOLERANCE)
    # A straight path: every level in between is a part of it, so each row's draw lasts to the end.
    assert all(_noise_after(table, order))


@pytest.mark.parametrize("algorithm", SDE)
@given(levels=vp_levels())
@settings(max_examples=30)
def test_singlestep_sde_of_order_one_is_multistep(algorithm: str, levels: Levels) -> None:
    tables = {
        make.__name__: make(levels, EPSILON, algorithm_type=algorithm, solver_order=1)
        for make in (dpm_multistep, dpm_singlestep)
    }
    _assert_same_maps(tables)
    assert tables["dpm_multistep"].draws_noise == tables["dpm_singlestep"].draws_noise


@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("algorithm", SDE)
def test_singlestep_sde_mean_is_exact_for_a_constant_model(algorithm: str, order: int) -> None:
    """Differences of a constant vanish: without noise, a step of any order is the step of order 1 over all of it."""
    levels = levels_from_half_log_snr([-1.0, -0.6, 0.1, 0.5][: order + 1])
    whole = Levels((levels[0], levels[order]), levels.locate)
    prediction = Prediction(PredictionType.SAMPLE if algorithm.endswith("++") else PredictionType.EPSILON)
    constant, silent = Outputs(np.array([0.4])), [np.zeros(1)] * order

    def end(levels: Levels, order: int) -> Array:
        table = dpm_singlestep(levels, prediction, solver_order=order, algorithm_type=algorithm)
        return walk(table, lambda x, t: constant, np.array([0.7]), silent)

    many, once = end(levels, order), end(whole, 1)
    np.testing.assert_allclose(many, once, rtol=TOLERANCE)


# ---------------------------------------------------------------------------------------------------- other identities


@pytest.mark.parametrize("make", [SOLVERS["ddpm-fixed_small"], SOLVERS["ddim-1.0"], SOLVERS["ancestral-1.0"]])
def test_last_step_to_the_clean_sample_adds_no_noise(make: MakeTable) -> None:
    table = make(levels_from_half_log_snr([-1.0, 0.0, 1.0, math.inf]), EPSILON)
    assert table.draws_noise == (True, True, False)


@given(levels=vp_levels(clean=False), scale=st.floats(0.2, 5.0))
@settings(max_examples=30)
def test_levels_from_sigmas_agree_with_levels_of_half_log_snr(levels: Levels, scale: float) -> None:
    """σ̂ and λ name the same levels: a table does not depend on which of them a loop was planned in."""
    alphas_cumprod = create_noise_scheduler("linear", num_train_timesteps=50, beta_end=0.02 * scale).alphas_cumprod
    sigmas = [level.noise_ratio for level in levels.points]
    other = levels_from_sigmas(alphas_cumprod, sigmas[:-1], final_sigma=sigmas[-1])
    for ours, theirs in zip(ddim(levels, EPSILON, eta=0.5), ddim(other, EPSILON, eta=0.5), strict=True):
        np.testing.assert_allclose(
            theirs.prev_sample.coefficients, ours.prev_sample.coefficients, rtol=TOLERANCE, atol=TOLERANCE
        )
