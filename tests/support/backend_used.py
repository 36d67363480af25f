# SPDX-License-Identifier: MIT
"""Record of the backend that computes each call, compared with the backend that the call requested.

`record_backends` wraps the functions that compute (the extension's functions, the launches of Triton's kernels, the
reference) and the public operations. A public call that is computed by another backend than requested, or by none,
raises at once; this detects a silent fallback on any machine.

A test with the marker ``checks_backend`` runs within it (see conftest.py). If it has a parameter `backend`, it fails
unless that backend computed something.
"""

from __future__ import annotations

import functools
import importlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any
from unittest import mock

from torch import Tensor

from fastdiff import ops
from fastdiff.ops import backends, reductions, reference
from fastdiff.ops import random as noise

#: The public operations, and the position of the tensor argument that determines the backend.
OPERATIONS = {"step": 0, "step_rows": 0, "randn": 1, "quantile": 0, "mean": 0, "std": 0, "norm": 0, "dot": 0}
OPERATIONS |= {"gram": 0, "step_log_prob": 0, "log_prob": 0}
OPERATIONS |= {"noise_and_target": 0, "add_noise": 0, "diffusion_loss": 0}
#: Triton's launch functions: module of kernels/triton, function.
TRITON = (("step", "launch"), ("philox", "randn"), ("select", "quantile"), ("reduce", "reduce"))
TRITON += (("gram", "gram"), ("log_prob", "launch"), ("diffusion_loss", "launch"))
EXTENSION = ("step", "randn", "quantile", "sum", "gram", "host_gram", "log_prob", "diffusion_loss")
EXTENSION += ("recorded_diffusion_loss",)


@dataclass
class Record:
    """Calls recorded by `record_backends`.

    Attributes:
        computed: number of calls that each backend has computed.
        open: backends used so far by each public call in progress, the innermost last.
    """

    computed: Counter[str] = field(default_factory=Counter)
    open: list[set[str]] = field(default_factory=list)

    def note(self, backend: str) -> None:
        self.computed[backend] += 1
        for names in self.open:
            names.add(backend)

    def check(self, backend: str) -> None:
        """Assert that `backend` has computed something."""
        assert self.computed[backend] > 0, f"{backend} computed nothing; who did: {dict(self.computed)}"


@contextmanager
def record_backends() -> Iterator[Record]:
    """Record the backends used within the context; raise if a public call is not computed by the requested one."""
    record = Record()
    with ExitStack() as stack:
        for patch in (*_extension(record), *_triton(record), *_reference(record), *_operations(record)):
            stack.enter_context(patch)
        yield record


def _wrapped(owner: Any, name: str, make: Callable[[Any], Any]) -> Any:
    """Return a patch that replaces a function by `make(function)`; a missing function is an error."""
    assert hasattr(owner, name), f"{owner} has no {name}, which backend_used.py wraps"
    return mock.patch.object(owner, name, make(getattr(owner, name)))


def _extension(record: Record) -> list[Any]:
    if backends.extension is None:
        return []

    def recorded(function: Any) -> Any:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            done = function(*args, **kwargs)
            # None, a reason and the key of a missing kernel are refusals, except from randn, which fills a tensor. A
            # sum's kind precedes its tensor.
            if not (done is None or isinstance(done, (str, bytes))) or function is original_randn:
                given = [*args, *kwargs.values()]
                given += [item for value in given if isinstance(value, (list, tuple)) for item in value]  # gram's
                tensor = next(value for value in given if isinstance(value, Tensor))
                triton = tensor.is_cuda and (kwargs.get("triton") or not backends.extension.cuda)  # type: ignore[union-attr]
                record.note("triton" if triton else "cuda" if tensor.is_cuda else "cpu")
            return done

        return call

    original_randn = backends.extension.randn
    return [_wrapped(backends.extension, name, recorded) for name in EXTENSION]


def _triton(record: Record) -> list[Any]:
    if backends.why_missing("triton"):
        return []
    found = [
        _wrapped(_kernels(module), name, functools.partial(_recorded, record, "triton")) for module, name in TRITON
    ]
    return [*found, _wrapped(_kernels("eager"), "step", functools.partial(_recorded, record, "triton"))]


def _kernels(module: str) -> ModuleType:
    return importlib.import_module(f"fastdiff.kernels.{module}")


def _reference(record: Record) -> list[Any]:
    recorded = functools.partial(_recorded, record, "reference")
    names = ("quantile", "mean", "std", "norm", "dot", "gram")
    found = [_wrapped(reductions.reference, name, recorded) for name in names]
    found.append(_wrapped(importlib.import_module("fastdiff.ops.log_prob"), "_by_reference", recorded))
    kernels = importlib.import_module("fastdiff.ops.loss_kernels")
    found += [_wrapped(kernels, name, recorded) for name in ("_loss_by_reference", "_gradient_by_reference")]
    return [*found, _wrapped(reference, "step", recorded), _wrapped(noise, "normals", recorded)]


def _recorded(record: Record, backend: str, function: Any) -> Any:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        done = function(*args, **kwargs)
        if not isinstance(done, str):  # a reason is a refusal
            record.note(backend)
        return done

    return call


def _operations(record: Record) -> list[Any]:
    return [_wrapped(ops, name, functools.partial(_checked, record, name)) for name in OPERATIONS]


def _checked(record: Record, name: str, function: Any) -> Any:
    """Wrap a public operation with a check that the requested backend computes it."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        record.open.append(set())
        try:
            result = function(*args, **kwargs)
        finally:
            computed = record.open.pop()
        first = result[0] if isinstance(result, tuple) else result
        asked = ops.backend_for(first, kwargs.get("backend"), name)
        if computed or not _is_empty(name, args, first):
            assert computed == {asked}, f"{name} asked for {asked} and was computed by {sorted(computed) or 'nobody'}"
        return result

    return call


def _is_empty(name: str, args: tuple[Any, ...], result: Tensor) -> bool:
    """Return True if there is nothing to compute: the result, or a reduction's input, is empty."""
    given = args[OPERATIONS[name]] if len(args) > OPERATIONS[name] else None
    if name == "gram":
        given = given[0]  # type: ignore[index]
    reduced = name not in ("step", "step_rows", "randn") and isinstance(given, Tensor) and given.numel() == 0
    return result.numel() == 0 or reduced
