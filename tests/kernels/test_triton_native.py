# SPDX-License-Identifier: MIT
"""Triton's compiled step kernels, launched from C++ by the driver's function."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from fastdiff.ops import backends
from support import fake_driver
from support.child_environment import child_environment

launch = pytest.importorskip("fastdiff.kernels.launch", reason="needs the triton package")

ROOT = Path(__file__).resolve().parents[2]

pytestmark = [
    pytest.mark.skipif(backends.extension is None, reason="the C++ extension was not built"),
    pytest.mark.skipif(fake_driver.COMPILER is None, reason="needs a C++ compiler for a fake driver library"),
]


def test_native_launches_pass_driver_same_arguments_as_jit(tmp_path: Path) -> None:
    if launch._unknown:
        pytest.skip(launch._unknown)
    environ = {n: value for n, value in child_environment().items() if not n.startswith(("TRITON_", "FASTDIFF_"))}
    # Set, since conftest.py would turn the interpreter on.
    environ |= {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    tests = ROOT / "tests" / "support" / "native_launches.py"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tests)],
        env=environ, cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


def test_launch_configuration_has_drivers_layout(tmp_path: Path) -> None:
    """`LaunchConfig` of csrc/triton/driver.cpp lies in memory like CUlaunchConfig of the toolkit's cuda.h."""
    header = next((p for p in (Path("/usr/local/cuda/include/cuda.h"),) if p.is_file()), None)
    if header is None:
        pytest.skip("needs cuda.h of the CUDA toolkit")
    source = (ROOT / "csrc" / "triton" / "driver.cpp").read_text()
    struct = source[source.index("struct LaunchConfig {") : source.index("struct Driver {")]
    pairs = {
        "grid_x": "gridDimX", "grid_y": "gridDimY", "grid_z": "gridDimZ", "block_x": "blockDimX",
        "block_y": "blockDimY", "block_z": "blockDimZ", "shared_bytes": "sharedMemBytes", "stream": "hStream",
        "attributes": "attrs", "attribute_count": "numAttrs",
    }  # fmt: skip
    checks = [
        f"static_assert(offsetof(LaunchConfig, {own}) == offsetof(CUlaunchConfig, {its}) && "
        f"sizeof(LaunchConfig::{own}) == sizeof(CUlaunchConfig::{its}));"
        for own, its in pairs.items()
    ]
    checks.append("static_assert(sizeof(LaunchConfig) == sizeof(CUlaunchConfig));")
    program = tmp_path / "layout.cpp"
    program.write_text("\n".join(["#include <cuda.h>", "#include <cstddef>", struct, *checks]))
    command = [str(fake_driver.COMPILER), "-std=c++17", "-fsyntax-only", "-I", str(header.parent), str(program)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
