# SPDX-License-Identifier: MIT
"""``fastdiff bench --base``: check out, build and measure another commit."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from benchmarks import base_commit
from benchmarks.__main__ import main

ROOT = Path(__file__).resolve().parents[2]
TINY = ("--samplers", "ddim", "heun", "--shapes", "2x1x4x4", "--rounds", "2", "--seconds", "0.002")


def _needs_checkout() -> None:
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    try:
        base_commit.checkout()
    except RuntimeError as error:
        pytest.skip(str(error))


def test_base_refuses_installed_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "fastdiff").mkdir()
    (tmp_path / "setup.py").touch()
    monkeypatch.setattr(base_commit.fastdiff, "__file__", str(tmp_path / "fastdiff" / "__init__.py"))
    with pytest.raises(RuntimeError, match=r"^bench: --base .+, expected a git checkout .+; clone"):
        base_commit.checkout()


def test_base_refuses_unknown_commit() -> None:
    _needs_checkout()
    with pytest.raises(ValueError, match=r"^bench: --base is 'no-such-rev', expected .+; see git log"):
        base_commit.resolve(base_commit.checkout(), "no-such-rev")


def test_base_copies_extension_of_same_sources_only(tmp_path: Path) -> None:
    _needs_checkout()

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    git("init", "-q")
    for name in ("csrc/step.cpp", "setup.py", "fastdiff/step.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("1")
    git("add", "-A")
    git("commit", "-qm", "one")
    one = git("rev-parse", "HEAD")
    assert base_commit.same_extension(tmp_path, one) is None  # none has been built
    built = tmp_path / "fastdiff" / "_C.cpython.so"
    built.touch()
    (tmp_path / "fastdiff" / "step.py").write_text("2")
    assert base_commit.same_extension(tmp_path, one) == built
    (tmp_path / "csrc" / "new.cpp").touch()
    assert base_commit.same_extension(tmp_path, one) is None
    (tmp_path / "csrc" / "new.cpp").unlink()
    (tmp_path / "csrc" / "step.cpp").write_text("2")
    assert base_commit.same_extension(tmp_path, one) is None
    git("add", "csrc")
    git("commit", "-qm", "two")
    assert base_commit.same_extension(tmp_path, one) is None
    assert base_commit.same_extension(tmp_path, "HEAD") == built


@pytest.mark.slow
def test_base_compares_with_last_commit_and_cleans_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _needs_checkout()
    pytest.importorskip("rich")
    out = tmp_path / "out.json"
    main(["--base", "HEAD", *TINY, "--caches", "warm", "--processes", "1", "--json", str(out)])
    assert "base / this" in capsys.readouterr().out
    report = json.loads(out.read_text())
    assert report["base"] == "HEAD"
    assert [line["op"] for line in report["results"]] == ["ddim", "heun"]
    for line in report["results"]:
        assert set(line["microseconds"]) == {"this", "base"}
        assert 0 < line["base_over_this"]["p20"] <= line["base_over_this"]["p80"]
    worktrees = subprocess.run(["git", "worktree", "list"], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert "fastdiff-bench-" not in worktrees
