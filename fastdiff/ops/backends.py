# SPDX-License-Identifier: MIT
"""The implementations of the step: which there are, why one is missing, and which one answers.

On a GPU compiled CUDA answers, else Triton, else the reference; on the CPU compiled C++, else the reference.  The
choice can be forced for a call (``backend=``), a block of one thread or task (`use_backend`) or a process
(``FASTDIFF_BACKEND``), and asked for (`backend_for`).  A forced backend that cannot run raises and says why; where the
reference answers for a compiled backend that is missing, `fastdiff.ops.fallback` warns.

The extension reads a step's arguments and launches in C++, its own kernels and, on NVIDIA's GPUs, those that Triton
has compiled (`fastdiff.kernels.native`).  Without the extension, and for Triton's other kernels, a
`fastdiff.kernels.launch.Launcher` hands what was compiled to Triton's runner; where that cannot be (`triton_launcher`
says why), launches go through Triton's JIT, which classifies all arguments again.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..environment import CHOICES, chosen
from ..errors import error_message, unknown_name
from ..extension import extension as extension
from ..extension import extension_error as extension_error
from .call import FIELDS, StepCall

BACKENDS = CHOICES["FASTDIFF_BACKEND"]

_is_compiling = torch.compiler.is_compiling
_is_dynamo_compiling = torch.compiler.is_dynamo_compiling

_DEFAULT = chosen("FASTDIFF_BACKEND")
#: The backend that `use_backend` or FASTDIFF_BACKEND asks for in the current context, or None.  C++ reads it too
#: (`nothing_forced` in csrc/bindings/common.h).
forced: ContextVar[str | None] = ContextVar("fastdiff_backend", default=_DEFAULT)
#: The open `use_backend` blocks of the current context, outermost first.
_blocks: ContextVar[tuple[_Block, ...]] = ContextVar("fastdiff_backend_blocks", default=())
#: The names of the open `use_backend` blocks of a function that Dynamo is tracing.  Dynamo cannot trace a context
#: variable; it keeps track of this global within the trace.
_traced: tuple[str | None, ...] = ()

_get_forced = forced.get
#: Whether a backend has ever been forced other than by a call: until then no context needs a look, which takes longer
#: than the rest of `direct_extension`.
_ever_forced = _DEFAULT is not None


@dataclass(frozen=True, eq=False)
class _Block:
    """One `use_backend` block, told apart from others with the same name by identity."""

    name: str | None


@functools.cache
def _load_triton() -> tuple[ModuleType | None, str]:
    try:
        importlib.import_module("triton")
    except ImportError as error:
        return None, f"triton cannot be imported ({error}): pip install 'fastdiff-kernels[triton]'"
    try:
        return importlib.import_module("fastdiff.kernels.step"), ""
    except ImportError as error:
        return None, f"the Triton kernels cannot be imported ({error}): install fastdiff, or run pip install -e . here"


@functools.cache
def triton_module(name: str) -> ModuleType:
    """Import a module of kernels/triton; `why_missing("triton")` is empty then."""
    return importlib.import_module(f"fastdiff.kernels.{name}")


def _triton_interprets() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def _has_gpu() -> bool:
    """Return whether torch finds an accelerator that Triton may compile for: NVIDIA's, AMD's, Intel's, not Apple's."""
    if not torch.accelerator.is_available():
        return False
    found = torch.accelerator.current_accelerator()
    return found is not None and found.type != "mps"


def triton_launcher() -> str:
    """Return how Triton's kernels are launched at this moment, with the reason where they are not cached."""
    reason = why_missing("triton")
    if reason:
        return f"missing: {reason}"
    if _triton_interprets():
        return "interpreted on the CPU: TRITON_INTERPRET is 1"
    reason = triton_module("launch").why_through_jit()
    if reason:
        return f"through Triton's JIT: {reason}"
    if extension is None:
        return "caches compiled kernels, and remembers launches of steps"
    native = triton_module("native").why_not()
    where = f"launches from Python: {native}" if native else "launches steps from C++"
    return f"caches compiled kernels, and {where}"


def why_missing(name: str) -> str:
    """Return why a backend cannot run on this machine, as a clause; empty where it can."""
    if name == "reference":
        return ""
    if name == "cpu":
        return extension_error
    if name == "cuda":
        if extension is None:
            return extension_error
        if not extension.cuda:
            return "the C++ extension was built without CUDA: install with FASTDIFF_BUILD=cuda and a CUDA torch"
        return "" if torch.cuda.is_available() else "torch finds no CUDA device"
    if name == "triton":
        module, error = _load_triton()
        if module is None:
            return error
        if _has_gpu() or _triton_interprets():
            return ""
        return "torch finds no GPU, and TRITON_INTERPRET is not 1"
    raise unknown_name("step", "backend", name, BACKENDS)


def backend_status() -> dict[str, str]:
    """For each backend ``"available"``, or why it is missing."""
    return {name: why_missing(name) or "available" for name in BACKENDS}


def _serves(name: str, device: torch.device) -> bool:
    if name == "reference":
        return True
    if name == "triton":
        return device.type not in ("cpu", "mps") or _triton_interprets()
    return device.type == name


def backend_for(sample: Tensor, backend: str | None = None, operation: str = "step") -> str:
    """The name of the backend that answers a step on this tensor.

    Args:
        sample: any tensor on the device in question.
        backend: a forced choice, as in `step`.
        operation: who asks, for the message of a refusal.

    Raises:
        ValueError: the name is unknown, or that backend does not serve the tensor's device.
        RuntimeError: the forced backend cannot run on this machine; the message says why.
    """
    name = backend or forced_backend()
    device = sample.device
    if name is not None:
        missing = why_missing(name)
        if missing:
            raise RuntimeError(f"{operation}: backend {name!r} was asked for and is missing: {missing}")
        if not _serves(name, device):
            raise ValueError(
                error_message(
                    operation,
                    "backend",
                    f"is {name!r} for tensors on {device}",
                    f"one that serves {device.type}",
                    "move the tensors, or leave the choice to fastdiff",
                )
            )
        return name
    if device.type == "cpu":
        return "reference" if extension is None else "cpu"
    candidates = ("cuda", "triton") if device.type == "cuda" else ("triton",)
    return next((name for name in candidates if not why_missing(name)), "reference")


def forced_backend() -> str | None:
    """Return the backend forced in the current context, or None."""
    if _is_dynamo_compiling():
        return _traced[-1] if _traced else None
    return _get_forced()


def operator_backend(sample: Tensor, backend: str | None = None, operation: str = "step") -> str:
    """Return the `backend` argument of an operator call.

    It is empty inside a compiled function that forces nothing itself: the operator then chooses when it runs, in the
    context of its caller.  Arguments and errors are those of `backend_for`.
    """
    if _is_compiling() and not _traced and (backend or forced_backend()) is None:
        return ""
    return backend_for(sample, backend, operation)


@contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Force one backend inside a ``with`` block; None leaves the choice to the device.

    The block belongs to the current context (`contextvars`): other threads and asyncio tasks that run at the same time
    keep their own choice.  A task created inside the block inherits it; a thread started inside does not.

    Raises:
        ValueError: the name is unknown.
    """
    global _traced
    if name is not None:
        why_missing(name)  # an unknown name is refused here, not at the first step
    if _is_dynamo_compiling():
        before, _traced = _traced, (*_traced, name)
        try:
            yield
        finally:
            _traced = before
        return
    block = _Block(name)
    _open_blocks((*_blocks.get(), block))
    try:
        yield
    finally:
        # By identity, not by restoring what was there: generators may close their blocks in any order.
        _open_blocks(tuple(b for b in _blocks.get() if b is not block))


def _open_blocks(blocks: tuple[_Block, ...]) -> None:
    """Set the blocks of the current context; the innermost one decides."""
    global _ever_forced
    _ever_forced = True
    _blocks.set(blocks)
    forced.set(blocks[-1].name if blocks else _DEFAULT)


#: `fastdiff.kernels.eager` once it has kept a launch: it takes steps where there is no extension.
_eager_steps: ModuleType | None = None

#: The current stream of a device as a pointer. `torch.cuda.current_stream` would make two Python objects on the way to
#: it; a build of torch without CUDA has no such function, and no tensors to ask for.
_raw_stream: Callable[[int], int] | None = getattr(torch._C, "_cuda_getCurrentRawStream", None)


def current_stream(sample: Tensor) -> int:
    """The stream that the extension launches on: CUDA's current one as a pointer, 0 elsewhere."""
    if sample.is_cuda is not True:  # of a class it is a descriptor; the extension declines a class
        return 0
    if _raw_stream is None:
        return torch.cuda.current_stream(sample.device).cuda_stream
    return _raw_stream(sample.get_device())


def direct_extension() -> ModuleType | None:
    """Return the extension where a call may be offered to it: nothing is forced, no compiler has to see operators."""
    return None if _is_compiling() or (_ever_forced and _get_forced() is not None) else extension


def direct_step(backend: str | None) -> tuple[ModuleType | None, bool]:
    """Return the module that a step may be offered to, and whether it is to launch Triton's kernel.

    It is the extension, or without one `fastdiff.kernels.eager` once Triton has taken a step.  It is None where a
    compiler has to see operators, and where any backend but Triton is forced, by the call or by the context.
    """
    if _is_compiling():
        return None, False
    name = _get_forced() if backend is None and _ever_forced else backend
    takes_steps = _eager_steps if extension is None else extension
    if name is None:
        return takes_steps, False
    return (takes_steps, True) if name == "triton" else (None, False)


def offer(call: StepCall, triton: bool = False, *, in_operator: bool = True) -> tuple[Tensor, ...] | str | bytes:
    """Hand a call to the extension.

    Args:
        call: any call.
        triton: launch Triton's kernel where the C++ one could be launched too.
        in_operator: from the inside of an operator; else a call that a dispatch mode has to see is declined.

    Returns:
        The outputs; or, with nothing written, why the extension declined (`Decline` in csrc/bindings/step.h), or the
        key of the kernel that Triton has to compile first.
    """
    assert extension is not None
    fields = {name: getattr(call, name) for name in FIELDS}
    offered: tuple[Tensor, ...] | str | bytes = extension.step(**fields, triton=triton, in_operator=in_operator)
    return offered


def remember(call: StepCall, canonical: StepCall, compiled: Any) -> None:
    """Keep a step's launch for calls like it, where there is no extension to take them."""
    global _eager_steps
    _eager_steps = triton_module("eager")
    _eager_steps.remember(call, canonical, compiled)


def _run_extension(call: StepCall) -> None:
    offered = offer(call)
    if not isinstance(offered, tuple):
        reason = offered if isinstance(offered, str) else "kernel"
        raise AssertionError(f"step: the extension declined a canonical call ({reason}): {call}")


def _run_triton(call: StepCall) -> Any:
    offered: tuple[Tensor, ...] | str | bytes = ""
    native = None if extension is None else triton_module("native")
    if native is not None and native.enable(extension, call):
        offered = offer(call, triton=True)
    if isinstance(offered, tuple):
        return None
    kernel = triton_module("step").launch(call)
    if native is not None and isinstance(offered, bytes) and kernel is not None:
        native.install(extension, offered, kernel)
    # The extension does so itself: autograd has to find a tensor changed that it has saved.
    written = [*call.targets, *(call.history if call.write_history else ()), call.model_input]
    torch.autograd.graph.increment_version([t for t in written if isinstance(t, Tensor) and not t.is_inference()])
    return kernel


#: Functions that run a canonical call; the reference takes any call as it is.  Triton's returns what it compiled, where
#: that is cached in Python.
RUN: dict[str, Callable[[StepCall], Any]] = {
    "cpu": _run_extension,
    "cuda": _run_extension,
    "triton": _run_triton,
}
