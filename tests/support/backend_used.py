# SPDX-License-Identifier: MIT
"""Which backend computed: a record of every call that reached one, and of what each public call had asked for.

`answered` puts a recorder around the places where arithmetic is done (the extension's functions, the launches of
Triton's kernels, the reference) and around the public operations. A call that asked for one backend and was computed by
another, or by none, raises at once; so a silent fallback cannot pass, on any machine.

Marked ``answers``, a test that takes a parameter `backend` is run inside it (see conftest.py) and fails where that
backend computed nothing.
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

#: The public operations, and where in their arguments the tensor is by which a backend is chosen.
OPERATIONS = {"step": 0, "step_rows": 0, "randn": 1, "quantile": 0, "mean": 0, "std": 0, "norm": 0, "dot": 0}
#: Triton's launches: module of kernels/triton, function.
TRITON = (("step", "launch"), ("philox", "randn"), ("select", "quantile"), ("reduce", "reduce"))
EXTENSION = ("step", "randn", "quantile", "sum")


@dataclass
class Record:
    """What `answered` has seen.

    Attributes:
        computed: how many calls each backend has computed.
        open: what the public calls under way have computed so far, the innermost last.
    """

    computed: Counter[str] = field(default_factory=Counter)
    open: list[set[str]] = field(default_factory=list)

    def note(self, backend: str) -> None:
        self.computed[backend] += 1
        for names in self.open:
            names.add(backend)

    def check(self, backend: str) -> None:
        """`backend` has computed something."""
        assert self.computed[backend] > 0, f"{backend} computed nothing; who did: {dict(self.computed)}"


@contextmanager
def answered() -> Iterator[Record]:
    """Record who computes in the block; a public call that is computed by another backend than it asks for raises."""
    record = Record()
    with ExitStack() as stack:
        for patch in (*_extension(record), *_triton(record), *_reference(record), *_operations(record)):
            stack.enter_context(patch)
        yield record


def _around(owner: Any, name: str, make: Callable[[Any], Any]) -> Any:
    """A patch that puts `make(the function)` in its place; what is not there any more is an error, not a gap."""
    assert hasattr(owner, name), f"{owner} has no {name}: backend_used.py records at a place that is gone"
    return mock.patch.object(owner, name, make(getattr(owner, name)))


def _extension(record: Record) -> list[Any]:
    if backends.extension is None:
        return []

    def recorded(function: Any) -> Any:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            done = function(*args, **kwargs)
            # None and a reason are refusals, except from randn, which fills a tensor. A sum's kind precedes its tensor.
            if not (done is None or isinstance(done, str)) or function is original_randn:
                tensor = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
                record.note("cuda" if tensor.is_cuda else "cpu")
            return done

        return call

    original_randn = backends.extension.randn
    return [_around(backends.extension, name, recorded) for name in EXTENSION]


def _triton(record: Record) -> list[Any]:
    if backends.why_missing("triton"):
        return []
    return [_around(_kernels(module), name, functools.partial(_noted, record, "triton")) for module, name in TRITON]


def _kernels(module: str) -> ModuleType:
    return importlib.import_module(f"fastdiff.kernels.{module}")


def _reference(record: Record) -> list[Any]:
    noted = functools.partial(_noted, record, "reference")
    names = ("quantile", "mean", "std", "norm", "dot")
    found = [_around(reductions.reference, name, noted) for name in names]
    return [*found, _around(reference, "step", noted), _around(noise, "normals", noted)]


def _noted(record: Record, backend: str, function: Any) -> Any:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        done = function(*args, **kwargs)
        record.note(backend)
        return done

    return call


def _operations(record: Record) -> list[Any]:
    return [_around(ops, name, functools.partial(_proved, record, name)) for name in OPERATIONS]


def _proved(record: Record, name: str, function: Any) -> Any:
    """The public operation, whose backend has to be the one that was asked for."""

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
    """Whether there is nothing to compute; a reduction's samples may be empty where its result is not."""
    given = args[OPERATIONS[name]] if len(args) > OPERATIONS[name] else None
    reduced = name not in ("step", "step_rows", "randn") and isinstance(given, Tensor) and given.numel() == 0
    return result.numel() == 0 or reduced
