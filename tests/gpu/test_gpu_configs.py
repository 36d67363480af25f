# SPDX-License-Identifier: MIT
"""The sweep of configurations, rehearsed without a GPU: what it runs, what it picks, which lines it prints."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import gpu_configs
from benchmarks.gpu_configs import KINDS, best, candidates, default_of, entries

pytest.importorskip("fastdiff.kernels.config", reason="needs the triton package")

needs_interpreter = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="a rehearsal runs Triton's kernels on the CPU"
)


@needs_interpreter
def test_a_rehearsal_measures_every_kind_and_keeps_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "report.json"
    report = gpu_configs.main(["--rehearse", "--rounds", "2", "--dtypes", "float32", "--json", str(out)])
    assert json.loads(out.read_text()) == report
    assert {line["kind"] for line in report["results"]} == set(KINDS)
    assert [line["config"] for line in report["results"] if line["kind"] == "sum"] == [
        list(candidate) for candidate in candidates("triton", "sum", rehearse=True)
    ]
    assert all(line["microseconds"] > 0 for line in report["results"])
    assert report["absent"].keys() == {"cuda"}
    assert report["entries"] == []
    assert "a rehearsal: these figures say nothing" in capsys.readouterr().out


@needs_interpreter
def test_a_configuration_that_changes_a_result_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    work_of, calls = gpu_configs.work_of, []

    def faulty(case: Any, device: torch.device) -> Any:
        work = work_of(case, device)

        def run() -> Tensor:
            calls.append(1)
            return work() + (len(calls) > 1)

        return run

    monkeypatch.setattr(gpu_configs, "work_of", faulty)
    with pytest.raises(RuntimeError, match=r"sum of triton with \(.*has other bits than with the default"):
        gpu_configs.main(["--rehearse", "--kinds", "sum", "--dtypes", "float32", "--backends", "triton"])


def test_without_a_gpu_only_a_rehearsal_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match=r"the GPU is missing, .*--rehearse"):
        gpu_configs.main([])


def lines(backend: str, kind: str, size: int, times: dict[tuple[int, ...], list[float]]) -> list[dict[str, Any]]:
    """Made-up results, a shape for each time."""
    return [
        {"backend": backend, "kind": kind, "dtype": "any", "element_size": size, "shape": [i], "config": list(config),
         "microseconds": own}
        for config, each in times.items()
        for i, own in enumerate(each)
    ]  # fmt: skip


def test_the_best_is_so_over_all_shapes_and_by_more_than_noise() -> None:
    default = default_of("triton", "step")
    results = lines("triton", "step", 4, {default: [10, 100], (2048, 8): [12, 70], (512, 4): [5, 210]})
    assert best(results, "triton", "step", 4) == (2048, 8)
    assert best(lines("triton", "step", 4, {default: [100], (2048, 8): [99]}), "triton", "step", 4) == default
    assert best(results, "triton", "step", 2) == default  # nothing was measured


def test_entries_are_lines_of_the_tables() -> None:
    config = pytest.importorskip("fastdiff.kernels.config")
    results = lines("triton", "step", 4, {default_of("triton", "step"): [10], (2048, 8): [8]})
    results += lines("triton", "select", 2, {default_of("triton", "select"): [10], (1024, 4, 16): [8]})
    results += lines("triton", "sum", 2, {default_of("triton", "sum"): [10], (8, 4): [11]})
    results += lines("cuda", "draw", 2, {default_of("cuda", "draw"): [10], (128,): [8]})
    triton_line, cuda_line = entries(results, "sm_90")
    table = eval("{" + triton_line + "}", {"Config": config.Config})
    assert table == {"sm_90": {("step", 4): config.Config(2048, 8), ("select", 2): config.Config(1024, 4, 16)}}
    assert cuda_line == "{90, {256, 128, 256, 128, 16}},"
    assert entries(lines("triton", "sum", 2, {default_of("triton", "sum"): [1]}), "sm_90") == []


def test_candidates_begin_with_the_default_and_are_all_taken() -> None:
    config = pytest.importorskip("fastdiff.kernels.config")
    header = (Path(gpu_configs.__file__).parents[1] / "csrc" / "cuda" / "config.h").read_text()
    numbers = ", ".join(str(default_of("cuda", kind)[0]) for kind in KINDS)
    assert f"kDefaultConfig = {{{numbers}}}" in header
    for kind in KINDS:
        for backend in gpu_configs.BACKENDS:
            tried = candidates(backend, kind)
            assert tried[0] == default_of(backend, kind)
            assert len(set(tried)) == len(tried) > 3
        for candidate in candidates("triton", kind):
            with config.override(**{kind: config.Config(*candidate)}):
                pass
