# SPDX-License-Identifier: MIT
"""What becomes of a GPU run: its verdict, its table, its file, its command; nothing passes for more than it is."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import machine, results, table, timeline, verdict
from benchmarks.gpu.__main__ import parse
from fastdiff.ops import backends

ROOT = Path(__file__).resolve().parents[2]


def _run_report() -> dict[str, Any]:
    both = {"C++ op": {"median": 5.0}, "CUDA graph": {"median": 2.5}}
    line: dict[str, Any] = {
        "op": "ddim", "shape": [1, 4, 128, 128], "dtype": "float32", "cache": "warm", "model_input": False,
        "counts": {"C++ op": {"kernels": 1.0, "copies": 0.0, "waits": 0.0}},
        "host": both, "elapsed": both, "share_of_copy": {"C++ op": {"median": 0.5}},
    }  # fmt: skip
    wide = {"shape": [64, 16, 128, 128], "dtype": "bfloat16", "cache": "cold", "counts": {}}
    share = {"share_of_copy": {"C++ op": {"median": 0.93}}}
    return {
        "schema": 1,
        "rehearsal": False,
        "machine": {
            "gpu": "A GPU", "capability": "9.0", "multiprocessors": 132, "l2_bytes": 60 << 20, "cuda": "13.0",
            "nvidia_smi": {"driver_version": "580"}, "nvcc": "13.0", "torch": "2.11", "triton": "3.6",
            "diffusers": "absent", "date": "today", "commit": "0123456789abcdef",
        },
        "cases": [line, {**line, **wide, **share}],
        "pieces": [{"op": "randn", "shape": [2, 3], "dtype": "float32", "elapsed": both, "host": both}],
        "noise": {
            "backends": {"cuda": {"compared": 1000, "mismatches": 0}, "triton": {"compared": 9, "mismatches": 1}}
        },
        "absent": {"k-diffusion": "not installed"},
        "not_measured": [],
    }  # fmt: skip


def test_verdict_is_met_not_met_or_not_measured() -> None:
    said = {line["target"]: (line["verdict"], line["figure"]) for line in verdict.verdict(_run_report())}
    by_beginning = {
        "64x16x128x128 bfloat16": ("met", "93.0%"),
        "1x16x21x90x160 float32": ("not measured", "–"),
        "1x4x128x128, ddim, eager": ("met", "5.0 µs"),
        "1x4x128x128, ddim, in a graph": ("met", "2.50 µs"),
        "1x4x128x128, dpmsolver++2m, eager": ("not measured", "–"),
        "one kernel a step": ("met", "1.00 at most"),
        "noise by cuda": ("met", "0 differ of 1,000"),
        "noise by triton": ("not met", "1 differ of 9"),
    }
    for beginning, expected in by_beginning.items():
        (found,) = [value for target, value in said.items() if target.startswith(beginning)]
        assert found == expected, beginning
    report = _run_report()
    report["cases"][0]["counts"]["Triton, JIT"] = {"kernels": 0.5, "copies": 0.0, "waits": 0.0}
    (missing,) = [line for line in verdict.verdict(report) if line["target"].startswith("one kernel")]
    assert missing["verdict"] == "not met"


def test_table_is_written_between_its_marks(tmp_path: Path) -> None:
    report = _run_report()
    report["verdict"] = verdict.verdict(report)
    document = tmp_path / "performance.md"
    document.write_text(f"before\n{table.BEGIN}\nyesterday\n{table.END}\nafter\n")
    for _ in range(2):  # a second run replaces the first one's
        table.write(report, document)
        text = document.read_text()
        assert text.startswith(f"before\n{table.BEGIN}\nOne A GPU (capability 9.0, 132 multiprocessors")
        assert text.endswith(f"{table.END}\nafter\n")
        assert "yesterday" not in text
    assert "| ddim 1×4×128×128 float32 | warm | 50 | 5.00 / 5.00 | 2.50 / 2.50 |" in text
    assert "- absent: k-diffusion: not installed" in text
    document.write_text("no marks")
    with pytest.raises(ValueError, match="lacks the marks"):
        table.write(report, document)


def test_documentation_has_the_marks_of_the_table() -> None:
    text = (ROOT / "docs" / "performance.md").read_text()
    assert text.count(table.BEGIN) == text.count(table.END) == 1
    assert text.index(table.BEGIN) < text.index(table.END)


def test_a_rehearsal_never_lands_in_a_run_s_file(tmp_path: Path) -> None:
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
def test_gpu_refuses_bad_input_in_a_sentence(arguments: tuple[str, ...], words: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match=r"^gpu: .+, expected .+; .+") as refusal:
        parse(arguments)
    assert all(word in str(refusal.value) for word in words)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_a_run_is_refused_and_a_rehearsal_offered() -> None:
    with pytest.raises(RuntimeError, match=r"^gpu: torch finds no CUDA device, expected a GPU; .*--rehearse"):
        parse(["bench"])
    assert machine.file_name("cpu") == "rehearsal"


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"STAGES": "bilud"}, "STAGES names 'bilud', expected some of build test"),
        ({"DRY": "yes"}, "DRY is 'yes'"),
        ({"LIMIT": "4m"}, "LIMIT is '4m', expected whole seconds, 120 or more"),
        ({"LIMIT": "60"}, "LIMIT is '60', expected whole seconds, 120 or more"),
    ],
)
def test_the_script_refuses_bad_input_in_a_sentence(variables: dict[str, str], words: str) -> None:
    environment = {"PATH": "/usr/bin:/bin", "PYTHON": sys.executable, **variables}
    script = ROOT / "benchmarks" / "gpu.sh"
    done = subprocess.run(["bash", str(script)], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert words in done.stderr


def test_timeline_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "images" / "timeline.png"
    stored = timeline.draw("cpu", picture, rehearse=True)
    assert picture.stat().st_size > 10_000
    assert "C++ op" in stored["lanes"] or backends.extension is None
    assert all(lanes["device"] for lanes in stored["lanes"].values())
