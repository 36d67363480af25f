# SPDX-License-Identifier: MIT
"""What `benchmarks.dropins` counts and prints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers")

from benchmarks import dropins
from fastdiff.diffusers import CLASSES
from fastdiff.ops import backends


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize(
    ("name", "tensors"),
    [
        ("FlowMatchEulerDiscrete", 3),  # x, m; x
        ("DDIM", 4),  # x, m; x, x0
        ("EulerDiscrete", 4),
        ("DPMSolverMultistep", 5),  # x, m, h; x, h
        ("DDPM", 4 + 1),  # x, m, z; x, x0
        ("UniPCMultistep", 8),  # x, m, h, h, h; x, the corrected x, h
    ],
)
def test_the_bytes_of_a_step_are_those_of_its_plan(name: str, tensors: int, guided: bool) -> None:
    name = f"{name}Scheduler"
    loop = dropins.Loop(name, CLASSES[name], (1, 4, 8, 8), torch.float32, guided)
    loop.time()
    # The last steps of a loop may be of a lower order, and read less.
    counted = [dropins.tensors_of_plan(plan, guided=guided) for plan in loop.plans()]
    assert max(count for count in counted if count is not None) == tensors + guided
    assert counted.count(tensors + guided) > len(counted) / 2
    found = loop.bytes_a_step()
    assert found is not None
    assert found <= (tensors + guided) * 4 * 256


@pytest.mark.skipif(backends.extension is None, reason="the C++ extension was not built")
def test_the_table_has_the_share_of_a_copy_where_it_is_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "found.json"
    threads = torch.get_num_threads()
    try:
        dropins.main(["--only", "FlowMatchEulerDiscrete", "--shape", "1x4x8x8", "--rounds", "3", "--bandwidth",
                      "--json", str(file)])  # fmt: skip
    finally:
        torch.set_num_threads(threads)
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].count("|") == printed[1].count("|") == printed[2].count("|") == 11
    assert printed[2].count("GB/s") == 2
    found = json.loads(file.read_text())["classes"]["FlowMatchEulerDiscreteScheduler"]["guided"]["bandwidth"]
    assert found["bytes"] == 4 * 4 * 256
    share = found["share"]
    assert 0 < share["p20"] <= share["median"] <= share["p80"]


def test_the_table_has_the_beginnings_where_they_are_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file, threads = tmp_path / "found.json", torch.get_num_threads()
    monkeypatch.setattr(dropins, "LOOPS", 2)
    try:
        dropins.main(["--only", "EulerDiscrete,ConsistencyDecoder", "--shape", "1x4x8x8", "--rounds", "3",
                      "--beginnings", "--json", str(file)])  # fmt: skip
    finally:
        torch.set_num_threads(threads)
    printed = capsys.readouterr().out.splitlines()
    assert [line.count("|") for line in printed[:4]] == [17] * 4
    assert "4 steps" in printed[0]
    classes = json.loads(file.read_text())["classes"]
    assert len(classes) == 2
    for line in classes.values():
        for who in ("diffusers", "fastdiff"):
            first, whole = (line["beginnings"][what][who]["median"] for what in ("first", "loop"))
            assert 0 < first < whole
        assert line["beginnings"]["loop"]["times"]["median"] > 0
        assert all(line["beginnings"]["planning"][who]["median"] > 0 for who in ("diffusers", "fastdiff"))


def test_a_first_loop_makes_all_its_plans() -> None:
    loop = dropins.Loop("DDIMScheduler", CLASSES["DDIMScheduler"], (1, 4, 8, 8), torch.float32, guided=False)
    loop.time()
    assert loop.time_first() > 0
    assert len(loop.plans()) == dropins.STEPS - 2  # those that are not the first two
    before = loop.plans()
    loop.time_first()
    assert not {id(plan) for plan in loop.plans()} & {id(plan) for plan in before}


def test_a_beginning_is_that_of_a_whole_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = dropins.Loop("DDIMScheduler", CLASSES["DDIMScheduler"], (1, 4, 8, 8), torch.float32, guided=False)
    taken: list[float] = []
    step = loop.step

    def counted(timestep: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
        taken.append(float(timestep))
        return step(timestep, sample)

    monkeypatch.setattr(loop, "step", counted)
    for _ in range(2):
        first, whole = loop.time_beginning()
        assert first < whole
    assert taken == [float(t) for t in loop.scheduler.timesteps] * 2
    assert len(taken) == 2 * dropins.FEW
