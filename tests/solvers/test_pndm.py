# SPDX-License-Identifier: MIT
"""PNDM against its formulas on numbers: both starts, and the steps after them."""

from __future__ import annotations

import numpy as np
import pytest

from fastdiff.schedules.levels import Level, levels_from_half_log_snr, levels_from_timesteps
from fastdiff.schedules.noise_schedulers import create_noise_scheduler
from fastdiff.solvers import Prediction, pndm
from support.formulas import CLEAN, START, assert_close, epsilon_of, run
from support.solver_loops import Array

BASHFORTH = {2: [3 / 2, -1 / 2], 3: [23 / 12, -16 / 12, 5 / 12], 4: [55 / 24, -59 / 24, 37 / 24, -9 / 24]}


def _transfer(x: Array, noise: Array, t: Level, s: Level) -> Array:
    """Equation 9 of arXiv 2202.09778, in its ᾱ."""
    a, b = t.alpha**2, s.alpha**2
    return np.sqrt(b / a) * x - (b - a) / (a * np.sqrt(1 - b) + np.sqrt(a * (1 - a) * b)) * noise


@pytest.mark.parametrize("skip", [False, True])
def test_pndm_follows_its_formula(skip: bool) -> None:
    levels = levels_from_half_log_snr(CLEAN)
    x, outputs = START, []
    for i in range(len(levels)):
        t, s = levels[i], levels[i + 1]
        noise = epsilon_of(x, t)
        outputs = [noise, *outputs][:4]
        if skip and i == 0:
            noise = (noise + epsilon_of(_transfer(x, noise, t, s), s)) / 2
        elif not skip and i < 3:
            middle = levels.locate(np.sqrt(t.noise_ratio * s.noise_ratio))
            second = epsilon_of(_transfer(x, noise, t, middle), middle)
            third = epsilon_of(_transfer(x, second, t, middle), middle)
            fourth = epsilon_of(_transfer(x, third, t, s), s)
            noise = (noise + 2 * second + 2 * third + fourth) / 6
        else:
            noise = sum(b * e for b, e in zip(BASHFORTH[len(outputs)], outputs, strict=True))
        x = _transfer(x, noise, t, s)
    table = pndm(levels, Prediction(), skip_prk_steps=skip)
    assert len(table) == len(levels) + (1 if skip else 9)
    assert_close(run(table), x)


def test_pndm_calls_the_model_halfway_in_the_timestep() -> None:
    alphas_cumprod = create_noise_scheduler("linear").alphas_cumprod
    table = pndm(levels_from_timesteps(alphas_cumprod, [900, 700, 500, 300, 100]), Prediction(), skip_prk_steps=False)
    assert table.timesteps == (900, 800, 800, 700, 700, 600, 600, 500, 500, 400, 400, 300, 300, 100)


def test_pndm_of_one_step_makes_one_call() -> None:
    levels = levels_from_half_log_snr([0.3, np.inf])
    assert len(pndm(levels, Prediction())) == len(pndm(levels, Prediction(), skip_prk_steps=False)) == 1
