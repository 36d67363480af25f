# SPDX-License-Identifier: MIT
"""What tests share: children import the package that is tested, and copies of a batch stay where it is."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastdiff
from support.children import child_environment
from support.mixed import copied


def test_child_imports_the_same_package_wherever_it_is_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Another fastdiff lies where the child is started, as a checkout's lies beside the build of it.
    (tmp_path / "fastdiff").mkdir()
    (tmp_path / "fastdiff" / "__init__.py").write_text("raise ImportError('the wrong one')\n", encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    code = "import fastdiff, support.oracle; print(fastdiff.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=child_environment(), capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == fastdiff.__file__, done.stderr
    assert child_environment(PYTHONPATH="x", FASTDIFF_CPU="avx2")["PYTHONPATH"] == "x"


def test_copied_batch_stays_on_its_device_unless_another_is_named() -> None:
    batch = {"sample": torch.zeros(2, device="meta"), "registers": [torch.zeros(2, device="meta"), None], "row": 3}
    own = copied(batch)
    assert own["sample"].device.type == own["registers"][0].device.type == "meta"
    assert own["sample"] is not batch["sample"]
    there = {"sample": torch.ones(2)}
    assert copied(there, "meta")["sample"].device.type == "meta"
    assert copied(there)["sample"].data_ptr() != there["sample"].data_ptr()
