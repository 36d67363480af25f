# SPDX-License-Identifier: MIT
"""``fastdiff bench --base``: another commit, checked out, built and measured beside this one."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from benchmarks import base
from benchmarks.__main__ import main

ROOT = Path(__file__).resolve().parents[2]
TINY = ("--samplers", "ddim", "heun", "--shapes", "2x1x4x4", "--rounds", "2", "--seconds", "0.002")


def _needs_checkout() -> None:
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    try:
        base.checkout()
    except RuntimeError as error:
        pytest.skip(str(error))


def test_base_refuses_what_is_no_checkout(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "fastdiff").mkdir()
    (tmp_path / "setup.py").touch()
    monkeypatch.setattr(base.fastdiff, "__file__", str(tmp_path / "fastdiff" / "__init__.py"))
    with pytest.raises(RuntimeError, match=r"^bench: --base .+, expected a git checkout .+; clone"):
        base.checkout()


def test_base_refuses_a_commit_that_is_not_there() -> None:
    _needs_checkout()
    with pytest.raises(ValueError, match=r"^bench: --base is 'no-such-rev', expected .+; see git log"):
        base.resolve(base.checkout(), "no-such-rev")


@pytest.mark.slow
def test_base_compares_with_the_last_commit_and_cleans_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
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
