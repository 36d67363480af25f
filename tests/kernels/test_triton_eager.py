# SPDX-License-Identifier: MIT
"""Triton's step without the C++ extension, by launches that were checked once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from support.child_environment import child_environment

launch = pytest.importorskip("fastdiff.kernels.launch", reason="needs the triton package")

ROOT = Path(__file__).resolve().parents[2]


def test_remembered_steps_pass_driver_what_checked_ones_pass(tmp_path: Path) -> None:
    if launch._unknown:
        pytest.skip(launch._unknown)
    environ = {n: value for n, value in child_environment().items() if not n.startswith(("TRITON_", "FASTDIFF_"))}
    # Set, since conftest.py would turn the interpreter on.
    environ |= {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    tests = ROOT / "tests" / "support" / "eager_launches.py"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tests)],
        env=environ, cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
