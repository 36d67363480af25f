# SPDX-License-Identifier: MIT
"""UniPC against the linear systems of its paper on numbers, with the last sample kept as the paper has it."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fastdiff.schedules.levels import Level, Levels, levels_from_half_log_snr
from fastdiff.solvers import Prediction, PredictionType, dpm_multistep, unipc
from support.formulas import CLEAN, GRID, START, assert_close, epsilon_of, run, x0_of
from support.solver_loops import Array


def _update(levels: Levels, i: int, x: Array, outputs: list[Array], new: Array | None, kind: str, data: bool) -> Array:
    """Step from level i by equation 3 (new is None) or 9 of arXiv 2302.04867; outputs newest first."""
    t, s = levels[i], levels[i + 1]
    h = s.half_log_snr - t.half_log_snr
    z = -h if data else h
    nodes = [(levels[i - j].half_log_snr - t.half_log_snr) / h for j in range(1, len(outputs))]
    differences = [(output - outputs[0]) / r for output, r in zip(outputs[1:], nodes, strict=True)]
    if new is not None:
        nodes, differences = [*nodes, 1.0], [*differences, new - outputs[0]]
    scale = {"bh1": z, "bh2": math.exp(z) - 1.0}[kind]
    base = s.sigma / t.sigma * x if data else s.alpha / t.alpha * x
    factor = s.alpha if data else s.sigma
    base = base - factor * (math.exp(z) - 1.0) * outputs[0]
    if not nodes:
        return base
    moments, phi = [], (math.exp(z) - 1.0) / z
    for k in range(1, len(nodes) + 1):
        phi = (phi - 1.0 / math.factorial(k)) / z
        moments.append(math.factorial(k) * phi * z / scale)
    weights = np.linalg.solve(np.array([[r**k for r in nodes] for k in range(len(nodes))]), np.array(moments))
    if len(nodes) == 1:
        weights = np.array([0.5])
    return base - factor * scale * sum(w * d for w, d in zip(weights, differences, strict=True))


@pytest.mark.parametrize("data", [True, False])
@pytest.mark.parametrize("kind", ["bh1", "bh2"])
@pytest.mark.parametrize(("order", "corrects"), [(1, True), (2, True), (3, True), (3, False)])
def test_unipc_follows_its_formula(order: int, corrects: bool, kind: str, data: bool) -> None:
    levels = levels_from_half_log_snr(CLEAN)
    n, x, outputs, last = len(levels), START, [], START
    now = 0
    for i in range(n):
        level = levels[i]
        new = x0_of(x, level.timestep) if data else epsilon_of(x, level)
        if corrects and i > 0:
            x = _update(levels, i - 1, last, outputs[:now], new, kind, data)
        outputs, last = [new, *outputs], x
        now = min(order, i + 1, n - i)
        if i == n - 1:
            # The step to σ = 0 ends at x0, which in the noise form starts from the corrected sample.
            x = new if data else (x - level.sigma * new) / level.alpha
        else:
            x = _update(levels, i, x, outputs[:now], None, kind, data)
    options = {"solver_order": order, "unipc_type": kind, "predict_x0": data, "use_corrector": corrects}
    assert_close(run(unipc(levels, Prediction(), **options)), x)  # type: ignore[arg-type]


def test_unipc_without_corrector_is_dpm_solver_pp() -> None:
    """UniP-2 with B(h) = e^h − 1 is DPM-Solver++ 2M, UniP-3 the exact form of 3M."""
    levels = levels_from_half_log_snr(GRID)
    for order in (2, 3):
        ours = unipc(levels, Prediction(), solver_order=order, use_corrector=False, lower_order_final=False)
        theirs = dpm_multistep(levels, Prediction(), solver_order=order, lower_order_final=False, third_order="exact")
        for row, other in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(row.prev_sample.coefficients, other.prev_sample.coefficients, atol=1e-13)


def test_unipc_keeps_one_output_a_row() -> None:
    """The correction is a difference of coefficients: neither the last sample nor a second output is kept."""
    table = unipc(levels_from_half_log_snr(CLEAN), Prediction(), solver_order=3)
    assert all(len(row.kept) <= 1 for row in table)
    assert max(len(row.slots_read) for row in table) == 3


def test_unipc_from_pure_noise_has_no_correction_of_its_first_step() -> None:
    points = levels_from_half_log_snr(CLEAN).points
    blank = Levels((Level(-9.0, 0.0, 1.0), *points), levels_from_half_log_snr(CLEAN).locate)
    for data in (True, False):
        table = unipc(blank, Prediction(PredictionType.V_PREDICTION), predict_x0=data)
        assert table.source[0].prev_sample.coefficients[:2] == pytest.approx((points[0].sigma, -points[0].alpha))
        assert table.read_slots[1] == ()


def test_unipc_refuses_an_unknown_type() -> None:
    with pytest.raises(ValueError, match=r"^unipc: unipc_type is 'bh3', expected one of bh1, bh2"):
        unipc(levels_from_half_log_snr(GRID), Prediction(), unipc_type="bh3")
