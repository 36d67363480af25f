# SPDX-License-Identifier: MIT
"""``fastdiff env``: versions of the packages that matter, and the backends."""

from __future__ import annotations

import importlib.metadata
import platform

import torch

from .. import __version__, ops
from ..errors import require
from ..noise.torch_normals import why_by_torch
from ..ops.fallback import why_reference
from ..ops.memory import held_memory, kept_memory_limit
from .app import app

_PACKAGES = ("torch", "triton", "diffusers", "numpy", "scipy", "scikit-learn", "safetensors")


@app.command()
def env() -> None:
    """Print versions, backends, and why a missing one is missing."""
    print_environment()


def print_environment() -> None:
    """Versions of what matters here, and each backend with the reason where it is missing."""
    table_class = require("rich.table", "cli", "fastdiff env").Table
    plain = require("rich.text", "cli", "fastdiff env").Text  # a remedy such as 'x[extra]' is no markup
    console = require("rich.console", "cli", "fastdiff env").Console()
    versions = table_class("package", "version", title=f"fastdiff {__version__}", title_justify="left")
    versions.add_row("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    for name in _PACKAGES:
        versions.add_row(name, _version(name))
    versions.add_row("CUDA of torch", torch.version.cuda or "none: a CPU build")
    backends = table_class("backend", "status", title="backends", title_justify="left")
    for name, status in ops.backend_status().items():
        detail = f" ({ops.cpu_build()} build)" if name == "cpu" and status == "available" else ""
        backends.add_row(name, plain(status + detail))
    backends.add_row("triton launches", plain(ops.triton_launcher()))
    console.print(versions)
    console.print(backends)
    threads = torch.get_num_threads()
    console.print(plain(_answered_by("the CPU", torch.empty(0), f", with {threads} threads")))
    by_torch = why_by_torch()
    drawn = f"by torch: {by_torch}" if by_torch else "drawn by fastdiff's loop"
    console.print(plain(f"torch's noise: {drawn}"))
    console.print(
        f"kept for new outputs on the CPU: {held_memory() / 2**20:.1f} of at most {kept_memory_limit() / 2**20:.0f} MiB"
    )
    if torch.accelerator.is_available():
        on_gpu = torch.empty(0, device=torch.accelerator.current_accelerator())
        module = torch.get_device_module(on_gpu.device)
        name = module.get_device_name() if hasattr(module, "get_device_name") else str(on_gpu.device)
        console.print(plain(_answered_by(name, on_gpu)))


def _answered_by(name: str, tensor: torch.Tensor, details: str = "") -> str:
    """Return who answers on a device, and why no compiled backend does where one is to be expected."""
    try:
        backend = ops.backend_for(tensor)
    except (RuntimeError, ValueError) as error:  # the backend that FASTDIFF_BACKEND names
        return f"a step on {name} is refused: {error}"
    reason = why_reference(tensor.device.type)
    missing = f"; a compiled backend is missing: {reason}" if reason else ""
    return f"a step on {name} is answered by {backend}{details}{missing}"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
