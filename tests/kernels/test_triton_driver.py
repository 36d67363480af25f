# SPDX-License-Identifier: MIT
"""The CUDA driver's interface as csrc/triton/ declares it."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from support import fake_driver

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.skipif(fake_driver.COMPILER is None, reason="needs a C++ compiler")


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
