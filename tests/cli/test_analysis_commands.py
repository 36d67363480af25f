# SPDX-License-Identifier: MIT
"""``fastdiff compare``, ``recommend`` and ``plot``, run in this process."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("typer")
pytest.importorskip("matplotlib")

MODEL = """
import torch, fastdiff
from fastdiff.analysis import GaussianMixture, Workload

def ring():
    scheduler = fastdiff.create_noise_scheduler("linear", num_train_timesteps=40, beta_end=0.3)
    return Workload(GaussianMixture.ring().model(scheduler), scheduler, fastdiff.randn((16, 2), range(16)), name="ring")

def wrong():
    return 3

number = 3
"""


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Return a folder with a model of the user's, which is the current one."""
    (tmp_path / "ring_of_the_user.py").write_text(MODEL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path  # type: ignore[misc]
    sys.modules.pop("ring_of_the_user", None)


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    from fastdiff import __main__

    monkeypatch.setattr(sys, "argv", ["fastdiff", *arguments])
    with pytest.raises(SystemExit) as ended:
        __main__.main()
    return int(ended.value.code or 0)


USER = ("--model", "ring_of_the_user:ring")


def test_compare_writes_report_and_figures(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ("compare", *USER, "--methods", "ddim,dpmsolver++", "--steps", "4,8", "--rounds", "1", "--out", "report/")
    assert run(monkeypatch, *command) == 0
    captured = capsys.readouterr()
    assert sorted(path.name for path in (folder / "report").iterdir()) == ["figures.json", "index.html"]
    text = (folder / "report" / "index.html").read_text()
    assert text.startswith("<!DOCTYPE html>")
    rows = json.loads((folder / "report" / "figures.json").read_text())["rows"]
    assert [(row["method"], row["steps"]) for row in rows] == [
        ("ddim", 4), ("ddim", 8), ("dpmsolver++", 4), ("dpmsolver++", 8),
    ]  # fmt: skip
    assert "4 runs of 16 samples; report/index.html" in captured.out
    assert "6/6" in captured.err, "the progress bar is shown"


def test_recommend_prints_the_choice(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = (
        "recommend",
        *USER,
        "--steps",
        "6",
        "--methods",
        "ddim,dpmsolver++:spacing=trailing,ddpm",
        "--rounds",
        "1",
    )
    assert run(monkeypatch, *command, "--reference-steps", "40", "--quiet") == 0
    captured = capsys.readouterr()
    out = " ".join(captured.out.split())
    assert "Take " in out
    assert "with 6 steps (6 model calls," in out
    assert "distance: root mean square from 40 steps of dpmsolver++:spacing=trailing, itself known to " in out
    assert "date: " in out
    assert "left out, since they draw noise: ddpm" in out
    assert captured.err == ""


@pytest.mark.parametrize(
    "arguments",
    [
        ("schedule", "linear,cosine"),
        ("spacing", "--spacings", "leading,trailing", "--steps", "5"),
        ("film", *USER, "--steps", "4", "--quiet", "--frames", "3"),
        ("cloud", "--steps", "4", "--n", "50", "--quiet"),
        ("quality", *USER, "--methods", "ddim", "--steps", "3,6", "--quiet", "--reference-steps", "9"),
        ("convergence", "--methods", "ddim", "--steps", "10,20", "--quiet"),
    ],
    ids=lambda arguments: arguments[0],
)
def test_plot_writes_picture(
    arguments: tuple[str, ...], folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "plot", *arguments, "--out", "p.png") == 0
    assert (folder / "p.png").read_bytes().startswith(b"\x89PNG")
    captured = capsys.readouterr()
    assert captured.out.endswith("p.png\n")
    assert captured.err == ""


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("compare", *USER, "--methods", "nope"), ("methods", "nope", "dpmsolver++")),
        (("compare", *USER, "--methods", ","), ("--methods", "names with commas")),
        (("compare", *USER, "--steps", "5,x"), ("--steps", "5,x")),
        (("compare", *USER, "--steps", "99", "--methods", "ddim"), ("num_inference_steps", "99")),
        (("compare", "--model", "nope"), ("--model", "digits or module:function")),
        (("compare", "--model", "no_such_module:f"), ("--model", "no_such_module")),
        (("compare", "--model", "ring_of_the_user:nope"), ("--model", "nope")),
        (("compare", "--model", "ring_of_the_user:number"), ("--model", "a value of type int")),
        (("compare", "--model", "ring_of_the_user:wrong"), ("--model", "type int", "Workload")),
        (("compare", "--n", "0"), ("--n", "1 to 10000")),
        (("compare", "--seed", "-1"), ("--seed", "0 to 4294967295")),
        (("compare", *USER, "--methods", "ddim", "--steps", "4", "--out", "/proc/nope"), ("--out", "/proc/nope")),
        (("recommend", *USER), ("steps", "budget_ms")),
        (("recommend", *USER, "--budget-ms", "-1"), ("budget_ms", "-1")),
        (("plot", "schedule", "nope"), ("nope", "cosine")),
        (("plot", "schedule", "--out", "p.gif"), ("--out", "p.gif", ".png")),
        (("plot", "spacing", "--spacings", "nope"), ("spacings", "nope")),
        (("plot", "quality", "--metric", "nope"), ("--metric", "nope", "distance")),
        (("plot", "cloud", "--n", "0"), ("--n", "100000")),
        (("plot", "film", "--method", "nope"), ("nope", "ddim")),
        (("plot", "convergence", "--steps", "10"), ("steps", "two numbers")),
    ],
)
def test_bad_input_is_refused_in_one_line(
    arguments: tuple[str, ...], words: tuple[str, ...], folder: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr("fastdiff.samplers.BaseSampler.sample", lambda *_, **__: pytest.fail("it samples"))
    assert (
        run(monkeypatch, *arguments, *(() if "--out" in arguments or "recommend" in arguments else ("--out", "x.png")))
        == 2
    )
    (line,) = capsys.readouterr().err.splitlines()
    for word in words:
        assert word in line
    assert not list(folder.glob("*.png"))


def test_missing_plots_extra_is_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    for arguments in (("plot", "schedule"), ("compare", *USER)):
        assert run(monkeypatch, *arguments) == 2
        assert "pip install 'fastdiff-kernels[plots]'" in capsys.readouterr().err
    assert not (folder / "report").exists()
