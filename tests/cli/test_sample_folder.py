# SPDX-License-Identifier: MIT
"""``fastdiff sample --folder``: shares of processes, torchrun, and options that do not fit together."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fastdiff import spawn_seeds
from fastdiff.cli import sample_shards as command
from fastdiff.digits import batches
from fastdiff.sharding import ShardReport
from support.child_environment import child_environment
from support.shard_jobs import tree

pytest.importorskip("typer")
pytest.importorskip("PIL")
pytest.importorskip("safetensors")

JOB = ("sample", "--quiet", "--images", "7", "--batch-size", "3", "--steps", "2", "--classes", "1,4", "--folder")


def run_here(monkeypatch: pytest.MonkeyPatch, *arguments: str, **environment: str) -> int:
    """Run `fastdiff` with these arguments in this process; return the exit code."""
    from fastdiff import __main__

    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["fastdiff", *arguments])
    with pytest.raises(SystemExit) as ended:
        __main__.main()
    return int(ended.value.code or 0)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the digits' model by a fast one."""
    monkeypatch.setattr("fastdiff.digits.load_digit_unet", lambda **_: lambda x, t, labels: x / 2)


def test_torchrun_leaves_the_files_of_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "fastdiff"]
    done = subprocess.run(
        [sys.executable, *torchrun, *JOB, str(tmp_path / "two")],
        env=child_environment(), capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert sorted(line.partition(":")[0] for line in done.stdout.splitlines()) == ["process 0 of 2", "process 1 of 2"]
    assert run_here(monkeypatch, *JOB, str(tmp_path / "one")) == 0
    assert tree(tmp_path / "two") == tree(tmp_path / "one")
    assert len(list((tmp_path / "one" / "images").iterdir())) == 7


@pytest.mark.usefixtures("quick")
def test_processes_share_the_batches_and_say_what_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    threads = torch.get_num_threads()
    job = (*JOB, str(tmp_path), "--format", "safetensors")
    assert run_here(monkeypatch, *job, RANK="1", WORLD_SIZE="2") == 0
    assert run_here(monkeypatch, *job, RANK="0", WORLD_SIZE="2") == 0
    assert run_here(monkeypatch, *job) == 0
    first, second, again = capsys.readouterr().out.splitlines()
    assert first.startswith("process 1 of 2: 3 images in 1 batches")
    assert first.endswith("other processes have batches left")
    assert second.startswith("process 0 of 2: 4 images in 2 batches")
    assert second.endswith("manifest.json")
    assert again.startswith("process 0 of 1: 0 images in 0 batches (0 of them made again), 3 batches skipped; ")
    assert run_here(monkeypatch, *job, "--threads", "2") == 2
    assert "threads 1 (now 2)" in capsys.readouterr().err
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize(
    ("arguments", "environment", "words"),
    [
        (("--out", "x.png", "--folder", "x"), {}, "--out is given beside --folder"),
        (("--ray", "auto"), {}, "--ray is given without --folder"),
        (("--folder", "x", "--workers", "2"), {}, "--workers is given without --ray"),
        (("--n", "4"), {"WORLD_SIZE": "2", "RANK": "0"}, "WORLD_SIZE is 2 without --folder"),
        (("--folder", "x", "--ray", "auto"), {"WORLD_SIZE": "2", "RANK": "0"}, "WORLD_SIZE is 2 beside --ray"),
        (("--folder", "x", "--n", "0"), {}, "n is 0"),
        (("--folder", "x", "--batch-size", "0"), {}, "batch_size is 0"),
        (("--folder", "x", "--threads", "0"), {}, "--threads is 0"),
        (("--folder", "x", "--format", "gif"), {}, "file_format is 'gif'"),
        (("--folder", "x", "--seed", "-1"), {}, "seed is -1"),
        (("--folder", "x", "--classes", "8-12"), {}, "--classes asks for 12"),
        (("--folder", "x", "--steps", "0"), {}, "num_inference_steps is 0"),
        (("--folder", "x", "--device", "nope"), {}, "--device is 'nope'"),
        (("--folder", "x", "--backend", "nope"), {}, "backend is 'nope'"),
        (("--folder", "/proc/nope"), {}, "folder is '/proc/nope'"),
        (("--folder", "x", "--ray", "auto", "--workers", "0"), {}, "workers is 0"),
    ],
)
def test_options_that_do_not_fit_are_refused(
    arguments: tuple[str, ...], environment: dict[str, str], words: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("fastdiff.digits.load_digit_unet", lambda **_: pytest.fail("it samples"))
    assert run_here(monkeypatch, "sample", *arguments, **environment) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line
    assert not list(tmp_path.iterdir())


def test_ray_gets_the_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    calls: list[tuple[Any, ...]] = []

    def on_ray(*arguments: Any, **options: Any) -> ShardReport:
        calls.append((arguments, options))
        return ShardReport(3, 0, 0, 7, tmp_path / "manifest.json")

    monkeypatch.setattr(command, "sample_shards_on_ray", on_ray)
    assert run_here(monkeypatch, *JOB, str(tmp_path), "--ray", "10.0.0.1:6379", "--workers", "2", "--seed", "9") == 0
    (((digits, folder, n), options),) = calls
    assert [digits.label(i) for i in range(7)] == [1, 1, 1, 1, 4, 4, 4]
    assert (folder, n, options["address"], options["workers"]) == (tmp_path, 7, "10.0.0.1:6379", 2)
    assert (options["batch_size"], options["seed"], options["file_format"]) == (3, 9, "png")
    assert options["gpus_per_worker"] == 0
    assert capsys.readouterr().out.startswith("Ray: 7 images in 3 batches")


def test_process_takes_the_gpu_of_its_local_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert command.local_device("cuda") == "cuda:3"
    assert command.local_device("cuda:1") == "cuda:1"
    assert command.local_device("cpu") == "cpu"
    monkeypatch.delenv("LOCAL_RANK")
    assert command.local_device("cuda") == "cuda"


def test_labels_come_in_blocks_that_differ_by_one() -> None:
    for _ in range(20):
        classes = random.sample(range(10), random.randint(1, 10))
        n = random.randint(1, 40)
        digits = batches.DigitBatches(classes, n, {"num_inference_steps": 2})
        labels = [digits.label(i) for i in range(n)]
        shares = [n // len(classes) + (i < n % len(classes)) for i in range(len(classes))]
        assert labels == [label for label, share in zip(classes, shares, strict=True) for _ in range(share)]


def test_interrupted_batch_is_not_taken_for_a_complete_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def model(x: torch.Tensor, t: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        os.kill(os.getpid(), signal.SIGINT)
        return x / 2

    monkeypatch.setattr("fastdiff.digits.load_digit_unet", lambda **_: model)
    digits = batches.DigitBatches([1], 2, {"num_inference_steps": 3})
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore SIGINT
    try:
        with pytest.raises(KeyboardInterrupt):
            digits(range(2), spawn_seeds(0, 2))
    finally:
        signal.signal(signal.SIGINT, before)
