# SPDX-License-Identifier: MIT
"""EDM Euler against its paper on numbers: preconditioning, coordinates and time."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from fastdiff import create_sampler
from fastdiff.schedules.levels import levels_from_flow_times, levels_from_half_log_snr, with_edm_coordinates
from fastdiff.solvers import Churn, Prediction, PredictionType, edm_euler, euler
from support.formulas import CLEAN, START, assert_close
from support.solver_loops import Array, Outputs, evaluate

EDM = Prediction(PredictionType.EDM)


def _network(x: Array, c_noise: float) -> Array:
    """Any network F of its input and time."""
    return np.tanh(x + 0.3 * c_noise)


@pytest.mark.parametrize("sigma_data", [0.5, 1.0, 1.7])
def test_edm_euler_follows_its_formula(sigma_data: float) -> None:
    plain = levels_from_half_log_snr(CLEAN)
    sigmas = [level.noise_ratio for level in plain.points]
    x_hat = START * math.hypot(sigmas[0], sigma_data)  # START is the network's first input
    for sigma, target in itertools.pairwise(sigmas):
        norm = sigma**2 + sigma_data**2
        output = _network(x_hat / math.sqrt(norm), math.log(sigma) / 4)
        x0 = sigma_data**2 / norm * x_hat + sigma * sigma_data / math.sqrt(norm) * output
        x_hat = x_hat + (target - sigma) * (x_hat - x0) / sigma
    table = edm_euler(with_edm_coordinates(plain, sigma_data), EDM, sigma_data=sigma_data)
    assert table.timesteps == pytest.approx([math.log(sigma) / 4 for sigma in sigmas[:-1]])
    assert_close(evaluate(table, lambda x, t: Outputs(_network(x, t)), START), x_hat)


def test_edm_prediction_of_unit_deviation_is_v_prediction_with_the_other_sign() -> None:
    levels = levels_from_half_log_snr(CLEAN)
    of_v = euler(levels, Prediction(PredictionType.V_PREDICTION))
    of_f = edm_euler(levels, EDM, sigma_data=1.0)
    for row, other in zip(of_v, of_f, strict=True):
        ours, theirs = np.array(row.prev_sample.coefficients), np.array(other.prev_sample.coefficients)
        theirs[1] *= -1
        np.testing.assert_allclose(ours, theirs, atol=1e-14)


def test_edm_euler_takes_churn() -> None:
    levels = with_edm_coordinates(levels_from_half_log_snr(CLEAN), 0.5)
    churn = Churn(1.2, 0.0, math.inf, 1.0)
    assert edm_euler(levels, EDM, churn=churn) == euler(levels, EDM, churn=churn)
    assert any(edm_euler(levels, EDM, churn=churn).draws_noise)


def test_edm_sampler_shows_the_network_its_input_and_time() -> None:
    sampler = create_sampler("linear", "edm_euler", num_inference_steps=5, prediction_type="edm", sigma_data=0.7)
    levels = sampler.levels(5)
    for level in levels.points[:-1]:
        assert level.alpha**2 * 0.7**2 + level.sigma**2 == pytest.approx(1.0)
        assert level.timestep == pytest.approx(math.log(level.noise_ratio) / 4)
    assert (levels[5].alpha, levels[5].sigma) == (1.0, 0.0)
    assert sampler._prediction().sigma_data == 0.7


def test_edm_sampler_takes_sigmas_of_its_network() -> None:
    sampler = create_sampler("linear", "edm_euler", prediction_type="edm")
    sampler.set_timesteps(sigmas=[80.0, 5.0, 0.02, 0.0])
    assert sampler.table.timesteps == pytest.approx([math.log(sigma) / 4 for sigma in (80.0, 5.0, 0.02)])
    end = sampler.sample(lambda x, t: torch.zeros_like(x), torch.ones(1, 1, 2, 2), progress=False).samples
    # F = 0: each step multiplies x̂ by (σ_data² + σ̂·σ̂')/(σ_data² + σ̂²), and the last by c_skip.
    expected = math.hypot(80.0, 0.5)
    for sigma, target in itertools.pairwise([80.0, 5.0, 0.02, 0.0]):
        expected *= (0.25 + sigma * target) / (0.25 + sigma**2)
    # Three float32 steps whose factors, of c_in from 0.01 to 2, are rounded once.
    torch.testing.assert_close(end, torch.full_like(end, expected), rtol=1e-5, atol=0)


def test_edm_coordinates_refuse_pure_noise() -> None:
    with pytest.raises(ValueError, match=r"^EDM: levels\[0\] has no signal"):
        with_edm_coordinates(levels_from_flow_times([1.0, 0.5, 0.0]), 0.5)
