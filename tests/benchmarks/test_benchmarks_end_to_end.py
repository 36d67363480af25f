# SPDX-License-Identifier: MIT
"""Output of `benchmarks.end_to_end`, and its loops as graphs, on the emulation of CUDA graphs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")

import fastdiff.diffusers
from benchmarks import end_to_end, end_to_end_table
from fastdiff.graphs import recorder
from support.graph_emulator import EmulatedGraph

CPU = torch.device("cpu")


def test_table_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, threads = tmp_path / "found.json", torch.get_num_threads()
    end_to_end.main(["--only", "policy,latent U-Net", "--rounds", "2", "--json", str(file)])
    assert torch.get_num_threads() == threads
    printed = capsys.readouterr().out.splitlines()
    rows = [line for line in printed if line.startswith("| ")][1:]
    assert {line.count("|") for line in printed[:2] + rows} == {len(end_to_end.HEADS) + 1}
    assert len(rows) == 6
    assert all("not measured" in line for line in rows), "there is no GPU in this test"
    report = json.loads(file.read_text())
    assert {"date", "cpu", "torch", "diffusers", "fastdiff", "device"} <= report["conditions"].keys()
    for line in report["results"]:
        # Float32 loops of up to 100 steps, with one noise: the promise of the drop-ins.
        assert line["difference"] < 3e-3
        assert 0 < line["share"]["fastdiff"]["median"] < 1
        assert line["milliseconds"]["fastdiff"]["median"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "digit5"], "end_to_end: --only is 'digit5', expected one of digits"),
        (["--rounds", "0"], "end_to_end: --rounds is 0, expected 1 or more"),
        (["--device", "cuda"], "torch sees no GPU"),
    ],
)
def test_wrong_arguments_are_refused(arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=message):
        end_to_end.main(arguments)


def _report(device: str, **more: float) -> dict[str, Any]:
    figures = {"diffusers": 2.0, "fastdiff": 1.25, **more}
    line = {
        "loop": "policy", "steps": 10, "times": {"median": 1.6},
        "milliseconds": {name: {"median": value} for name, value in figures.items()},
        "share": {"diffusers": {"median": 0.4}, "fastdiff": {"median": 0.04}},
    }  # fmt: skip
    conditions = {"device": device, "cpu": "Chip", "cores": 2, "load_average": [0.5], "torch": "2", "diffusers": "1"}
    return {"conditions": {**conditions, "date": "today"}, "threads": 1, "rounds": 9, "results": [line]}


def test_table_is_written_between_marks(tmp_path: Path) -> None:
    begin, end = end_to_end_table.BEGIN, end_to_end_table.END
    document, cpu, gpu = (tmp_path / name for name in ("page.md", "cpu.json", "gpu.json"))
    document.write_text(f"before\n{begin}\nold\n{end}\nafter\n")
    cpu.write_text(json.dumps(_report("cpu")))
    gpu.write_text(json.dumps(_report("GPU 7", graph=0.5)))
    for files, cells in (
        ([cpu], "| not measured | not measured | not measured |"),
        ([cpu, gpu], "| 2 | 1.25 | 0.5 |"),
    ):
        end_to_end_table.main([*map(str, files), "--documents", str(document)])
        text = document.read_text()
        assert f"| policy | 10 | 2 | 1.25 | 1.60 | 40.0 % | 4.0 % {cells}" in text
        assert text.startswith(f"before\n{begin}\n| loop |")
        assert text.endswith(f"{end}\nafter\n")
        assert "old" not in text
        assert ("GPU 7, 1 thread" in text) == (len(files) == 2)
    with pytest.raises(ValueError, match="is of GPU 7, expected a run on the CPU, then one on a GPU"):
        end_to_end_table.main([str(gpu), "--documents", str(document)])
    with pytest.raises(ValueError, match="lacks the marks"):
        end_to_end_table.main([str(cpu), "--documents", str(cpu)])


#: Each kind of loop, short; the digits' model reads its labels on the CPU, which no graph could hold.
GRAPHS = [case for case in end_to_end.CASES if case.steps <= 10 and not case.name.startswith("digits")]


@pytest.mark.parametrize("case", GRAPHS, ids=lambda case: f"{case.name} {case.steps}")
def test_whole_loop_is_captured(case: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(recorder.RECORDERS, "cpu", EmulatedGraph)
    monkeypatch.setattr(EmulatedGraph, "made", [])
    torch.manual_seed(0)
    kind = getattr(fastdiff.diffusers, case.scheduler)
    with torch.no_grad():
        loop = end_to_end.Loop(case, kind, case.make(CPU), CPU)
        replay = loop.graph()
        loop.scheduler.set_timesteps(case.steps, device=CPU)
        expected = loop.walk(loop.scheduler)
        (graph,) = EmulatedGraph.made
        for _ in range(2):
            graph.poison()
            replay()
            assert torch.equal(loop.result, expected)


def test_stopped_run_keeps_the_loops_that_it_has_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(case: Any, device: Any, rounds: int) -> dict[str, Any]:
        if case is not end_to_end.CASES[0]:
            raise SystemExit  # as a signal would
        return {"loop": case.name}

    monkeypatch.setattr(end_to_end, "measure", measured)
    monkeypatch.setattr(end_to_end, "row", str)
    path = tmp_path / "loops.json"
    with pytest.raises(SystemExit):
        end_to_end.main(["--json", str(path)])
    assert json.loads(path.read_text())["results"] == [{"loop": end_to_end.CASES[0].name}]
