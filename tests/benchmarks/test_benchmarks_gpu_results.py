# SPDX-License-Identifier: MIT
"""Results of a GPU run: targets, table, file, command; a dry run is never taken for a real one."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import dropins, host, machine, pytest_log, results, table, targets, timeline
from benchmarks.gpu.__main__ import parse
from fastdiff.ops import backends
from support.child_environment import child_environment

ROOT = Path(__file__).resolve().parents[2]


def _medians(**values: float) -> dict[str, dict[str, float]]:
    return {name.replace("__", " "): {"median": value} for name, value in values.items()}


def _run_report() -> dict[str, Any]:
    both = {"C++ op": {"median": 5.0}, "CUDA graph": {"median": 2.5}}
    line: dict[str, Any] = {
        "op": "ddim", "shape": [1, 4, 128, 128], "dtype": "float32", "cache": "warm", "model_input": False,
        "default": "cuda", "counts": {"C++ op": {"kernels": 1.0, "copies": 0.0, "waits": 0.0}},
        "host": both, "elapsed": both, "share_of_copy": {"C++ op": {"median": 0.5}},
    }  # fmt: skip
    wide = {"shape": [64, 16, 128, 128], "dtype": "bfloat16", "cache": "cold", "counts": {}, "default": "triton"}
    share = {"share_of_copy": {"C++ op": {"median": 0.5}, "Triton, cached": {"median": 1.0}}}
    peer = {name: {"torch.compile of the reference": {"median": 47.0}} for name in ("host", "elapsed")}
    compiled = {"compiled": {**peer, "over_compiled": {"C++ op": {"median": 2.0}, "Triton, cached": {"median": 0.98}}}}
    return {
        "schema": 1,
        "rehearsal": False,
        "machine": {
            "gpu": "A GPU", "capability": "9.0", "multiprocessors": 132, "l2_bytes": 60 << 20, "cuda": "13.0",
            "nvidia_smi": {"driver_version": "580"}, "nvcc": "13.0", "torch": "2.11", "triton": "3.6",
            "diffusers": "absent", "date": "today", "commit": "0123456789abcdef",
        },
        "cases": [line, {**line, **wide, **share, **compiled}],
        "pieces": [{"op": "randn", "shape": [2, 3], "dtype": "float32", "elapsed": both, "host": both}],
        "noise": {
            "backends": {"cuda": {"compared": 1000, "mismatches": 0}, "triton": {"compared": 9, "mismatches": 1}}
        },
        "tests": {"passed": 900, "failed": ["tests/x.py::test_y"], "skipped": 0, "whole": False},
        "host": {"entries": _host_entries()},
        "dropins": _dropins_section({"DDIMScheduler": 20.0, "EulerDiscreteScheduler": 2.9}),
        "absent": {"k-diffusion": "not installed"},
        "not_measured": ["ddim 1x2 float32, cold", "counting ddim 1x2 float32"],
    }  # fmt: skip


def _host_entries() -> dict[str, Any]:
    def entry(times: float) -> dict[str, Any]:
        return {"microseconds": {"median": 4.0 * times}, "times": {"median": times}}

    drawn = {f"{dropin.name}.step, C++": entry(1.9 if dropin.draws else 1.4) for dropin in host.DROPINS}
    return {
        "torch.add": entry(1.0),
        "ops.step, C++": entry(0.9),
        "ops.step, Triton": entry(1.6),
        **drawn,
        "DDIMScheduler.guided_step, C++": {**entry(1.4), "over_step": {"median": 1.01}},
    }


def _dropins_section(times: dict[str, float]) -> dict[str, Any]:
    kinds = {name: _medians(diffusers=100.0, fastdiff=5.0, times=value) for name, value in times.items()}
    return {
        "shape": [1, 4, 8, 8], "steps": 20, "failed": {}, "not_measured": [],
        "classes": {name: {"plain": kind, "guided": kind} for name, kind in kinds.items()},
        "geometric_mean_plain": 16.0, "geometric_mean_guided": 16.0,
    }  # fmt: skip


def test_targets_are_met_not_met_or_not_measured() -> None:
    said = {line["target"]: (line["verdict"], line["figure"]) for line in targets.evaluate_targets(_run_report())}
    by_beginning = {
        "every test that needs a GPU": ("not met", "1 failed, 900 passed"),
        # The default there is Triton.
        "64x16x128x128 bfloat16, ddim:": ("met", "1.00"),
        "64x16x128x128 bfloat16, dpmsolver++2m:": ("not measured", "–"),
        "1x16x21x90x160 float32, ddim:": ("not measured", "–"),
        "1x16x21x90x160 float32, ddpm (philox): at most 1.25": ("not measured", "–"),
        "1x4x128x128, ddim, eager": ("not met", "5.00 µs"),
        "1x4x128x128, ddim, in a graph": ("met", "2.50 µs"),
        "1x4x128x128, dpmsolver++2m, eager": ("not measured", "–"),
        "never slower than torch.compile": ("met", "0.98, ddim 64x16x128x128"),
        "one kernel a step": ("met", "1.00 at most"),
        "noise by cuda": ("met", "0 differ of 1,000"),
        "noise by triton": ("not met", "1 differ of 9"),
        "ops.step, C++": ("met", "0.90"),
        "ops.step, Triton": ("not met", "1.60"),
        "Stepper.step, C++": ("not measured", "–"),
        "a drop-in's step, C++": ("met", "1.40, LMSDiscreteScheduler"),
        "a drop-in's step, Triton": ("not measured", "–"),
        "with torch's noise, C++": ("met", "1.90, EulerAncestralDiscreteScheduler"),
        "guided_step, C++": ("not met", "1.01"),
        "ops.step without a compiled extension": ("not measured", "–"),
        # Of some of the classes neither is known.
        "drop-ins, plain: geometric mean": ("not measured", "–"),
        "drop-ins, plain: no class under": ("not met", "2.9×, EulerDiscrete"),
    }
    for beginning, expected in by_beginning.items():
        (found,) = [value for target, value in said.items() if target.startswith(beginning)]
        assert found == expected, beginning
    report = _run_report()
    report["cases"][0]["counts"]["Triton, JIT"] = {"kernels": 0.5, "copies": 0.0, "waits": 0.0}
    (missing,) = [line for line in targets.evaluate_targets(report) if line["target"].startswith("one kernel")]
    assert missing["verdict"] == "not met"


def test_drop_in_targets_need_every_class() -> None:
    report = {**_run_report(), "dropins": _dropins_section(dict.fromkeys(dropins.CLASSES, 16.0))}
    lines = [line for line in targets.evaluate_targets(report) if line["target"].startswith("drop-ins")]
    assert [(line["verdict"], line["figure"][:5]) for line in lines] == [("met", "16.0×")] * 4
    del report["dropins"]["classes"]["TCDScheduler"]
    lines = [line for line in targets.evaluate_targets(report) if line["target"].startswith("drop-ins")]
    assert {line["verdict"] for line in lines} == {"not measured"}


def test_table_is_written_between_its_marks(tmp_path: Path) -> None:
    report = _run_report()
    report["verdict"] = targets.evaluate_targets(report)
    document = tmp_path / "performance.md"
    document.write_text(f"before\n{table.BEGIN}\nyesterday\n{table.END}\nafter\n")
    for _ in range(2):  # a second run replaces the first one's
        table.write([report], document)
        text = document.read_text()
        assert text.startswith(f"before\n{table.BEGIN}\nOne A GPU (capability 9.0, 132 multiprocessors")
        assert text.endswith(f"{table.END}\nafter\n")
        assert "yesterday" not in text
    assert "| ddim 1×4×128×128 float32 | warm | 50 | 5.00 / 5.00 | 2.50 / 2.50 | – |" in text
    assert "| ddim 64×16×128×128 bfloat16 | cold | 100 | 5.00 / 5.00 | 2.50 / 2.50 | 47.0 / 47.0 |" in text
    assert "| ops.step, C++ | 3.60 | 0.90 |" in text
    assert "| DDIM | 100.0 | 5.0 | 20.0× | 100.0 | 5.0 | 20.0× | – |" in text
    assert "- absent: k-diffusion: not installed" in text
    assert "- not measured, for want of time: ddim 1x2 float32, cold; the counts of 1 cases" in text
    table.write([report, report], document)
    assert document.read_text().count("One A GPU") == 2
    document.write_text("no marks")
    with pytest.raises(ValueError, match="lacks the marks"):
        table.write([report], document)


@pytest.mark.parametrize(
    "path", sorted((ROOT / "benchmarks" / "results").glob("nvidia-*-1033149*.json")), ids=lambda path: path.name
)
def test_stored_runs_on_gpus_have_tables_and_name_no_path(path: Path) -> None:
    report = results.load(path)
    assert report["rehearsal"] is False
    assert {"gpu", "commit", "date", "torch", "triton", "nvcc", "nvidia_smi"} <= report["machine"].keys()
    text = table.markdown(report)
    assert "Triton, held" not in text
    assert "| ddim 64×16×128×128 bfloat16 | cold |" in text
    assert not re.search(r"/(home|root|work|tmp|opt|usr|mnt)/", path.read_text())


def test_documentation_has_the_marks_of_the_table() -> None:
    text = (ROOT / "docs" / "performance.md").read_text()
    assert text.count(table.BEGIN) == text.count(table.END) == 1
    assert text.index(table.BEGIN) < text.index(table.END)


def test_rehearsal_is_not_stored_in_file_of_real_run(tmp_path: Path) -> None:
    path = tmp_path / "h200.json"
    results.store(path, False, noise={"compared": 1})
    before = path.read_text()
    with pytest.raises(ValueError, match="holds a run on a GPU"):
        results.store(path, True, noise={})
    assert path.read_text() == before
    assert results.store(path, False, cases=[])["noise"] == {"compared": 1}
    path.write_text("{")
    with pytest.raises(ValueError, match="is no JSON"):
        results.load(path)
    path.write_text('{"schema": 99}')
    with pytest.raises(ValueError, match="is of another schema"):
        results.load(path)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("bench", "--rehearse", "--rounds", "0"), ("--rounds is 0",)),
        (("noise", "--rehearse", "--seconds", "-1"), ("--seconds is -1.0", "more than 0")),
        (("frobnicate",), ("frobnicate", "--help")),
    ],
)
def test_gpu_command_refuses_bad_input_in_one_sentence(arguments: tuple[str, ...], words: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match=r"^gpu: .+, expected .+; .+") as refusal:
        parse(arguments)
    assert all(word in str(refusal.value) for word in words)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_run_without_gpu_is_refused_with_hint_to_rehearse() -> None:
    with pytest.raises(RuntimeError, match=r"^gpu: torch finds no CUDA device, expected a GPU; .*--rehearse"):
        parse(["bench"])
    assert machine.file_name("cpu") == "rehearsal"


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"STAGES": "bilud"}, "STAGES names 'bilud', expected some of build test"),
        ({"DRY": "yes"}, "DRY is 'yes'"),
        ({"FULL": "2"}, "FULL is '2', expected 0 or 1"),
        ({"LIMITS": "test=4m"}, "LIMITS has 'test=4m', expected a stage and whole seconds"),
        ({"LIMITS": "60"}, "LIMITS has '60', expected a stage and whole seconds"),
        ({"LIMITS": "test=60 bilud=3"}, "LIMITS has 'bilud=3', expected a stage and whole seconds"),
    ],
)
def test_script_refuses_bad_input_in_one_sentence(variables: dict[str, str], words: str) -> None:
    environment = {"PATH": "/usr/bin:/bin", "PYTHON": sys.executable, **variables}
    script = ROOT / "benchmarks" / "gpu.sh"
    done = subprocess.run(["bash", str(script)], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert words in done.stderr


@pytest.mark.slow
@pytest.mark.skipif(backends.extension is None, reason="the C++ extension was not built")
def test_script_rehearses_a_stage_and_stores_its_outcome(tmp_path: Path) -> None:
    variables = {"DRY": "1", "STAGES": "sanitize", "RESULTS": str(tmp_path), "PYTHON": sys.executable}
    done = subprocess.run(
        ["bash", str(ROOT / "benchmarks" / "gpu.sh")],
        env=child_environment(**variables), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "reference: randn: equal" in done.stdout
    assert "gpu: passed: sanitize" in done.stdout
    report = results.load(tmp_path / "rehearsal.json")
    assert report["rehearsal"] is True
    assert re.fullmatch(r"passed after \d+ s", report["stages"]["sanitize"])
    assert {line["verdict"] for line in report["verdict"]} == {"not measured"}


def test_stages_of_the_script_fit_nine_minutes() -> None:
    script = (ROOT / "benchmarks" / "gpu.sh").read_text()
    (table_of_limits,) = re.findall(r"^declare -A limits=\((.*)\)$", script, re.MULTILINE)
    limits = {stage: int(seconds) for stage, seconds in re.findall(r"\[(\w+)\]=(\d+)", table_of_limits)}
    assert limits.keys() == {"build", "test", "bench", "noise", "sanitize"}
    assert sum(limits.values()) <= 540
    assert all(f"stage_{stage}() {{" in script for stage in limits)


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (
            ["tests/a.py::test_x[1-a b] PASSED [ 50%]", "tests/a.py::test_z FAILED [100%]",
             "1 failed, 1 passed in 2.0s"],
            {"passed": 1, "skipped": 0, "failed": ["tests/a.py::test_z"], "whole": True},
        ),
        (
            ["[gw3] [  1%] PASSED tests/a.py::test_x[b c] ", "[gw0] [  2%] SKIPPED tests/a.py::test_y ",
             "[gw1] [  3%] ERROR tests/b.py::test_w "],
            {"passed": 1, "skipped": 1, "failed": ["tests/b.py::test_w"], "whole": False},
        ),
        (["= 3 passed, 2 skipped, 1 warning in 5.00s ="], {"passed": 0, "skipped": 0, "failed": [], "whole": True}),
        ([], {"passed": 0, "skipped": 0, "failed": [], "whole": False}),
    ],
    ids=["alone", "workers, stopped", "whole", "empty"],
)  # fmt: skip
def test_log_of_tests_is_read(lines: list[str], expected: dict[str, Any], tmp_path: Path) -> None:
    log = tmp_path / "tests.log"
    log.write_text("\n".join(lines))
    assert pytest_log.read(log) == expected


def test_log_of_a_real_run_is_read(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text("def test_one(): pass\ndef test_two(): assert 0\n")
    (tmp_path / "test_other.py").write_text("import no_such_module\n")
    options = ["-v", "-rfE", "-p", "no:cacheprovider", "--continue-on-collection-errors", "--rootdir", str(tmp_path)]
    command = [sys.executable, "-m", "pytest", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    (tmp_path / "log").write_text(done.stdout)
    found = pytest_log.read(tmp_path / "log")
    assert (found["passed"], found["failed"]) == (1, ["test_it.py::test_two", "test_other.py"])
    assert found["whole"]


def test_timeline_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "images" / "timeline.png"
    stored = timeline.draw("cpu", picture, rehearse=True)
    assert picture.stat().st_size > 10_000
    assert "C++ op" in stored["lanes"] or backends.extension is None
    assert all(lanes["device"] for lanes in stored["lanes"].values())
