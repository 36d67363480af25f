# SPDX-License-Identifier: MIT
"""``fastdiff table``: what it prints, its exit codes, and its refusals."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

import fastdiff
from fastdiff.__main__ import main
from fastdiff.schedules import ScheduleValues

pytest.importorskip("typer")
pytest.importorskip("rich")


SYMBOLS = ["x", "m", "d", "h0", "h1", "h2", "h3", "z"]


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(sys, "argv", ["fastdiff", "table", *arguments])
    with pytest.raises(SystemExit) as left:
        main()
    return int(left.value.code or 0)


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    sampler = fastdiff.create_sampler("scaled_linear", "dpm_solver", num_inference_steps=4, solver_order=2)
    sampler.table.save(tmp_path / "dpm.json")
    sampler.table.save(tmp_path / "dpm.safetensors")
    fastdiff.create_sampler("scaled_linear", "ddpm", num_inference_steps=5).table.save(tmp_path / "ddpm.json")
    ScheduleValues("sigmas", [14.6, 1.5, 0.0], "a paper").save(tmp_path / "sigmas.json")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_show_prints_every_row(
    files: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    table = fastdiff.StepTable.load(files / "dpm.json")
    for name in ("dpm.json", "dpm.safetensors"):
        assert run(monkeypatch, "show", name, "--digits", "4") == 0
        out = capsys.readouterr().out
        assert f"{name}: 4 rows, fixed variance, initial scale 1.0" in out
        for row in table:
            assert f"{row.timestep:.4g}" in out
            for value, symbol in zip(row.prev_sample.coefficients, SYMBOLS, strict=True):
                assert not value or f"{value:+.4g}·{symbol}" in out
        assert "0: " in out  # the slot of a kept output
    assert run(monkeypatch, "show", "sigmas.json") == 0
    out = capsys.readouterr().out
    assert "sigmas.json: 3 sigmas, a paper" in out
    assert "14.6" in out


def test_diff_names_each_differing_cell(
    files: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "diff", "dpm.json", "dpm.safetensors") == 0
    assert "are equal in 17 digits" in capsys.readouterr().out
    document = json.loads((files / "dpm.json").read_text())
    document["rows"][2]["prev_sample"]["sample"] *= 1 + 1e-9
    (files / "other.json").write_text(json.dumps(document))
    assert run(monkeypatch, "diff", "dpm.json", "other.json") == 1
    out = capsys.readouterr().out
    assert "1 differences" in out
    assert "step" in out
    assert run(monkeypatch, "diff", "dpm.json", "other.json", "--digits", "6") == 0
    capsys.readouterr()
    assert run(monkeypatch, "diff", "dpm.json", "ddpm.json") == 1
    assert "5 rows" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("show", "missing.json"), "cannot be read"),
        (("show", "broken.json"), "no JSON"),
        (("show", "notes.txt"), ".json or .safetensors"),
        (("diff", "dpm.json", "sigmas.json"), "expected a step table"),
        (("diff", "dpm.json"), "second"),
        (("show", "dpm.json", "--digits", "0"), "--digits"),
    ],
)
def test_refusals_are_one_line(
    files: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    message: str,
) -> None:
    (files / "broken.json").write_text("{")
    (files / "notes.txt").write_text("x")
    assert run(monkeypatch, *arguments) in (1, 2)
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error
