# SPDX-License-Identifier: MIT
"""The command line, run as a user runs it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from children import child_environment
from fastdiff.cli import SAMPLERS, parse_classes, print_environment
from fastdiff.images import GAP, save_grid

pytest.importorskip("typer")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "fastdiff", *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=child_environment(),
    )


def test_sample_writes_a_grid_and_prints_its_figures(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    out = tmp_path / "grid.png"
    done = run("sample", "--classes", "0-2", "--n", "6", "--steps", "4", "--seed", "1", "--out", str(out))
    assert done.returncode == 0, done.stderr
    assert "images/s" in done.stdout
    assert "% of the time in the step" in done.stdout
    assert "4/4" in done.stderr, "the progress bar is shown"
    with image.open(out) as picture:
        # Three rows of two digits, each pixel drawn four times as wide.
        assert picture.size == (2 * (32 + GAP) + GAP, 3 * (32 + GAP) + GAP)
        assert len(picture.getcolors(1 << 16)) > 16, "a picture, not a blank"


def test_sample_gives_the_same_picture_for_the_same_seed(tmp_path: Path) -> None:
    pictures = {}
    for name, seed in (("a", "3"), ("b", "3"), ("c", "4")):
        out = tmp_path / f"{name}.png"
        done = run("sample", "--n", "2", "--classes", "7", "--steps", "3", "--quiet", "--seed", seed, "--out", str(out))
        assert done.returncode == 0, done.stderr
        assert "step/s" not in done.stderr, "--quiet shows no bar"
        pictures[name] = out.read_bytes()
    assert pictures["a"] == pictures["b"] != pictures["c"]


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_name_samples(name: str, tmp_path: Path) -> None:
    from fastdiff.cli import draw_digits

    out = tmp_path / "grid.png"
    draw_digits(
        {**SAMPLERS[name], "num_inference_steps": 3},
        guidance=1.5,
        classes="4",
        n=1,
        seed=0,
        out=out,
        device="cpu",
        backend=None,
        progress=False,
    )
    assert out.stat().st_size > 0


def test_env_names_every_backend_and_why_one_is_missing() -> None:
    done = run("env")
    assert done.returncode == 0, done.stderr
    text = " ".join(done.stdout.split())
    for word in ("torch", "cpu", "cuda", "triton", "reference", "available", "torch's noise: "):
        assert word in text
    if not torch.cuda.is_available():
        assert "without CUDA" in text or "no CUDA device" in text or "not built" in text


@pytest.mark.parametrize(
    ("reason", "line"),
    [("", "torch's noise: drawn by fastdiff's loop"), ("of [this]", "torch's noise: by torch: of [this]")],
)
def test_env_says_who_draws_torchs_noise(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], reason: str, line: str
) -> None:
    monkeypatch.setattr("fastdiff.cli.why_by_torch", lambda: reason)
    print_environment()
    assert line in capsys.readouterr().out


def test_env_prints_the_extra_that_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Square brackets are markup to rich, and have to come out all the same."""
    monkeypatch.setattr("fastdiff.cli.ops.backend_status", lambda: {"triton": "pip install 'x[triton]'"})
    print_environment()
    assert "pip install 'x[triton]'" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--sampler", "nope"), ("--sampler", "nope", "dpmsolver++")),
        (("--classes", "8-12"), ("--classes", "12", "0 to 9")),
        (("--classes", "a"), ("--classes", "0-9")),
        (("--n", "0"), ("--n", "1 or more")),
        (("--steps", "0"), ("num_inference_steps", "0")),
        (("--eta", "-1"), ("eta", "-1")),
        (("--out", "/no/such/folder/x.png"), ("--out", "/no/such/folder")),
        (("--backend", "cuda"), ("cuda", "missing")),
    ],
)
def test_sample_refuses_bad_input_in_a_sentence(arguments: tuple[str, ...], words: tuple[str, ...]) -> None:
    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("there is a GPU to answer")
    done = run("sample", *arguments)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in done.stderr


@pytest.mark.parametrize(
    ("text", "labels"), [("0-2", [0, 1, 2]), ("3", [3]), ("1,4,7-9", [1, 4, 7, 8, 9]), ("2,1-3", [2, 1, 3])]
)
def test_parse_classes_reads_labels_and_ranges(text: str, labels: list[int]) -> None:
    assert parse_classes(text, 10) == labels


def test_save_grid_places_each_image(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    samples = torch.stack([torch.full((3, 2, 2), value) for value in (-1.0, 0.0, 1.0)])
    save_grid(samples, tmp_path / "grid.png", columns=2, scale=3)
    with image.open(tmp_path / "grid.png") as picture:
        side = 2 * 3 + GAP
        assert picture.size == (2 * side + GAP, 2 * side + GAP)
        assert picture.getpixel((GAP, GAP)) == (0, 0, 0)
        assert picture.getpixel((GAP + side, GAP)) == (128, 128, 128)
        assert picture.getpixel((GAP, GAP + side)) == (255, 255, 255)


@pytest.mark.parametrize("shape", [(0, 1, 8, 8), (2, 2, 8, 8), (1, 8, 8)])
def test_save_grid_refuses_what_is_no_image(shape: tuple[int, ...], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="samples has shape"):
        save_grid(torch.zeros(shape), tmp_path / "grid.png", columns=1)
