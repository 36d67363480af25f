# SPDX-License-Identifier: MIT
"""The GPU's clock and graphs in the order of their calls, by stand-ins for torch.cuda: no time is asserted."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.gpu import cases, ways
from benchmarks.gpu.clock import CudaClock, Unit, clock_for
from fastdiff.ops import backends


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is asked of torch.cuda, in order."""
    asked: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            asked.append("record")

        def elapsed_time(self, other: Event) -> float:
            return 8.0  # milliseconds

    class Graph:
        def replay(self) -> None:
            asked.append("replay")

    @contextlib.contextmanager
    def graph(made: Graph) -> Any:
        asked.append("capture")
        yield
        asked.append("captured")

    stream = SimpleNamespace(wait_stream=lambda other: asked.append("wait"))
    stand_ins: dict[str, Any] = {
        "Event": Event,
        "CUDAGraph": Graph,
        "graph": graph,
        "Stream": lambda: stream,
        "current_stream": lambda: stream,
        "stream": lambda made: contextlib.nullcontext(),
        "synchronize": lambda: asked.append("synchronize"),
        "_sleep": lambda cycles: asked.append("sleep") if cycles > 0 else None,
    }
    for name, value in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return asked


def test_device_time_is_between_events_behind_a_sleep(calls: list[str]) -> None:
    unit = Unit(lambda: calls.append("prepare"), lambda: calls.append("run"), 4)
    assert CudaClock().elapsed(unit, host=10.0) == 8.0 / 4 * 1e3
    assert calls == ["prepare", "sleep", "record", "run", "record", "synchronize"]


def test_host_time_waits_before_and_after_but_not_in_the_steps(calls: list[str]) -> None:
    unit = Unit(lambda: calls.append("prepare"), lambda: calls.append("run"), 4)
    assert CudaClock().host(unit) > 0
    assert calls == ["prepare", "synchronize", "run", "synchronize"]
    assert (clock_for("cuda").device, clock_for("cpu").device) == ("cuda", "cpu")


@pytest.mark.skipif(backends.extension is None, reason="the C++ extension was not built")
def test_graph_is_filled_with_the_steps_behind_the_first_and_replayed_from_the_start(
    calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    case = cases.GpuCase("dpmsolver++2m", (2, 1, 4, 4), steps=5)
    sets = case.tensors(2)
    samples: list[torch.Tensor] = []
    walk = ways.fastdiff_walk

    def noted(*arguments: Any, sample: torch.Tensor, **options: Any) -> Any:
        samples.append(sample)
        advance = walk(*arguments, sample=sample, **options)

        def step() -> None:
            calls.append("step")
            advance()

        return step

    monkeypatch.setattr(ways, "fastdiff_walk", noted)
    unit = ways._graph(case, sets)
    rest = 2 * (len(case.table) - 1)
    assert calls == ["wait", *["step"] * (2 + rest + 2), "wait", "synchronize", "capture", *["step"] * rest, "captured"]
    assert unit.steps == rest
    assert not any(torch.equal(sample, tensors.sample) for sample, tensors in zip(samples, sets, strict=True))
    calls.clear()
    unit.prepare()
    assert all(torch.equal(sample, tensors.sample) for sample, tensors in zip(samples, sets, strict=True))
    unit.run()
    assert calls == ["replay"]
