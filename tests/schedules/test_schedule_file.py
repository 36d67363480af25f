# SPDX-License-Identifier: MIT
"""Schedules as files: the numbers come back to the bit, serve samplers, and a malformed file is one sentence."""

from __future__ import annotations

import json
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fastdiff
from fastdiff.samplers import TableSampler
from fastdiff.schedules import ScheduleKind, ScheduleValues
from fastdiff.schedules.levels import levels_from_sigmas, levels_from_timesteps
from fastdiff.schedules.sigmas import ALIGN_YOUR_STEPS
from fastdiff.solvers import Prediction, dpm_multistep


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("schedules")


unit = st.floats(0.0, 1.0)
POSITIVE = st.lists(st.floats(0.0, 1e300), min_size=1, max_size=5, unique=True)


@given(
    schedule=st.one_of(
        st.builds(ScheduleValues, st.just("betas"), st.lists(st.floats(0.0, 1.0, exclude_max=True), min_size=1)),
        st.builds(ScheduleValues, st.just("alphas_cumprod"), st.lists(unit, min_size=1).map(lambda v: sorted(v)[::-1])),
        st.builds(ScheduleValues, st.just("timesteps"), POSITIVE.map(lambda v: sorted(v)[::-1]), st.text()),
        st.builds(ScheduleValues, st.just("sigmas"), POSITIVE.map(lambda v: sorted(v)[::-1]), st.just("a paper")),
    )
)
def test_any_schedule_comes_back_to_the_bit(folder: Path, schedule: ScheduleValues) -> None:
    schedule.save(folder / "schedule.json")
    found = ScheduleValues.load(folder / "schedule.json")
    assert found == schedule
    assert list(map(repr, found.values)) == list(map(repr, schedule.values))


def model(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return (x * (t[:, None] / 1000 + 0.5)).tanh()


def test_betas_from_a_file_are_a_custom_schedule(tmp_path: Path) -> None:
    betas = torch.rand(20, dtype=torch.float64) * 0.1
    ScheduleValues("betas", betas, "learned").save(tmp_path / "betas.json")
    values = ScheduleValues.load(tmp_path / "betas.json").values
    scheduler = fastdiff.create_noise_scheduler("custom_betas", custom_betas=values)
    assert torch.equal(scheduler.betas, betas)
    assert (
        fastdiff.create_sampler(scheduler, "ddim", num_inference_steps=5)
        .sample(model, torch.randn(2, 3), progress=False)
        .steps
        == 5
    )


@pytest.mark.parametrize("kind", ["sigmas", "timesteps"])
def test_published_steps_from_a_file_serve_a_sampler(kind: str, tmp_path: Path) -> None:
    """Align Your Steps publishes noise levels (arXiv 2404.14507); timesteps stand for a learned list."""
    published = {"sigmas": ALIGN_YOUR_STEPS["sd1"], "timesteps": (999.0, 850.0, 601.5, 277.0, 13.0)}[kind]
    ScheduleValues(kind, published, "arXiv 2404.14507").save(tmp_path / "steps.json")
    found = ScheduleValues.load(tmp_path / "steps.json")
    assert found.values == published
    scheduler = fastdiff.create_noise_scheduler("scaled_linear", beta_start=0.00085, beta_end=0.012)
    sampler = fastdiff.create_sampler(scheduler, "dpm_solver", num_inference_steps=5)
    latents = torch.randn(2, 3)
    named: dict[str, Any] = {kind: found.values}
    by_file = sampler.sample(model, latents, progress=False, **named)
    assert torch.equal(by_file.samples, sampler.sample(model, latents, progress=False, **{kind: published}).samples)

    make = levels_from_sigmas if kind == "sigmas" else levels_from_timesteps
    table = dpm_multistep(make(scheduler.alphas_cumprod, list(found.values)), Prediction())
    assert len(table) == len(by_file.sigmas) - 1
    table.save(tmp_path / "table.json")
    again = TableSampler(fastdiff.StepTable.load(tmp_path / "table.json"), scheduler)
    assert torch.equal(again.sample(model, latents, progress=False).samples, by_file.samples)


JUNK = st.one_of(
    st.none(),
    st.text(max_size=3),
    st.floats(),
    st.lists(st.one_of(st.floats(), st.booleans(), st.text(max_size=2), st.none(), st.integers()), max_size=4),
    st.dictionaries(st.text(max_size=2), st.floats(), max_size=2),
    st.builds(lambda v: torch.tensor([v]), st.lists(st.floats(), max_size=3)),
)


@given(junk=JUNK, kind=st.sampled_from(["timesteps", "sigmas"]))
def test_malformed_steps_are_one_sentence_and_change_nothing(junk: Any, kind: str) -> None:
    sampler = fastdiff.create_sampler("linear", "ddim", num_inference_steps=3)
    before = dict(vars(sampler))
    try:
        sampler.set_timesteps(**{kind: junk})
    except (TypeError, ValueError) as error:
        message = str(error)
    else:  # the numbers were a schedule
        assert bool(torch.isfinite(sampler.table.coefficients[:, :2]).all())
        return
    assert "\n" not in message
    assert all(vars(sampler)[name] is value for name, value in before.items())


@given(junk=JUNK, kind=st.sampled_from(["custom_betas", "custom_alphas_cumprod"]))
def test_malformed_noise_schedules_are_one_sentence(junk: Any, kind: str) -> None:
    try:
        scheduler = fastdiff.create_noise_scheduler(kind, **{kind: junk})
    except (TypeError, ValueError) as error:
        message = str(error)
    else:
        assert bool(((scheduler.alphas_cumprod >= 0) & (scheduler.alphas_cumprod <= 1)).all())
        return
    assert "\n" not in message


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        ("betas", [0.1, 1.0], r"values\[1\] is 1\.0"),
        ("betas", [-0.1], "betas in"),
        ("alphas_cumprod", [0.9, 0.95], "descending alphas_cumprod"),
        ("alphas_cumprod", [1.1], "in \\[0, 1\\]"),
        ("timesteps", [5.0, 5.0], "descending timesteps"),
        ("timesteps", [5.0, -1.0], "from 0"),
        ("sigmas", [1.0, 2.0], "descending sigmas"),
        ("sigmas", [math.nan], "finite number"),
        ("sigmas", [math.inf, 1.0], "finite number"),
        ("sigmas", [], "is empty"),
        ("sigmas", ["1"], "finite number"),
        ("sigmas", [True], "finite number"),
        ("sigmas", [10**400], "an integer of 1329 bits"),
    ],
)
def test_malformed_numbers_are_one_sentence(kind: str, values: list[Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        ScheduleValues(kind, values)
    assert "\n" not in str(raised.value)
    path = tmp_path / "bad.json"
    path.write_text(json.dumps({"format": "fastdiff-schedule", "version": 1, "kind": kind, "values": values}))
    with pytest.raises(ValueError, match=r"^ScheduleValues\.load: path ") as raised:
        ScheduleValues.load(path)
    assert "\n" not in str(raised.value)


def fields(**changed: Any) -> bytes:
    usual = {"format": "fastdiff-schedule", "version": 1, "kind": "sigmas", "values": [1.0]}
    return json.dumps({name: value for name, value in {**usual, **changed}.items() if value is not None}).encode()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no JSON"),
        (pickle.dumps({"kind": "betas"}), "no JSON"),
        (fields(more=1), "unknown field"),
        (fields(values=None), "no field 'values'"),
        (fields(kind=[]), "kind is a list of 0"),
        (fields(values=1.0), "expected a list"),
        (fields(values=[math.nan]), "NaN"),
        (fields(source=1), "source is 1"),
        (fields(version=9), "version is 9"),
        (fields(format="fastdiff-step-table"), "format"),
    ],
)
def test_malformed_files_are_one_sentence(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as raised:
        ScheduleValues.load(path)
    assert "\n" not in str(raised.value)
    assert type(raised.value) is ValueError


def test_unknown_kind_and_missing_file() -> None:
    with pytest.raises(ValueError, match="alphas_cumprod, betas, sigmas, timesteps"):
        ScheduleValues("gammas", [0.1])
    assert ScheduleValues(ScheduleKind.SIGMAS, (2, 1)).values == (2.0, 1.0)
    with pytest.raises(FileNotFoundError, match="cannot be read"):
        ScheduleValues.load("/nonexistent/schedule.json")
