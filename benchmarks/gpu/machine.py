# SPDX-License-Identifier: MIT
"""Conditions of a GPU measurement: the chip, the driver, the versions, the commit, the date."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch

from fastdiff import ops

from ..conditions import conditions
from ..peers import version

_SMI_FIELDS = ("name", "driver_version", "clocks.max.sm", "clocks.max.mem", "clocks.sm", "clocks.mem", "power.limit")


def machine(device: str) -> dict[str, Any]:
    """Return the conditions of a run."""
    found: dict[str, Any] = {
        **conditions(),
        "backend": ops.backend_for(torch.empty(0, device=device)),
        "triton": version("triton"),
        "cuda": torch.version.cuda,
        "nvcc": _release("nvcc"),
        "commit": commit(),
        "backends": ops.backend_status(),
    }
    return {**found, **(_gpu() if device == "cuda" else {"gpu": None})}


def _gpu() -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(0)
    return {
        "gpu": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": l2_bytes(),
        "memory_bytes": properties.total_memory,
        "nvidia_smi": _smi(),
    }


def l2_bytes() -> int:
    """Return the size in bytes of the GPU's second-level cache."""
    return int(torch.cuda.get_device_properties(0).L2_cache_size)


def file_name(device: str) -> str:
    """Return the name of the results' file without suffix: the GPU's name in lower case with dashes."""
    name = torch.cuda.get_device_name(0) if device == "cuda" else "rehearsal"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def commit() -> str:
    """Return the measured commit, with a + if the tree differs from it, or that it is unknown."""
    if os.environ.get("FASTDIFF_COMMIT"):
        return os.environ["FASTDIFF_COMMIT"]
    root = Path(__file__).resolve().parents[2]
    named = _output("git", "-C", str(root), "rev-parse", "HEAD")
    if named is None:
        return "unknown: no git checkout"
    return named + ("+" if _output("git", "-C", str(root), "status", "--porcelain", "-uno") else "")


def _smi() -> dict[str, str]:
    text = _output("nvidia-smi", f"--query-gpu={','.join(_SMI_FIELDS)}", "--format=csv,noheader", "--id=0")
    values = [] if text is None else [value.strip() for value in text.split(",")]
    return dict(zip(_SMI_FIELDS, values, strict=False))


def _release(compiler: str) -> str:
    text = _output(compiler, "--version") or ""
    found = re.search(r"release (\d+\.\d+)", text)
    return found.group(1) if found else "absent"


def _output(*command: str) -> str | None:
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None
