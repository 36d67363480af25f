# SPDX-License-Identifier: MIT
"""The ways to launch fastdiff's kernels from Python; a missing one has a reason."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from fastdiff.ops import backends

from .clock import Unit

#: Names in the results.
NAMES = ("C++ op", "Triton, cached", "Triton, JIT")


class Launcher(NamedTuple):
    """One way to launch a step.

    Attributes:
        backend: the backend argument of a `Stepper`; None for the default.
        missing: why it cannot be measured here; empty if it can.
        within: makes the context manager in which the steps run.
    """

    backend: str | None
    missing: str = ""
    within: Callable[[], Any] = contextlib.nullcontext

    def wrap(self, unit: Unit) -> Unit:
        """Return the unit with its functions called within the launcher's context."""

        def wrapped(call: Callable[[], object]) -> Callable[[], object]:
            def run() -> None:
                with self.within():
                    call()

            return run

        if self.within is contextlib.nullcontext:
            return unit
        return Unit(wrapped(unit.prepare), wrapped(unit.run), unit.steps)


def launchers(device: str) -> dict[str, Launcher]:
    """Return the launchers by the names of `NAMES`."""
    triton = backends.why_missing("triton")
    compiled = "cuda" if device == "cuda" else "cpu"
    # The default backend takes the shortest way only if it is not forced.
    missing = backends.why_missing(compiled)
    default = missing or backends.backend_for(torch.empty(0, device=device)) == compiled
    cache, not_cached = _launch_module()
    return {
        "C++ op": Launcher(None if default else compiled, missing),
        "Triton, cached": Launcher("triton", triton or not_cached),
        # If kernels are cached, the JIT's launcher has to be requested.
        "Triton, JIT": Launcher("triton", triton, contextlib.nullcontext if cache is None else cache.through_jit),
    }


def _launch_module() -> tuple[Any, str]:
    """Return the module that caches compiled kernels, and why it does not cache them here."""
    try:
        module = importlib.import_module("fastdiff.kernels.launch")
    except ImportError as error:
        return None, f"nothing caches compiled kernels ({error})"
    if backends._triton_interprets():
        return module, "the interpreter compiles no kernels"
    return module, str(module.why_through_jit())
