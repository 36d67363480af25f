# SPDX-License-Identifier: MIT
"""Kill soak: it kills as often as it is told to, and finds files that differ from an undisturbed run's."""

from __future__ import annotations

import multiprocessing
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

from benchmarks import kill_soak
from benchmarks.kill_soak import Kill

KILL = Kill(0.5, 2, 3, 1)


def _child(function: Callable[[], object]) -> Any:
    def start(*arguments: Any) -> BaseProcess:
        process = multiprocessing.get_context("fork").Process(target=function)
        process.start()
        return process

    return start


@pytest.mark.parametrize(
    ("found", "names"),
    [({}, "none"), ({"a": b"2"}, "job-0/a"), ({"b": b"x"}, "job-0/b"), ({"a": None, "c": b""}, "job-0/a, job-0/c")],
)
def test_kill_soak_counts_kills_and_compares_files(
    found: dict[str, bytes | None], names: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    undisturbed: dict[str, bytes | None] = {"a": b"1", "b": b""}
    runs = iter([KILL, None, KILL, KILL])  # the first job completes in spite of a kill
    outcomes = iter([undisturbed, {**undisturbed, **found}, *[undisturbed] * 3])
    monkeypatch.setattr(kill_soak, "disturbed_run", lambda *arguments: next(runs))
    monkeypatch.setattr(
        kill_soak, "complete", lambda *arguments: {k: v for k, v in next(outcomes).items() if v is not None}
    )
    assert kill_soak.main(["--kills", "3", "--seed", "1"]) == (names != "none")
    heading, _, *lines, end = capsys.readouterr().out.splitlines()
    assert heading.startswith("seed 1: ")
    assert [line.split()[0] for line in lines if "complete" not in line] == ["png", "png", "safetensors"]
    assert [line.split()[:2] for line in lines if "complete" in line] == [
        ["png", "0"],
        ["png", "1"],
        ["safetensors", "0"],
    ]
    assert end == f"3 kills, {0 if names == 'none' else names.count('job')} files differ: {names}"
    assert next(runs, None) is next(outcomes, None) is None


def test_kill_soak_kills_processes_that_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(kill_soak, "start", _child(lambda: time.sleep(60)))
    kill = kill_soak.disturbed_run(tmp_path, "png", 0.2)
    assert kill is not None
    assert kill.killed == 2
    monkeypatch.setattr(kill_soak, "start", _child(lambda: None))
    assert kill_soak.disturbed_run(tmp_path, "png", 1e6) is None


def test_kill_soak_reports_process_that_fails_by_itself(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(kill_soak, "start", _child(lambda: sys.exit(2)))
    with pytest.raises(RuntimeError, match=r"the processes ended with \[2, 2\]"):
        kill_soak.disturbed_run(tmp_path, "png", 1e6)
    with pytest.raises(RuntimeError, match="the undisturbed run failed"):
        kill_soak.complete(tmp_path, "png")


@pytest.mark.parametrize("arguments", [["--kills", "0"], ["--longest", "0"], ["--longest", "nan"]])
def test_kill_soak_refuses_invalid_arguments(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        kill_soak.main(arguments)
    assert "--kills takes 1 or more" in capsys.readouterr().err
