# SPDX-License-Identifier: MIT
"""`make compat`: it reports failures, and its checks exist and pass with the installed torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from fastdiff.ops import backends

TOOLS = Path(__file__).resolve().parents[2] / "tools"


@pytest.fixture
def compat(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(TOOLS)
    import compat

    return compat


CHECKS = [
    "import",
    "samplers",
    "quantile",
    "gradients",
    "training",
    "compile",
    "export",
    "strict_export",
    "dropins",
    "compiled_dropins",
]


def test_check_list_matches_functions(compat: ModuleType) -> None:
    assert list(compat.CHECKS) == CHECKS
    text = (TOOLS / "compat_checks.py").read_text()
    assert [
        line[len("def check_") :].partition("(")[0] for line in text.splitlines() if line.startswith("def check_")
    ] == (CHECKS)


#: Runs all checks in one process, since imports would be most of the time of each, and prints their errors by name.
ALL_CHECKS = """
import importlib.util, json, sys, traceback
spec = importlib.util.spec_from_file_location("compat_checks", sys.argv[1])
checks = importlib.util.module_from_spec(spec)
sys.modules["compat_checks"] = checks
spec.loader.exec_module(checks)
checks.torch.set_num_threads(1)
errors = {}
for name in sys.argv[2:]:
    try:
        getattr(checks, f"check_{name}")()
        errors[name] = ""
    except Exception:
        errors[name] = traceback.format_exc()
print(json.dumps(errors))
"""


def _run_checks(*command: object, build: str) -> subprocess.CompletedProcess[str]:
    environ = {**os.environ, "FASTDIFF_BUILD": build, "FASTDIFF_BACKEND": "", "PYTHONPATH": str(TOOLS)}
    return subprocess.run(
        [sys.executable, *map(str, command)], env=environ, capture_output=True, text=True, check=False
    )


@pytest.mark.slow
def test_each_check_passes_with_installed_torch() -> None:
    build = "none" if backends.extension is None else "cpu"
    done = _run_checks("-c", ALL_CHECKS, TOOLS / "compat_checks.py", *CHECKS, build=build)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == dict.fromkeys(CHECKS, "")


def test_import_check_fails_for_unexpected_backend() -> None:
    done = _run_checks(TOOLS / "compat_checks.py", "import", build="cpu" if backends.extension is None else "none")
    assert done.returncode == 1
    assert "AssertionError: the cpu backend is" in done.stderr


def _pretend(compat: ModuleType, monkeypatch: pytest.MonkeyPatch, failing: str) -> None:
    """Mock the commands; those that contain the failing word fail."""

    def run(*command: object, **_: object) -> str:
        if any(str(word) == failing for word in command):
            raise compat.SetUpError(f"{failing} broke")
        return "2.6.0+cu124\n"

    monkeypatch.setattr(compat, "run", run)
    monkeypatch.setattr(compat, "make_environment", lambda folder, version: folder / "python")
    monkeypatch.setattr(compat, "copy_sources", lambda target: None)
    monkeypatch.setattr(compat, "install", lambda python, sources, build: run("install"))


@pytest.mark.parametrize(
    ("failing", "status", "said"),
    [
        ("", 0, "import:pass samplers:pass"),
        ("compile", 1, "training:pass compile:FAIL export:pass"),
        ("install", 2, "torch 2.6.0     py3.11  could not be set up"),
    ],
)
def test_exit_status_reports_failed_version(
    failing: str, status: int, said: str, compat: ModuleType, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str], tmp_path: Path,
) -> None:  # fmt: skip
    _pretend(compat, monkeypatch, failing)
    monkeypatch.setattr(sys, "argv", ["compat.py", "--folder", str(tmp_path), "2.6.0"])
    assert compat.main() == status
    printed = capsys.readouterr()
    assert said.replace("py3.11", f"py3.{sys.version_info.minor}") in printed.out
    assert len(printed.out.splitlines()) == 1
    assert (f"{failing} broke" in printed.err) == bool(failing)


def test_copied_source_keeps_modification_time(
    compat: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    root, copy = tmp_path / "root", tmp_path / "copy"
    (root / "csrc").mkdir(parents=True)
    (root / "build").mkdir()
    for name in ("csrc/a.cpp", "csrc/b.cpp", "build/left.o"):
        (root / name).write_text("1")
        os.utime(root / name, (1000, 1000))
    monkeypatch.setattr(compat, "ROOT", root)
    compat.copy_sources(copy)
    assert sorted(path.name for path in copy.rglob("*.*")) == ["a.cpp", "b.cpp"]
    (copy / "csrc" / "a.cpp").write_text("as built")
    os.utime(copy / "csrc" / "a.cpp", (1000, 1000))
    (root / "csrc" / "b.cpp").write_text("2")
    compat.copy_sources(copy)
    assert (copy / "csrc" / "a.cpp").read_text() == "as built"  # not written again
    assert (copy / "csrc" / "b.cpp").read_text() == "2"
