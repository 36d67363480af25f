# SPDX-License-Identifier: MIT
"""Selection of the backend: by device, forced in three ways, never silently replaced."""

from __future__ import annotations

import asyncio
import contextvars
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

import fastdiff
from fastdiff import ops
from fastdiff.ops import backends, reference
from support.child_environment import child_environment
from support.fork_server import run_program
from support.oracle import available_backends, device_of, plain_row

BACKENDS = available_backends()
needs_extension = pytest.mark.skipif(backends.extension is None, reason="the C++ extension was not built")
X = torch.ones(2, 3)
ROW = plain_row(prev_x=1.0, prev_m=2.0)


def which_ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the backends that run calls, in order."""
    ran: list[str] = []

    def spy(name: str) -> None:
        before = backends.RUN[name]
        monkeypatch.setitem(backends.RUN, name, lambda call: (ran.append(name), before(call))[1])

    for name in backends.RUN:
        spy(name)
    step = reference.step
    monkeypatch.setattr(reference, "step", lambda call: (ran.append("reference"), step(call))[1])
    return ran


# --- The choice ------------------------------------------------------------------------------------------------------


@needs_extension
def test_compiled_backend_is_default_on_cpu() -> None:
    assert ops.backend_for(X) == "cpu"


def test_missing_extension_uses_reference_and_forced_cpu_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "extension", None)
    monkeypatch.setattr(backends, "extension_error", "the C++ extension does not load: no such symbol")
    assert ops.backend_for(X) == "reference"
    for name in ("cpu", "cuda"):
        with pytest.raises(RuntimeError, match=rf"^step: backend '{name}' .* missing: .*does not load: no such symbol"):
            ops.backend_for(X, name)
        with pytest.raises(RuntimeError, match="no such symbol"):
            ops.step(X, X, ROW, 0, backend=name)
        assert ops.backend_status()[name] == "the C++ extension does not load: no such symbol"


@pytest.mark.parametrize("backend", BACKENDS)
def test_forced_backend_runs(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = which_ran(monkeypatch)
    x, row = X.to(device_of(backend)), ROW.to(device_of(backend))
    assert torch.equal(ops.step(x, x, row, 0, backend=backend)[0], 3 * x)
    with ops.use_backend(backend):
        assert ops.backend_for(x) == backend
        assert torch.equal(ops.step(x, x, row, 0)[0], 3 * x)
    assert ran == [backend, backend]


def test_argument_overrides_context_and_contexts_nest(monkeypatch: pytest.MonkeyPatch) -> None:
    default = ops.backend_for(X)
    with ops.use_backend("reference"):
        assert ops.backend_for(X) == "reference"
        with ops.use_backend(None):
            assert ops.backend_for(X) == default
        assert ops.backend_for(X) == "reference"
        if backends.extension is not None:
            assert ops.backend_for(X, "cpu") == "cpu"
    assert ops.backend_for(X) == default


def test_context_restores_choice_after_exception() -> None:
    default = ops.backend_for(X)
    with pytest.raises(KeyError), ops.use_backend("reference"):
        raise KeyError
    assert ops.backend_for(X) == default


# --- The block belongs to the thread or task -------------------------------------------------------------------------


def in_thread(function: Callable[[], Any]) -> Any:
    """Return the result of a function in another thread."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result(timeout=60)


def test_overlapping_contexts_of_threads_are_independent() -> None:
    default, turn = ops.backend_for(X), threading.Barrier(2, timeout=60)

    def first() -> list[str]:
        with ops.use_backend("reference"):
            turn.wait()  # both blocks are open
            seen = [ops.backend_for(X)]
            turn.wait()
        turn.wait()  # this one is closed, the other still open
        turn.wait()
        return [*seen, ops.backend_for(X)]

    def second() -> list[str]:
        before = ops.backend_for(X)
        with ops.use_backend("triton"):
            turn.wait()
            seen = [before, str(backends.forced_backend())]
            turn.wait()
            turn.wait()
            seen.append(str(backends.forced_backend()))
        turn.wait()
        return [*seen, ops.backend_for(X)]

    with ThreadPoolExecutor(2) as pool:
        results = [pool.submit(function) for function in (first, second)]
        assert results[0].result(timeout=60) == ["reference", default]
        assert results[1].result(timeout=60) == [default, "triton", "triton", default]
    assert ops.backend_for(X) == default


def test_context_does_not_apply_to_other_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    ran = which_ran(monkeypatch)
    default = in_thread(lambda: ops.backend_for(X))
    with ops.use_backend("reference"):
        assert in_thread(lambda: ops.backend_for(X)) == default
        in_thread(lambda: ops.step(X, X, ROW, 0))
        assert "reference" not in ran or default == "reference"
        ops.step(X, X, ROW, 0)
    assert ran[-1] == "reference"


def test_overlapping_tasks_inherit_choice_at_creation() -> None:
    default = ops.backend_for(X)

    async def task(name: str | None, enter: asyncio.Event, leave: asyncio.Event, mine: asyncio.Event) -> list[Any]:
        seen = [ops.backend_for(X)]
        with ops.use_backend(name):
            mine.set()
            await enter.wait()
            seen.append(backends.forced_backend())
            await leave.wait()
            seen.append(backends.forced_backend())
        return [*seen, ops.backend_for(X)]

    async def both() -> None:
        opened, closed = [asyncio.Event() for _ in range(2)], [asyncio.Event() for _ in range(2)]
        first = asyncio.create_task(task("reference", opened[1], closed[0], opened[0]))
        second = asyncio.create_task(task("triton", opened[0], closed[1], opened[1]))
        await opened[0].wait()
        await opened[1].wait()
        assert ops.backend_for(X) == default
        closed[0].set()
        assert await first == [default, "reference", "reference", default]
        closed[1].set()
        assert await second == [default, "triton", "triton", default]
        with ops.use_backend("reference"):
            heir = asyncio.create_task(asyncio.to_thread(ops.backend_for, X))
        assert await heir == "reference"
        assert ops.backend_for(X) == default

    asyncio.run(both())
    assert ops.backend_for(X) == default


def _steps_on(name: str) -> Iterator[str | None]:
    with ops.use_backend(name):
        while True:
            yield backends.forced_backend()


@pytest.mark.parametrize("first", [0, 1])
def test_generators_may_exit_contexts_in_any_order(first: int) -> None:
    default = backends.forced_backend()
    generators = [_steps_on("reference"), _steps_on("triton")]
    assert [next(generator) for generator in generators] == ["reference", "triton"]
    generators[first].close()
    assert backends.forced_backend() == ("triton", "reference")[first]
    generators[1 - first].close()
    assert backends.forced_backend() == default


def test_generator_ending_in_other_context_has_no_effect_there() -> None:
    default = backends.forced_backend()
    generator = _steps_on("reference")
    assert contextvars.copy_context().run(next, generator) == "reference"
    assert backends.forced_backend() == default
    with ops.use_backend("triton"):
        generator.close()
        assert backends.forced_backend() == "triton"
    assert backends.forced_backend() == default


def test_unknown_name_is_refused_with_list() -> None:
    message = r"backend is 'cpp', expected one of cpu, cuda, reference, triton; "
    with pytest.raises(ValueError, match=message):
        ops.backend_for(X, "cpp")
    with pytest.raises(ValueError, match=message):
        ops.step(X, X, ROW, 0, backend="cpp")
    before = backends.forced_backend()
    with pytest.raises(ValueError, match=message), ops.use_backend("cpp"):
        pass
    assert backends.forced_backend() == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device, so cuda may well be there")
def test_cuda_without_device_is_missing_with_reason() -> None:
    with pytest.raises(RuntimeError, match=r"^step: backend 'cuda' was asked for and is missing: .{20,}"):
        ops.step(X, X, ROW, 0, backend="cuda")


def test_triton_without_gpu_or_interpreter_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr(backends, "_load_triton", lambda: (fastdiff, ""))
    with pytest.raises(RuntimeError, match="missing: torch finds no GPU, and TRITON_INTERPRET is not 1"):
        ops.backend_for(X, "triton")


def test_missing_triton_names_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    backends._load_triton.cache_clear()
    try:
        with pytest.raises(RuntimeError, match=r"missing: triton cannot be imported .*fastdiff-kernels\[triton\]"):
            ops.backend_for(X, "triton")
    finally:
        backends._load_triton.cache_clear()


def test_backend_for_another_device_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "why_missing", lambda name: "")
    with pytest.raises(ValueError, match=r"^step: backend is 'cuda' for tensors on cpu, expected one "):
        ops.backend_for(X, "cuda")


def test_status_is_available_or_reason() -> None:
    status = ops.backend_status()
    assert tuple(status) == ops.BACKENDS
    assert status["reference"] == "available"
    for name, text in status.items():
        assert text == (backends.why_missing(name) or "available")


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run code in a new interpreter that imports the same fastdiff."""
    return run_program(code, env=child_environment(**environment))


def test_environment_forces_backend() -> None:
    code = """
import threading, torch, fastdiff
def show(): print(fastdiff.ops.backend_for(torch.ones(1)))
show()
for name in (None, "reference"):
    with fastdiff.ops.use_backend(name): pass
    show()
thread = threading.Thread(target=show)
thread.start()
thread.join()
with fastdiff.ops.use_backend(None): print(fastdiff.ops.backends.forced_backend())
"""
    done = run_python(code, FASTDIFF_BACKEND="reference")
    assert done.stdout.split() == ["reference"] * 4 + ["None"], done.stderr


def test_unknown_name_in_environment_is_refused_at_import() -> None:
    done = run_python("import fastdiff", FASTDIFF_BACKEND="gpu")
    assert done.returncode != 0
    assert "FASTDIFF_BACKEND is 'gpu', expected one of cpu, cuda, reference, triton; " in done.stderr
