# SPDX-License-Identifier: MIT
"""The ways from Python to our kernels on a GPU, named in one place; a way that is missing says why."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

from fastdiff.ops import backends

from .clock import Unit

#: By the names of the results' columns; what users get without asking comes first.
NAMES = ("C++ op", "Triton, cached", "Triton, JIT")


class Launcher(NamedTuple):
    """One way to launch a step.

    Attributes:
        backend: what a `Stepper` is told; None is what users get without asking.
        missing: why it cannot be measured here; empty where it can.
        within: makes the context in which it is taken.
    """

    backend: str | None
    missing: str = ""
    within: Callable[[], Any] = contextlib.nullcontext

    def hold(self, unit: Unit) -> Unit:
        """The unit, taken this way."""

        def taken(call: Callable[[], object]) -> Callable[[], object]:
            def run() -> None:
                with self.within():
                    call()

            return run

        if self.within is contextlib.nullcontext:
            return unit
        return Unit(taken(unit.prepare), taken(unit.run), unit.steps)


def launchers(device: str) -> dict[str, Launcher]:
    """Each of `NAMES`."""
    triton = backends.why_missing("triton")
    cache, not_cached = _cache()
    return {
        "C++ op": Launcher(None, backends.why_missing("cuda" if device == "cuda" else "cpu")),
        "Triton, cached": Launcher("triton", triton or not_cached),
        # Where kernels can be held, the JIT has to be asked for.
        "Triton, JIT": Launcher("triton", triton, contextlib.nullcontext if cache is None else cache.through_jit),
    }


def _cache() -> tuple[Any, str]:
    """Return the module that caches compiled kernels, and why it does not cache them here."""
    try:
        module = importlib.import_module("fastdiff.kernels.launch")
    except ImportError as error:
        return None, f"nothing caches compiled kernels ({error})"
    if backends._triton_interprets():
        return module, "the interpreter compiles nothing that could be held"
    return module, str(module.why_through_jit())
