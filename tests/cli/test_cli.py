# SPDX-License-Identifier: MIT
"""Command line, run like a user runs it."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastdiff.analysis.images import GAP, save_grid
from fastdiff.cli import ALIASES, SAMPLERS, parse_classes, print_environment
from support.child_environment import child_environment

pytest.importorskip("typer")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "fastdiff", *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=child_environment(),
    )


def test_sample_writes_grid_and_prints_figures(tmp_path: Path) -> None:
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


def test_sample_is_reproducible_for_seed(tmp_path: Path) -> None:
    pictures = {}
    for name, seed in (("a", "3"), ("b", "3"), ("c", "4")):
        out = tmp_path / f"{name}.png"
        done = run("sample", "--n", "2", "--classes", "7", "--steps", "3", "--quiet", "--seed", seed, "--out", str(out))
        assert done.returncode == 0, done.stderr
        assert "step/s" not in done.stderr, "--quiet shows no bar"
        pictures[name] = out.read_bytes()
    assert pictures["a"] == pictures["b"] != pictures["c"]


def test_aliases_are_the_methods_whose_names_are_spelt_otherwise() -> None:
    assert set(ALIASES) >= {"dpm_solver", "euler_ancestral"}
    assert not set(ALIASES) & set(SAMPLERS)


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_name_works(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    out = tmp_path / "grid.png"
    options = ("--steps", "3", "--guidance-scale", "1.5", "--classes", "4", "--n", "1", "--quiet", "--out", str(out))
    assert run_here(monkeypatch, "sample", "--sampler", name, *options) == 0
    assert out.stat().st_size > 0


def test_env_lists_backends_with_reasons() -> None:
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
def test_env_reports_who_draws_torch_noise(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], reason: str, line: str
) -> None:
    monkeypatch.setattr("fastdiff.cli.environment.why_by_torch", lambda: reason)
    print_environment()
    assert line in capsys.readouterr().out


def test_env_names_missing_extra(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Square brackets are markup in rich and have to be printed literally."""
    monkeypatch.setattr("fastdiff.ops.backend_status", lambda: {"triton": "pip install 'x[triton]'"})
    print_environment()
    assert "pip install 'x[triton]'" in capsys.readouterr().out


def run_here(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Run `fastdiff` with these arguments in this process; return the exit code."""
    from fastdiff import __main__

    monkeypatch.setattr(sys, "argv", ["fastdiff", *arguments])
    with pytest.raises(SystemExit) as ended:
        __main__.main()
    return int(ended.value.code or 0)


def sentence_on(stderr: str) -> str:
    """Return the one line that a refused command prints."""
    (line,) = stderr.splitlines()
    assert line.startswith("fastdiff: ")
    return line


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--sampler", "nope"), ("--sampler", "nope", "dpmsolver++")),
        (("--classes", "8-12"), ("--classes", "12", "0 to 9")),
        (("--classes", "a"), ("--classes", "0-9")),
        (("--classes", ""), ("--classes", "0-9")),
        (("--classes", "9-0"), ("--classes", "'9-0'")),
        (("--classes", "0-999999999"), ("--classes", "999999999", "0 to 9")),
        (("--classes", "9" * 5000), ("--classes", "0-9")),
        (("--classes", "²"), ("--classes", "0-9")),
        (("--n", "0"), ("--n", "1 to 10000")),
        (("--n", "1000000000"), ("--n", "1 to 10000")),
        (("--n", "many"), ("--n", "fastdiff sample --help")),
        (("--nope",), ("--nope", "fastdiff sample --help")),
        (("--steps", "0"), ("num_inference_steps", "0")),
        (("--steps", "100000"), ("num_inference_steps", "100000", "1000")),
        (("--seed", "-1"), ("--seed", "0 to 4294967295")),
        (("--seed", str(2**64)), ("--seed", "0 to 4294967295")),
        (("--guidance", "nan"), ("guidance_scale", "nan")),
        (("--guidance-scale", "nan"), ("guidance_scale", "nan")),
        (("--guidance", "inf"), ("guidance_scale", "inf")),
        (("--order", "9"), ("solver_order", "9")),
        (("--eta", "-1"), ("eta", "-1")),
        (("--out", "/no/such/folder/x.png"), ("--out", "/no/such/folder", "No such file")),
        (("--out", "/proc/x.png"), ("--out", "'/proc/x.png'")),
        (("--out", "."), ("--out", "ending such as .png")),
        (("--out", "picture.nope"), ("--out", "ending such as .png")),
        (("--out", "picture.hdf"), ("--out", "ending such as .png")),
        (("--out", "wide.webp", "--n", "1000", "--classes", "1"), ("--out", "34002 by 36", ".png")),
        (("--device", "cuda"), ("--device", "'cuda'", "--device cpu")),
        (("--device", "meta"), ("--device", "'meta'")),
        (("--device", "nope"), ("--device", "'nope'")),
        (("--backend", "cuda"), ("cuda", "missing")),
        (("--backend", "nope"), ("backend", "nope", "reference")),
    ],
)
def test_sample_refuses_bad_input_before_sampling(
    arguments: tuple[str, ...], words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str], tmp_path: Path,
) -> None:  # fmt: skip
    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("there is a GPU to answer")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("fastdiff.digits.load_digit_unet", lambda **_: pytest.fail("it samples"))
    assert run_here(monkeypatch, "sample", *arguments) == 2
    line = sentence_on(capsys.readouterr().err)
    for word in words:
        assert word in line
    assert list(tmp_path.iterdir()) == [], "nothing was written"


def test_command_without_arguments_prints_help(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_here(monkeypatch) == 2
    captured = capsys.readouterr()
    assert "sample" in captured.out + captured.err
    assert run_here(monkeypatch, "--help") == 0
    assert run_here(monkeypatch, "nope") == 2


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the digits' model by a fast one."""
    monkeypatch.setattr("fastdiff.digits.load_digit_unet", lambda **_: lambda x, t, labels: x / 2)


QUICK = ("sample", "--quiet", "--n", "2", "--classes", "1", "--steps", "2", "--out")


@pytest.mark.usefixtures("quick")
def test_full_disk_exits_with_1_and_keeps_existing_picture(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "grid.png"
    assert run_here(monkeypatch, *QUICK, str(out)) == 0
    before = out.read_bytes()
    assert before.startswith(b"\x89PNG")
    capsys.readouterr()

    def write(descriptor: int, data: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as full:
        full.setattr("fastdiff.files.os.write", write)
        assert run_here(full, *QUICK, str(out)) == 1
    line = sentence_on(capsys.readouterr().err)
    assert "No space left on device" in line
    assert "free some space" in line
    assert out.read_bytes() == before
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.usefixtures("quick")
def test_interrupt_exits_with_130(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fastdiff.files._write_all", interrupt)
    assert run_here(monkeypatch, *QUICK, str(tmp_path / "grid.png")) == 130
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_full_disk_on_stdout_exits_with_1_and_one_line() -> None:
    command = [sys.executable, "-m", "fastdiff", "env"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 1
    assert "No space left on device" in sentence_on(done.stderr)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--json", "/no/such/x.json"), ("--json", "/no/such")),
        (("--json", "."), ("--json", "it is a folder")),
        (("--plot", "x.nope"), ("--plot", ".png or .svg")),
        (("--rounds", "x"), ("fastdiff bench --help",)),
    ],
)
def test_bench_refuses_bad_input_before_measuring(
    arguments: tuple[str, ...], words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str], tmp_path: Path,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("fastdiff.benchmarks.__main__._measure_all", lambda *_: pytest.fail("it measures"))
    assert run_here(monkeypatch, "bench", "--quick", *arguments) == 2
    line = sentence_on(capsys.readouterr().err)
    for word in words:
        assert word in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--epochs", "0"), ("--epochs", "1 to")),
        (("--batch", "0"), ("--batch", "1 to 1437")),
        (("--batch", "9999"), ("--batch", "1 to 1437")),
        (("--lr", "nan"), ("--lr", "nan")),
        (("--ema", "2"), ("--ema", "0.0 to 1.0")),
        (("--seed", "x"), ("train: the command line", "--seed")),
        (("--out", "/proc/nope"), ("--out", "/proc/nope")),
    ],
)
def test_training_refuses_bad_input_before_training(
    arguments: tuple[str, ...], words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("sklearn")
    from fastdiff.digits import train

    monkeypatch.setattr(train, "train", lambda args: pytest.fail("it trains"))
    with pytest.raises(ValueError, match=r"^train: ") as refused:
        train.main(["--out", str(tmp_path), *arguments])
    for word in words:
        assert word in str(refused.value)
    assert list(tmp_path.iterdir()) == []


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
def test_save_grid_refuses_non_images(shape: tuple[int, ...], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="samples has shape"):
        save_grid(torch.zeros(shape), tmp_path / "grid.png", columns=1)


def test_save_grid_refuses_unknown_suffix(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^save_grid: path is .*grid\.nope"):
        save_grid(torch.zeros(1, 1, 2, 2), tmp_path / "grid.nope", columns=1)
    assert list(tmp_path.iterdir()) == []
