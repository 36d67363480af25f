# SPDX-License-Identifier: MIT
"""Examples of training that need files, two runs or several processes, at a small size."""

from __future__ import annotations

import gzip
import json
import runpy
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from support.child_environment import child_environment

pytest.importorskip("accelerate")
pytest.importorskip("diffusers")

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def _run(monkeypatch: pytest.MonkeyPatch, name: str, *arguments: str) -> None:
    """Run an example in this process, which has torch imported already."""
    monkeypatch.setattr("sys.argv", [name, *arguments])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")


def test_train_digits_resumes_and_measures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--per-class", "2", "--sampling-steps", "3", "--out", str(tmp_path))
    _run(monkeypatch, "train_digits", "--steps", "2", *arguments)
    _run(monkeypatch, "train_digits", "--steps", "3", "--resume", *arguments)
    assert "after 3 steps" in capsys.readouterr().out
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["steps"] == 3
    assert 0 <= figures["recognised"] <= 1
    assert figures["guidance"] == 2.0
    # An untrained model's velocity is about 0, whose error is the variance of images and noise: near 1.
    assert 0.3 < figures["held_out_loss"] < 1.5
    assert (tmp_path / "samples.png").read_bytes().startswith(b"\x89PNG")


def _write_idx(path: Path, values: np.ndarray) -> None:
    """Write a file of MNIST's format: zero, type (8 is a byte), dimensions, lengths, big-endian; then the values."""
    header = struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape)
    data = header + values.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


def test_train_fashion_mnist_from_a_local_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = np.random.default_rng()
    _write_idx(tmp_path / "train-images-idx3-ubyte.gz", rng.integers(0, 256, (9, 28, 28)))
    _write_idx(tmp_path / "train-labels-idx1-ubyte", rng.integers(0, 10, 9))
    out = tmp_path / "out"
    small = ("--steps", "2", "--batch", "4", "--channels", "32", "--sampling-steps", "2", "--columns", "1")
    _run(monkeypatch, "train_fashion_mnist", str(tmp_path), "--out", str(out), *small)
    assert "2 steps on 9 images" in capsys.readouterr().out
    picture = pytest.importorskip("PIL.Image").open(out / "samples.png")
    assert picture.size == (2 * (28 + 2), 2 * (10 * 28 + 11))  # a row a class between lines, enlarged twice
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-00000002"]


@pytest.mark.skipif(sys.platform == "win32", reason="torchrun's rendezvous needs libuv there")
def test_train_ddp_two_processes_give_the_losses_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = ("--steps", "6", "--batch", "32", "--losses")
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    command = [*torchrun, str(EXAMPLES / "train_ddp.py"), *size, str(tmp_path / "two.json")]
    environment = child_environment(OMP_NUM_THREADS="1")
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    with torch.random.fork_rng():
        _run(monkeypatch, "train_ddp", *size, str(tmp_path / "one.json"))
    two, one = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("two", "one"))
    assert len(one) == len(two) == 6
    # The same samples with the same draws; sums in another order differ by units of 6e-8, which Adam's division by the
    # root of tiny second moments makes larger from step to step.
    np.testing.assert_allclose(two, one, rtol=1e-3)
    np.testing.assert_allclose(two[0], one[0], rtol=1e-5)
    assert one[-1] < one[0]
