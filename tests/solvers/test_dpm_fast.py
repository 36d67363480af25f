# SPDX-License-Identifier: MIT
"""The rows of the adaptive solver, written as numbers, against those of the symbols."""

from __future__ import annotations

import random

import numpy as np
import pytest

from fastdiff.schedules.levels import Level
from fastdiff.solvers import Prediction, PredictionType
from fastdiff.solvers.dpm_fast import DIFFERENCE, LOW_ORDER, START, START_NOISE, fast_orders, step_rows, step_with_error


def _level(sigma: float) -> Level:
    return Level(sigma, 1.0, sigma)


@pytest.mark.parametrize("order", [2, 3])
def test_step_with_error_is_the_step_and_its_error(order: int) -> None:
    """A step on numbers: the result of `step_rows`, the one of lower order, and their difference."""
    sigma = random.uniform(1.0, 20.0)
    target = sigma * random.uniform(0.1, 0.9)
    numbers = np.random.default_rng(random.randrange(2**31))
    x, outputs = numbers.standard_normal(), numbers.standard_normal(order)
    rows, levels, slots = step_with_error(sigma, target, order)
    symbols = step_rows(_level(sigma), _level(target), order, Prediction(PredictionType.SAMPLE), _level)
    assert levels == [row.timestep for row in symbols]

    def walk(maps: list[list[list[float]]], kept_slots: list[list[int]]) -> tuple[float, list[float]]:
        history, current = [np.nan] * 4, x
        for (prev, *kept), slot, m in zip(maps, kept_slots, outputs, strict=True):
            entries = np.array([current, m, m, *history, 0.0])
            values = [float(np.nansum(np.where(np.array(row) == 0.0, 0.0, row * entries))) for row in (prev, *kept)]
            current = values[0]
            for place, value in zip(slot, values[1:], strict=False):
                history[place] = value
        return current, history

    result, history = walk([[row[8:16], row[16:24], row[24:32]] for row in rows], slots)
    want, _ = walk(
        [[list(row.prev_sample.coefficients), *(list(k.coefficients) for k in row.kept)] for row in symbols],
        [list(row.slots) for row in symbols],
    )
    assert result == pytest.approx(want, rel=1e-12)
    assert history[DIFFERENCE] == pytest.approx(history[LOW_ORDER] - result, rel=1e-9, abs=1e-12)
    noise = (x - outputs[0]) / sigma
    assert history[START_NOISE] == pytest.approx(noise)
    near = sigma * (target / sigma) ** (1 / order)
    low = x - (sigma - target) * noise
    if order == 3:
        assert history[START] == x
        inner = x - (sigma - near) * noise
        low -= 1.5 * (sigma - target) * ((inner - outputs[1]) / near - noise)
    assert history[LOW_ORDER] == pytest.approx(low, rel=1e-12)
    for row, slot in zip(rows, slots, strict=True):
        assert row[6 : 6 + len(slot)] == slot


def test_fast_orders_add_up() -> None:
    for calls in range(1, 40):
        orders = fast_orders(calls)
        assert sum(orders) == calls
        assert all(1 <= order <= 3 for order in orders)
