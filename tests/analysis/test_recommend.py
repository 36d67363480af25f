# SPDX-License-Identifier: MIT
"""Recommendation: equal budgets, figures from samples that the screening has not seen, honest ties."""

from __future__ import annotations

import dataclasses
import importlib

import pytest
import torch

from fastdiff.analysis import Workload, parse_method, recommend, reference_distance
from support.analysis_cases import points_workload

SPACINGS = ("spacing=trailing", "spacing=linspace")


def test_recommendation_is_measured_on_the_second_half_at_the_budget() -> None:
    workload = points_workload()
    found = recommend(
        workload, steps=8, methods=["ddim", "dpmsolver++", "heun", "ddpm"], spacings=SPACINGS, reference_steps=40,
        rounds=2, progress=False,
    )  # fmt: skip
    assert found.screened == 6
    assert found.stochastic == ["ddpm"]
    assert found.samples == 8
    reference = workload.run(parse_method("dpmsolver++:spacing=trailing"), 40).samples[8:]
    for candidate in found.candidates:
        assert candidate.model_calls <= 8
        assert candidate.steps == (4 if candidate.method.startswith("heun") else 8)
        own = workload.run(parse_method(candidate.method), candidate.steps).samples[8:]
        distances = reference_distance(own, reference)
        assert candidate.distance.mean == pytest.approx(float(distances.mean()), rel=1e-5), (
            "the batch may change roundings"
        )
    means = [candidate.distance.mean for candidate in found.candidates]
    assert means == sorted(means)
    assert found.best.method.startswith(("dpmsolver++", "heun")), "second order wins at 8 calls"
    assert found.sentence().startswith(f"Take {found.best.method} with {found.best.steps} steps")


def test_candidates_of_equal_samples_are_tied() -> None:
    methods = ["dpmsolver++", "dpmsolver++:solver_type=midpoint", "ddim"]
    found = recommend(
        points_workload(), steps=6, methods=methods, spacings=SPACINGS[:1], reference_steps=40, rounds=1, progress=False
    )
    first, second, last = found.candidates
    assert second.tied
    assert second.behind.mean == 0.0
    assert not last.tied
    assert last.behind.mean == pytest.approx(last.distance.mean - first.distance.mean)
    assert f"do not tell it from {second.method}." in found.sentence()


def test_time_budget_sets_the_steps() -> None:
    options = {"methods": ["ddim"], "spacings": SPACINGS[:1], "reference_steps": 40, "rounds": 1, "progress": False}
    plenty = recommend(points_workload(), budget_ms=1e6, **options)  # type: ignore[arg-type]
    assert plenty.best.steps == 40, "no more steps than the schedule has timesteps"
    with pytest.raises(ValueError, match=r"^recommend: budget_ms is 1e-06, expected time for one step; raise it"):
        recommend(points_workload(), budget_ms=1e-6, **options)  # type: ignore[arg-type]


def test_budget_of_time_bounds_the_model_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Count the calls at a known time of a call, which a clock could not promise."""
    # The package's name of the same spelling is the function.
    module = importlib.import_module("fastdiff.analysis.recommend")
    monkeypatch.setattr(module._Search, "_milliseconds_per_call", lambda *_: 2.0)
    found = recommend(
        points_workload(), budget_ms=15.0, methods=["ddim", "heun"], spacings=SPACINGS[:1], reference_steps=40,
        rounds=1, progress=False,
    )  # fmt: skip
    steps = {candidate.method.split(":")[0]: candidate.steps for candidate in found.candidates}
    calls = {candidate.method.split(":")[0]: candidate.model_calls for candidate in found.candidates}
    assert steps.items() <= {"ddim": 7, "heun": 4}.items()
    assert max(calls.values()) <= 7


def test_finalists_over_the_budget_of_time_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Believe that a call takes a tenth of a nanosecond, so that every loop is over the budget."""
    module = importlib.import_module("fastdiff.analysis.recommend")
    monkeypatch.setattr(module._Search, "_milliseconds_per_call", lambda *_: 1e-7)
    options = {"spacings": SPACINGS[:1], "reference_steps": 40, "rounds": 1, "progress": False}
    found = recommend(points_workload(), budget_ms=4e-7, methods=["ddim", "dpmsolver++"], **options)  # type: ignore[arg-type]
    assert found.over_budget
    assert "That is over the budget of 4e-07 ms a loop" in found.sentence()
    (slower,) = {"ddim:spacing=trailing", "dpmsolver++:spacing=trailing"} - {found.best.method}
    assert found.unfit[slower].startswith("a loop took ")
    assert not recommend(points_workload(), steps=4, methods=["ddim"], **options).over_budget  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, r"^recommend: steps is missing, expected steps or budget_ms"),
        ({"steps": 4, "budget_ms": 3.0}, "steps is given beside budget_ms"),
        ({"steps": 0}, "steps is 0"),
        ({"budget_ms": 0.0}, "budget_ms is 0.0"),
        ({"budget_ms": float("nan")}, "budget_ms is nan"),
        ({"steps": 4, "rounds": 0}, "rounds is 0"),
        ({"steps": 4, "methods": ["nope"]}, "methods is 'nope'"),
        ({"steps": 4, "methods": ["ddpm"]}, "methods holds no deterministic method that fits"),
    ],
)
def test_bad_input_is_refused_before_sampling(arguments: dict[str, object], message: str) -> None:
    workload = dataclasses.replace(points_workload(), model=lambda x, t: pytest.fail("it samples"))
    with pytest.raises(ValueError, match=message):
        recommend(workload, progress=False, **arguments)  # type: ignore[arg-type]


def test_small_batch_is_refused() -> None:
    workload = points_workload()
    small = Workload(workload.model, workload.scheduler, torch.randn(7, 2))
    with pytest.raises(ValueError, match="workload has 7 samples, expected 8 or more"):
        recommend(small, steps=4)
