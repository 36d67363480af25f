# SPDX-License-Identifier: MIT
"""GPU benchmarks in a dry run without a GPU: counts, targets, refusals. No time is asserted."""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.autograd import DeviceType

from benchmarks import dispatches
from benchmarks.gpu import (
    cases,
    counting,
    dropins,
    host,
    implementations,
    launchers,
    mixed_rows,
    noise,
    results,
    sanitizer_calls,
    table,
    timeline,
)
from benchmarks.gpu.__main__ import main
from benchmarks.gpu.clock import HostClock, Unit
from benchmarks.peers import RepeatingLoop
from fastdiff.ops import backends
from support.oracle import INTERPRETED

ROOT = Path(__file__).resolve().parents[2]
needs_extension = pytest.mark.skipif(backends.extension is None, reason="the C++ extension was not built")

# ------------------------------------------------------------------------------------------------------- the rehearsal


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return the report of a dry run of bench and noise, without the slow parts of Triton's interpreter."""
    path = tmp_path_factory.mktemp("gpu") / "results" / "rehearsal.json"
    with pytest.MonkeyPatch.context() as patch:
        missing = backends.why_missing
        patch.setattr(backends, "why_missing", lambda name: "left out" if name == "triton" else missing(name))
        options = ["--rehearse", "--json", str(path)]
        assert main(["bench", "--full", *options, "--rounds", "2", "--no-compile"]) == 0
        assert main(["stage", *options, "build", "passed"]) == 0
    report: dict[str, Any] = json.loads(path.read_text())
    return report


def test_rehearsal_report_is_marked_and_complete(rehearsal: dict[str, Any]) -> None:
    assert rehearsal["rehearsal"] is True
    assert rehearsal["schema"] == results.SCHEMA
    assert rehearsal["stages"] == {"build": "passed"}
    assert rehearsal["not_measured"] == []
    assert rehearsal["machine"]["gpu"] is None
    assert {"commit", "date", "torch", "triton", "nvcc", "backends"} <= set(rehearsal["machine"])
    assert rehearsal["absent"]["Triton, JIT"] == "left out"
    assert rehearsal["absent"]["CUDA graph"] == "graphs need a CUDA device"


@needs_extension
def test_rehearsal_measures_every_case_with_available_implementations(rehearsal: dict[str, Any]) -> None:
    lines = rehearsal["cases"]
    assert {line["op"] for line in lines} == {
        "ddim", "dpmsolver++2m", "ddpm (philox)", "flow-euler", "mixed rows"
    }  # fmt: skip
    assert any(line["model_input"] for line in lines)
    assert {line["cache"] for line in lines} == {"warm", "cold"}
    for line in lines:
        assert line["bytes"] > 0
        assert line["cache"] == "cold" or line["counts"]["C++ op"].keys() == {"operators", "scalar_reads"}
        assert {"C++ op"} <= set(line["elapsed"]) == set(line["host"]) == set(line["share_of_copy"])
        alone = line["op"] == "mixed rows" or line["model_input"]
        assert ("reference" in line["elapsed"]) == (not alone)
        if importlib.util.find_spec("diffusers") and not alone:
            assert "diffusers" in line["elapsed"], rehearsal["absent"]
        for figure in (*line["elapsed"].values(), *line["share_of_copy"].values()):
            assert 0 < figure["p20"] <= figure["median"] <= figure["p80"]
    assert {line["op"] for line in rehearsal["pieces"]} == {"randn", "quantile", "mean", "std", "norm", "dot"}
    assert all(set(line["elapsed"]) == {"torch", "C++ op"} for line in rehearsal["pieces"])
    assert all(line["bytes_a_second"] > 0 for line in rehearsal["ceilings"])


def test_rehearsal_meets_no_target(rehearsal: dict[str, Any]) -> None:
    assert len(rehearsal["verdict"]) >= 9
    assert {line["verdict"] for line in rehearsal["verdict"]} <= {"not measured", "rehearsal"}


def test_table_refuses_rehearsal(rehearsal: dict[str, Any], tmp_path: Path) -> None:
    document = tmp_path / "performance.md"
    document.write_text(f"before\n{table.BEGIN}\nold\n{table.END}\nafter\n")
    with pytest.raises(
        ValueError, match=r"^table: the report is a rehearsal's, expected a run on a GPU; run `make gpu`"
    ):
        table.write([rehearsal], document)
    assert "old" in document.read_text()


def test_failing_part_is_reported_and_others_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = importlib.import_module("benchmarks.gpu.bench")

    def broken(self: Any, case: Any, cache: str) -> None:
        raise ZeroDivisionError("no such thing")

    monkeypatch.setattr(bench.Run, "_case", broken)
    monkeypatch.setattr(bench.Run, "_standalone_ops", lambda self: self.report["pieces"].append("ran"))
    monkeypatch.setattr(bench.Run, "_mixed_cases", lambda self: [])
    monkeypatch.setattr(bench.Run, "_copy_bandwidth", lambda self: None)
    run = bench.Run("cpu", tmp_path / "x.json", rehearse=True, rounds=1, seconds=60.0)
    stored = run.measure_all()
    assert stored["pieces"] == ["ran"]
    assert stored["failed"]["ddim 1x2x3x2x2 float32, warm"] == "ZeroDivisionError: no such thing"


def test_unmeasured_parts_are_listed_after_time_limit(tmp_path: Path) -> None:
    bench = importlib.import_module("benchmarks.gpu.bench")
    run = bench.Run("cpu", tmp_path / "x.json", rehearse=True, rounds=1, seconds=-1.0)
    stored = run.measure_all()
    assert stored["cases"] == []
    assert len(stored["not_measured"]) > 5
    assert any(name.startswith("ddim") for name in stored["not_measured"])


def test_killed_run_keeps_results_and_lists_unmeasured_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = importlib.import_module("benchmarks.gpu.bench")

    def killed(self: Any, case: Any, cache: str) -> None:
        raise SystemExit  # as a signal would

    monkeypatch.setattr(bench.Run, "_copy_bandwidth", lambda self: self.report["ceilings"].append("measured"))
    monkeypatch.setattr(bench.Run, "_case", killed)
    path = tmp_path / "x.json"
    run = bench.Run("cpu", path, rehearse=True, rounds=1, seconds=60.0)
    with pytest.raises(SystemExit):
        run.measure_all()
    stored = json.loads(path.read_text())
    assert stored["ceilings"] == ["measured"]
    assert any(name.startswith("ddim") for name in stored["not_measured"])
    assert "noise and reductions" in stored["not_measured"]
    assert "copies" not in stored["not_measured"]


def test_quick_run_measures_the_cases_of_the_targets(tmp_path: Path) -> None:
    bench = importlib.import_module("benchmarks.gpu.bench")
    run = bench.Run("cpu", tmp_path / "x.json", rehearse=True, rounds=1, seconds=-1.0, full=False)
    names = run.measure_all()["not_measured"]
    assert names[0] == "dpmsolver++2m 2x2x4x4 float32, warm"
    assert "ddim 1x2x3x2x2 float32, compiled" in names
    assert not any(word in name for name in names for word in ("copies", "mixed rows", "noise and", "model input"))
    chosen = cases.select_cases("cuda", rehearse=False, full=False)
    assert len(chosen) == len(cases.CORE) + len(cases.DRAWN)
    names = [bench.Run._implementations(SimpleNamespace(_full=False), case) for case in chosen]
    assert {len(found) for found in names} == {3, 7}, "the other libraries are beside two cases"


@needs_extension
def test_compiled_peer_is_measured_into_the_line_of_its_case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = importlib.import_module("benchmarks.gpu.bench")
    asked: list[list[str]] = []

    def made(case: Any, sets: Any, absent: Any, only: list[str]) -> dict[str, Unit]:
        asked.append(only)
        unit = Unit(lambda: None, lambda: sum(range(1000)), 1)
        return {name: unit for name in ("C++ op", "torch.compile of the reference", "Triton, cached") if name in only}

    monkeypatch.setattr(bench, "units", made)
    run = bench.Run("cpu", tmp_path / "x.json", rehearse=True, rounds=3, seconds=60.0, full=False)
    case = next(case for case in cases.select_cases("cpu", rehearse=True, full=False) if case.core)
    with pytest.raises(RuntimeError, match="the case itself was not measured"):
        run._compiled(case)
    for cache in run._caches(case.tensor_bytes):
        run._case(case, cache)
    run._compiled(case)
    line = run.report["cases"][-1]
    assert asked[-1] == ["C++ op", "Triton, cached", "torch.compile of the reference"]
    assert line["compiled"]["elapsed"].keys() == set(asked[-1])
    assert line["compiled"]["over_compiled"].keys() == {"C++ op", "Triton, cached"}
    assert "compiled" not in run.report["cases"][0]


# ------------------------------------------------------------------------------------------- the host, and the drop-ins


@needs_extension
def test_host_yardstick_measures_every_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("diffusers")
    missing = backends.why_missing
    monkeypatch.setattr(backends, "why_missing", lambda name: "left out" if name == "triton" else missing(name))
    path = tmp_path / "x.json"
    section = host.measure("cpu", path, rehearse=True, rounds=2)
    assert section["failed"] == {}
    assert section["absent"] == {"Triton": "left out"}
    calls = {"ops.step", "Stepper.step", "DDIMScheduler.guided_step", *(f"{d.name}.step" for d in host.DROPINS)}
    assert section["entries"].keys() == {host.YARDSTICK, "diffusers' DDIMScheduler.step", *(f"{c}, C++" for c in calls)}
    assert section["entries"][host.YARDSTICK]["times"]["median"] == 1.0
    assert section["entries"]["DDIMScheduler.guided_step, C++"]["over_step"]["median"] > 0
    assert results.load(path)["host"] == json.loads(json.dumps(section))
    with pytest.raises(RuntimeError, match="--pure measures an install without the extension"):
        host.measure("cpu", path, rehearse=True, rounds=1, pure=True)


def test_host_yardstick_without_the_extension_takes_triton(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names: list[tuple[str, str | None]] = []

    def unit(shape: Any, device: str, backend: str | None, calls: int) -> Unit:
        names.append((device, backend))
        return Unit(lambda: None, lambda: sum(range(100)), 1)

    def broken(*arguments: Any, **options: Any) -> Unit:
        raise ZeroDivisionError("no such thing")

    monkeypatch.setattr(backends, "extension", None)
    monkeypatch.setattr(backends, "why_missing", lambda name: "" if name == "triton" else "not built")
    monkeypatch.setattr(backends, "backend_for", lambda x: "triton")
    for name, stub in (("_operator", unit), ("_stepper", unit), ("_dropin", broken)):
        monkeypatch.setattr(host, name, stub)
    section = host.measure("cpu", tmp_path / "x.json", rehearse=True, rounds=1, pure=True)
    assert names == [("cpu", None)] * 2, "what is the default is not forced"
    assert section["entries"].keys() == {"torch.add", "ops.step, Triton", "Stepper.step, Triton"}
    assert section["failed"]["DDIMScheduler.step, Triton"] == "ZeroDivisionError: no such thing"
    assert "host" not in results.load(tmp_path / "x.json")
    late = host.measure("cpu", tmp_path / "x.json", rehearse=True, rounds=1, seconds=-1.0, pure=True)
    assert late["entries"] == {}
    assert "ops.step, Triton" in late["not_measured"]


@needs_extension
def test_dropins_are_measured_beside_diffusers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("diffusers")
    chosen = ("DDIMScheduler", "EulerAncestralDiscreteScheduler", "TCDScheduler")
    monkeypatch.setattr(dropins, "CLASSES", chosen)
    timed = dropins.Run._time

    def failing(self: Any, loop: Any) -> float:
        if loop.name == "TCDScheduler":
            raise ZeroDivisionError("no such thing")
        return timed(self, loop)

    monkeypatch.setattr(dropins.Run, "_time", failing)
    path = tmp_path / "x.json"
    section = dropins.Run("cpu", path, rehearse=True, rounds=2, seconds=60.0).measure_all()
    assert section["failed"] == {"TCDScheduler": "ZeroDivisionError: no such thing"}
    assert section["not_measured"] == []
    for line in section["classes"].values():
        figures = [line[kind][what] for kind in dropins.KINDS for what in ("diffusers", "fastdiff", "times")]
        assert all(figure["median"] > 0 for figure in figures)
        assert line["counts"]["diffusers"]["operators"] > line["counts"]["fastdiff"]["operators"]
    assert results.load(path)["dropins"] == json.loads(json.dumps(section))
    assert "- failed: TCDScheduler" in dropins.show(section)
    late = dropins.Run("cpu", path, rehearse=True, rounds=2, seconds=-1.0).measure_all()
    assert late["not_measured"] == list(chosen)
    assert "- not measured, for want of time: DDIMScheduler, " in dropins.show(late)


def test_drop_ins_of_the_host_and_of_the_device_are_classes_of_the_package() -> None:
    pytest.importorskip("diffusers")
    from fastdiff.diffusers import CLASSES

    assert len(dropins.CLASSES) == len(set(dropins.CLASSES)) == 16
    assert {*dropins.CLASSES, *(dropin.name for dropin in host.DROPINS)} <= CLASSES.keys()


@needs_extension
def test_sanitized_calls_equal_the_cpu(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert sanitizer_calls.main(["--device", "cpu"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(sanitizer_calls.CALLS) >= 12
    randn = sanitizer_calls._randn
    wrong = {"randn": lambda device, backend: [randn(device, backend)[0] + (backend == "reference")]}
    monkeypatch.setattr(sanitizer_calls, "CALLS", wrong)
    assert sanitizer_calls.main(["--device", "cpu"]) == 1


@needs_extension
@pytest.mark.skipif(not INTERPRETED, reason="compiled Triton is held to the bit by `make gpu`, not to a bound")
def test_noise_of_all_backends_is_compared(tmp_path: Path) -> None:
    stored: list[dict[str, Any]] = []
    found = noise.compare("cpu", 0.0, least=6, store=stored.append)
    assert found["requests"] == 6
    assert [part["requests"] for part in stored] == list(range(1, 7))
    assert stored[-1] == found
    reference = found["backends"]["reference"]
    assert reference["compared"] > 250
    assert (reference["mismatches"], reference["largest_difference"]) == (0, 0.0)
    assert noise.failures(found, "cpu") == []
    again = noise.compare("cpu", 0.0, seed=found["seed"], least=6)
    assert again == found


@needs_extension
def test_differing_noise_is_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = noise._draw

    def off(request: dict[str, Any], backend: str, device: str) -> torch.Tensor:
        drawn = draw(request, backend, device).clone(memory_format=torch.contiguous_format)
        if backend == "reference":
            drawn.view(-1)[-1] = float("nan")
        return drawn

    monkeypatch.setattr(noise, "_candidates", lambda device: ("reference",))
    monkeypatch.setattr(noise, "_draw", off)
    found = noise.compare("cpu", 0.0, least=3)
    assert found["backends"]["reference"]["mismatches"] == 3
    assert found["backends"]["reference"]["largest_difference"] == float("inf")
    (fault,) = noise.failures(found, "cpu")
    assert fault.startswith("reference differs in 3 of ")
    nothing = {"missing": "", "compared": 0, "mismatches": 0, "largest_difference": 0.0}
    assert noise.failures({"backends": {"cuda": nothing}}, "cuda") == ["cuda was compared on nothing"]
    gone = {**nothing, "missing": "not built"}
    assert noise.failures({"backends": {"cuda": gone}}, "cuda") == ["cuda is missing: not built"]


# --------------------------------------------------------------------------------------------- cases and who takes them


def test_gpu_cases_of_targets_come_first() -> None:
    made = cases.select_cases("cuda", rehearse=False)
    assert all(case.core for case in made[: len(cases.CORE)])
    assert {(case.op, case.shape, case.dtype) for case in made if case.core} >= {
        ("ddim", (64, 16, 128, 128), "bfloat16"),
        ("ddim", (1, 16, 21, 90, 160), "float32"),
        ("dpmsolver++2m", (1, 4, 128, 128), "float32"),
    }
    assert len(set(made)) == len(made)
    assert {"ddim", "dpmsolver++3m", "heun", "flow-euler", "euler", "ddpm (philox)"} <= {case.op for case in made}
    with pytest.raises(ValueError, match="--samplers is 'nope'"):
        cases.select_cases("cuda", rehearse=False, only=["nope"])


def test_bytes_of_gpu_cases() -> None:
    case = cases.GpuCase("ddim", (2, 1, 4, 4), "bfloat16")
    assert case.bytes_a_step == 4 * 32 * 2
    assert cases.GpuCase("ddim", (2, 1, 4, 4), "bfloat16", model_input=True).bytes_a_step == 6 * 32 * 2
    assert cases.GpuCase("flow-euler", (2, 1, 4, 4)).bytes_a_step == 4 * 32 * 4
    # x, c, u and z out of the kernel → x; x, c, u, h → x, h; the third order reads one tensor more.
    _, rows, moved = mixed_rows.MixedCase((4, 1, 4, 4), "float32", "cpu").table_and_rows()
    assert moved == (4 + 6 + 4 + 7) * 16 * 4
    assert len(set(rows.tolist())) == 4


@needs_extension
def test_flow_euler_equals_diffusers_update() -> None:
    case = cases.GpuCase("flow-euler", (1, 2, 3, 3), "float64", steps=5)
    x, velocity, _ = case.tensors()[0]
    times = torch.linspace(1.0, 0.0, 6, dtype=torch.float64)
    stepper, got, expected = case.stepper(), x, x
    for i in range(5):
        got = stepper.step(got, velocity)
        expected = expected + (times[i + 1] - times[i]) * velocity
    # Five steps of a sum of two products, coefficients up to 1 and values up to 5: some roundings of 2⁻⁵³ of each.
    torch.testing.assert_close(got, expected, rtol=0, atol=40 * 2.0**-53)


def test_unit_excludes_first_step_of_each_set() -> None:
    taken: list[str] = []
    unit = implementations.eager([RepeatingLoop(lambda name=name: taken.append(name)) for name in "ab"], rows=3)  # type: ignore[misc]
    unit.prepare()
    assert taken == ["a", "b"]
    unit.run()
    assert taken[2:] == ["a", "b", "a", "b"]
    assert unit.steps == 4
    whole = implementations.eager([RepeatingLoop(lambda: taken.append("loop"), 20)], rows=3)
    assert whole.steps == 20


@pytest.mark.slow
@needs_extension
def test_compiled_loop_equals_eager_loop() -> None:
    case = cases.GpuCase("dpmsolver++2m", (2, 1, 4, 4), steps=4)
    tensors = case.tensors()[0]
    samples = [torch.empty_like(tensors.sample) for _ in range(2)]
    eager = implementations.fastdiff_loop(case, tensors, None, sample=samples[0])
    compiled = implementations.compiled_loop(case, tensors, sample=samples[1])
    try:
        for _ in range(8):
            eager()
            compiled()
    except Exception as error:  # of whatever kind a missing compiler raises
        pytest.skip(f"torch cannot compile here: {error}")
    assert torch.equal(*samples)


def test_missing_launchers_have_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    assert tuple(launchers.launchers("cuda")) == launchers.NAMES
    if not torch.cuda.is_available():
        assert launchers.launchers("cuda")["C++ op"].missing
        assert launchers.launchers("cpu")["Triton, cached"].missing
    monkeypatch.setitem(sys.modules, "fastdiff.kernels.launch", None)
    assert "nothing caches compiled kernels" in launchers._launch_module()[1]


def test_launcher_wraps_unit_in_its_context() -> None:
    seen: list[str] = []
    context = launchers.contextlib.contextmanager

    @context
    def within() -> Any:
        seen.append("in")
        yield
        seen.append("out")

    unit = launchers.Launcher("triton", within=within).wrap(Unit(lambda: None, lambda: seen.append("run"), 1))
    assert HostClock().host(unit) > 0
    assert seen == ["in", "out", "in", "run", "out"]


# ------------------------------------------------------------------------------------------------------------ counting


def _event(name: str, device: DeviceType, start: float, length: float, parent: Any = None) -> Any:
    span = SimpleNamespace(start=start, end=start + length, elapsed_us=lambda: length)
    return SimpleNamespace(name=name, device_type=device, time_range=span, cpu_parent=parent, cpu_children=[])


def test_kernels_copies_launches_and_waits_are_counted() -> None:
    host, device = DeviceType.CPU, DeviceType.CUDA
    steps = _event(counting._RANGE, host, 10, 100)
    events = [
        steps,
        _event("cudaDeviceSynchronize", host, 200, 5),  # the flush after the steps is nobody's wait
        *(_event("cudaLaunchKernelExC", host, 20 + i, 1, steps) for i in range(3)),
        _event("cuLaunchKernelEx", host, 30, 1, steps),
        _event("cudaStreamSynchronize", host, 40, 1, steps),
        _event("aten::_local_scalar_dense", host, 39, 3, steps),
        _event(counting._RANGE, device, 10, 100),
        *(_event("_step_kernel", device, 50 + i, 2) for i in range(4)),
        _event("Memcpy DtoH (Device -> Pageable)", device, 60, 1),
    ]
    counted = counting._read(events, steps=2)
    assert counted["kernels"] == 2.0
    assert counted["kernel_microseconds"] == 4.0
    assert (counted["copies"], counted["launches"], counted["waits"], counted["scalar_reads"]) == (0.5, 2.0, 0.5, 0.5)
    assert counted["names"] == {"_step_kernel": 4}
    with pytest.raises(RuntimeError, match="not allowed to see kernels"):
        counting._read([steps], steps=2)
    lanes = timeline.lanes_of(events, "cuda")
    assert lanes.total == (0, 100)
    assert len(lanes.device) == 5
    assert len(lanes.host) == 6
    assert len(lanes.waits) == 1


def test_operators_are_counted_without_views_and_with_reads() -> None:
    x = torch.ones(4, 4)

    def run() -> None:
        x.view(2, 8)[0].add(1)  # two views and a sum that reads less than all
        torch.empty(3)
        (x * 2).sum().item()

    counted = dispatches.count_operators(run, numel=16)
    assert dict(counted.names) == {"add": 1, "mul": 1, "sum": 1, "_local_scalar_dense": 1}
    assert (counted.full, counted.reads) == (2, 1)


@needs_extension
def test_fastdiff_step_dispatches_no_torch_operator() -> None:
    # A loop allocates its registers once: less than one operator a step, and none of a step itself.
    assert all(dispatches.count_fastdiff(op) < 0.2 for op in ("ddim", "dpmsolver++2m", "flow-euler", "ddpm (philox)"))


def test_operators_of_diffusers_are_counted() -> None:
    pytest.importorskip("diffusers")
    counted, steps = dispatches.count_diffusers("DDIMScheduler", {"clip_sample": False})
    assert steps == 20
    # Guidance takes three; the update four and more.
    assert counted.full / steps >= 7
    text = dispatches.markdown([{"solver": "DDIM", "diffusers": None, "fastdiff": 0.0}])
    assert text.splitlines()[-1] == "| DDIM | – | – | – | 0 |"
