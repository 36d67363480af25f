# SPDX-License-Identifier: MIT
"""The ways from Python to our kernels on a GPU, named in one place; a way that is missing says why."""

from __future__ import annotations

import importlib.util
from typing import NamedTuple

from fastdiff.ops import backends


class Launcher(NamedTuple):
    """One way to launch a step.

    Attributes:
        backend: what a `Stepper` is told; None is what users get without asking.
        missing: why it cannot be measured here; empty where it can.
    """

    backend: str | None
    missing: str = ""


def launchers(device: str) -> dict[str, Launcher]:
    """By the name of the results' column."""
    compiled = "cuda" if device == "cuda" else "cpu"
    triton = backends.why_missing("triton")
    held = importlib.util.find_spec("fastdiff.kernels.launch") is not None
    no_holder = "fastdiff.kernels.launch, which holds compiled kernels, is not there"
    return {
        "C++ op": Launcher(None, backends.why_missing(compiled)),
        # Where kernels are held, that is how the backend launches; without, through Triton's JIT.
        "Triton, held": Launcher("triton", triton or ("" if held else no_holder)),
        "Triton, JIT": Launcher("triton", triton or ("the backend holds its kernels instead" if held else "")),
    }
