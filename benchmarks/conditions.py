# SPDX-License-Identifier: MIT
"""Conditions of a measurement: machine, versions, date."""

from __future__ import annotations

import datetime
import os
import platform
from pathlib import Path
from typing import Any

import torch

from fastdiff import __version__, ops

from .copy_bandwidth import last_level_cache
from .peers import version


def conditions() -> dict[str, Any]:
    """Return the conditions of a run, which are stored with its results."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "last_level_cache": last_level_cache(),
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "cpu_build": ops.cpu_build(),
        "backend": ops.backend_for(torch.empty(0)),
        "python": platform.python_version(),
        "fastdiff": __version__,
        "torch": torch.__version__,
        "diffusers": version("diffusers"),
        "k-diffusion": version("k-diffusion"),
    }


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown"
