# SPDX-License-Identifier: MIT
"""Cached model calls beside an explicit loop that extrapolates the outputs with torch; calls counted."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastdiff import create_noise_scheduler, create_sampler, ops
from fastdiff.sampling import CachedCalls, CachedStepper, Stepper
from fastdiff.solvers.cached_calls import cached_table, extrapolation_weights

STEPS = 9
SHAPE = (3, 4, 5)
CASES: dict[str, dict[str, Any]] = {
    "ddim": {"method": "ddim"},
    "clipped": {"method": "ddim", "clip": True},
    "thresholded": {"method": "ddim", "thresholding": True},
    "second order": {"method": "dpm_solver", "solver_order": 2},
    "third order": {"method": "dpm_solver", "solver_order": 3},
    "stochastic": {"method": "dpm_solver", "algorithm_type": "sde-dpmsolver++", "clip": True},
}


@functools.lru_cache
def sampler_of(kind: str) -> Any:
    options = dict(CASES[kind])
    scheduler = create_noise_scheduler("cosine", clip_sample=options.pop("clip", False))
    return create_sampler(scheduler, num_inference_steps=STEPS, guidance_scale=1.0, **options)


def model(x: Tensor, t: float) -> Tensor:
    return torch.sin(x * (1.0 + t / 1000.0)) + 0.1 * x


def extrapolated(past: list[tuple[float, Tensor]], time: float, kind: str, order: int) -> Tensor:
    """Extrapolate with numpy's polynomials; `past` has the newest first."""
    times = np.array([t for t, _ in past])
    values = torch.stack([v for _, v in past])
    if kind == "linear":
        if len(past) == 1:
            return values[0]
        return values[0] + (time - times[0]) / (times[0] - times[1]) * (values[0] - values[1])
    if kind == "taylor":
        total, level, factor = values[0], values, 1.0
        for i in range(1, min(order, len(past) - 1) + 1):
            gaps = torch.tensor(times[: len(level) - 1] - times[1 : len(level)])
            level = (level[:-1] - level[1:]) / gaps.reshape(-1, *[1] * len(SHAPE[1:]))
            factor *= (time - times[0]) / i
            total = total + factor * level[0]
        return total
    scaled = 2.0 * (np.append(times, time) - min(*times, time)) / (max(*times, time) - min(*times, time) or 1.0) - 1.0
    if len(past) == 1:
        scaled = np.zeros(2) if time == times[0] else scaled
    phi = np.polynomial.chebyshev.chebvander(scaled, min(order, len(past) - 1))
    ridge = np.vstack([phi[:-1], np.sqrt(1e-3) * np.eye(phi.shape[1])])
    weights = phi[-1] @ np.linalg.pinv(ridge)[:, : len(past)]
    return torch.tensordot(torch.tensor(weights), values, dims=1)


def explicit_loop(kind: str, x: Tensor, called: list[set[int]], how: dict[str, Any], room: int) -> Tensor:
    """Step each sample by itself, with outputs extrapolated by torch."""
    results = []
    for b in range(len(x)):
        stepper = Stepper(
            sampler_of(kind).table, sample_max_value=1.3, seeds=[40 + b] if kind == "stochastic" else None
        )
        y, past = x[b : b + 1], []
        for i, row in enumerate(sampler_of(kind).table):
            if i in called[b]:
                m = model(y, row.timestep)
                past = [(row.timestep, m[0]), *past][:room]
            else:
                m = extrapolated(past, row.timestep, how["extrapolation"], how["order"])[None]
            y = stepper.step(y, m)
        results.append(y)
    return torch.cat(results)


WAYS = [
    {"extrapolation": "linear", "order": 1},
    {"extrapolation": "taylor", "order": 0},
    {"extrapolation": "taylor", "order": 2},
    {"extrapolation": "chebyshev", "order": 1},
    {"extrapolation": "chebyshev", "order": 2},
]


@pytest.mark.parametrize("how", WAYS, ids=lambda how: f"{how['extrapolation']} {how['order']}")
@pytest.mark.parametrize("kind", CASES)
def test_skip_lists_of_samples_equal_an_explicit_loop(kind: str, how: dict[str, Any]) -> None:
    table = sampler_of(kind).table
    room = 4 - len({slot for slots in table.kept_slots for slot in slots})
    skips = [{3, 5, 6}, {2, 7}, set()]
    seeds = [40, 41, 42] if kind == "stochastic" else None
    cached = CachedStepper(table, CachedCalls(skip=skips, **how), sample_max_value=1.3, seeds=seeds)
    x = y = torch.randn(SHAPE, dtype=torch.float64)
    for row in table:
        chosen = cached.samples_to_call(x)
        x = cached.step(x, model(x if chosen is None else x[chosen], row.timestep))
    assert cached.calls_made == 3 * STEPS - 5
    called = [set(range(STEPS)) - skip for skip in skips]
    # Float64 rounding, times extrapolation weights of up to 10 in a row.
    torch.testing.assert_close(x, explicit_loop(kind, y, called, how, room), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ["ddim", "second order", "third order"])
def test_cached_table_is_a_table_of_any_stepper(kind: str) -> None:
    skip = {2, 4, 5}
    table = cached_table(sampler_of(kind).table, skip, extrapolation="taylor", order=1)
    stepper = Stepper(table)
    x = y = torch.randn(SHAPE, dtype=torch.float64)
    for i, row in enumerate(table):
        m = torch.full_like(x, float("nan")) if i in skip else model(x, row.timestep)
        x = stepper.step(x, m)  # NaN where the model output is not read
    room = 4 - len({slot for slots in sampler_of(kind).table.kept_slots for slot in slots})
    called = [set(range(STEPS)) - skip] * 3
    wanted = explicit_loop(kind, y, called, {"extrapolation": "taylor", "order": 1}, room)
    torch.testing.assert_close(x, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("threshold", [0.25, [0.0, 0.3, 1e9]])
def test_thresholds_call_by_accumulated_change(threshold: Any) -> None:
    table = sampler_of("second order").table
    policy = CachedCalls(threshold=threshold, first_calls=2, last_calls=1, longest=2)
    cached = CachedStepper(table, policy)
    limits = threshold if isinstance(threshold, list) else [threshold] * 3
    x = torch.randn(SHAPE, dtype=torch.float64)
    sums, skipped, last = [0.0] * 3, [0] * 3, None
    saved = 0
    for i, row in enumerate(table):
        wanted = []
        for b in range(3):
            if last is not None:
                sums[b] += float((x[b] - last[b]).norm() / last[b].norm())
            call = i < 2 or i == STEPS - 1 or sums[b] >= limits[b] or skipped[b] >= 2
            if call:
                wanted.append(b)
                sums[b] = 0.0
            skipped[b] = 0 if call else skipped[b] + 1
        chosen = cached.samples_to_call(x)
        assert (chosen is None and len(wanted) == 3) or chosen.tolist() == wanted
        saved += 3 - len(wanted)
        last = x
        x = cached.step(x, model(x if chosen is None else x[chosen], row.timestep) if wanted else None)
    assert saved > 0
    assert cached.calls_made == 3 * STEPS - saved


def test_step_is_one_pass_and_guidance_is_kept_combined(monkeypatch: pytest.MonkeyPatch) -> None:
    table = sampler_of("second order").table
    cached = CachedStepper(table, CachedCalls(skip=[[3], [5]]), backend="reference")
    combined = CachedStepper(table, CachedCalls(skip=[[3], [5]]))
    x = y = torch.randn(2, 4, 5, dtype=torch.float64)
    passes: list[str] = []
    for name in ("step", "step_rows"):
        function = getattr(ops, name)
        monkeypatch.setattr(ops, name, lambda *a, _f=function, _n=name, **k: (passes.append(_n), _f(*a, **k))[1])
    for row in table:
        c, u = model(x, row.timestep), 0.5 * model(x, row.timestep + 30.0)
        passes.clear()
        x = cached.step(x, c, uncond=u, guidance_scale=3.0)
        assert passes == ["step_rows"]
        y = combined.step(y, u + 3.0 * (c - u))
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-9)


def test_polynomials_are_extrapolated_exactly() -> None:
    times = [1.0, 2.5, 4.0]
    line = np.array([3.0 - 2.0 * t for t in times])
    assert np.dot(extrapolation_weights(times, -1.0, "linear"), line) == pytest.approx(5.0)
    parabola = np.array([1.0 + t * t for t in times])
    weights = extrapolation_weights(times, -1.0, "chebyshev", 2, ridge=0.0)
    assert np.dot(weights, parabola) == pytest.approx(2.0)
    assert sum(extrapolation_weights(times, -1.0, "taylor", 2)) == pytest.approx(1.0)


def test_malformed_policies_are_named() -> None:
    table = sampler_of("ddim").table
    unipc_like = create_sampler("cosine", "dpm_solver", num_inference_steps=4, solver_order=3, guidance_scale=1.0)
    for make, words in (
        (lambda: CachedStepper(table, CachedCalls(skip=[0, 3])), "skip"),
        (lambda: CachedStepper(table, CachedCalls(skip=[3, 99])), "skip"),
        (lambda: CachedCalls(skip=[1], threshold=0.1), "threshold"),
        (lambda: CachedCalls(extrapolation="cubic"), "extrapolation"),
        (lambda: CachedCalls(order=-1), "order"),
        (lambda: cached_table(sampler_of("clipped").table, [3]), "clips x0"),
        (lambda: cached_table(sampler_of("thresholded").table, [3]), "thresholds x0"),
        (lambda: CachedStepper(unipc_like.table, CachedCalls(skip=[[1]])).samples_to_call(torch.randn(2, 3)), "skip"),
    ):
        with pytest.raises(ValueError, match=words):
            make()
    cached = CachedStepper(table, CachedCalls(skip=[1]))
    x = torch.randn(2, 3)
    for output, words in ((None, "model_output"), (x[:1], "model_output"), (x[:, :2], "model_output")):
        with pytest.raises((TypeError, ValueError), match=words):
            cached.step(x, output)
    assert cached.index == cached.calls_made == 0
