# SPDX-License-Identifier: MIT
"""Cached kernels: launch what Triton compiled for an earlier call of the same kind, without its JIT.

``kernel[grid](...)`` binds the arguments, classifies each, makes a string of the result and of the options, looks the
compiled kernel up by it, and prepares what profilers may read: more time than a small step takes on the GPU.
`Launcher` keeps the compiled kernel by a key of its own and hands it to Triton's runner with the grid and the stream.
The first call of a kind goes through the JIT, which compiles.

A key that forgets something would be a wrong result, so it holds whatever Triton may specialise on, as it is: the
device, every tensor's dtype and whether its address is a multiple of 16 (or what the compiler's backend makes of the
tensor, where it has rules of its own), sizes as numbers, how wide the integers in ``do_not_specialize`` are, all
compile-time constants, and the warps.  Where anything else could change what is run or reported, the JIT launches:
launch hooks, Triton's debug mode, instrumentation, hooks of the compiler, a version of Triton that was not read.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

import triton
from triton.runtime.jit import JITFunction

#: The versions whose runtime is known to take what `Launcher` hands it, and the kinds of GPU.
VERSIONS = ((3, 6), (3, 7))
TARGETS = ("cuda", "hip")

#: The programs that one launch may have, on every GPU.
MOST_PROGRAMS = 2**31 - 1

#: Kinds of call that a launcher caches; sizes are part of a kind, and a program may go through very many.
_CACHE_SIZE = 4096

_through_jit = os.environ.get("FASTDIFF_TRITON_LAUNCHER") == "jit"  # fastdiff.environment refuses what is unknown


def _version() -> tuple[int, ...]:
    return tuple(int(part) for part in triton.__version__.split(".")[:2] if part.isdigit())


def _unknown_runtime() -> str:
    """Return why compiled kernels of this Triton cannot be cached, as a clause; empty where they can."""
    if _version() not in VERSIONS:
        known = " and ".join(".".join(map(str, version)) for version in VERSIONS)
        return f"triton is {triton.__version__}, and compiled kernels are cached with {known}"
    runtime = getattr(getattr(triton, "knobs", None), "runtime", None)
    missing = [name for name in ("launch_enter_hook", "launch_exit_hook") if not hasattr(runtime, name)]
    return f"triton's runtime has no {missing[0]}" if missing else ""


_unknown = _unknown_runtime()


def why_through_jit() -> str:
    """Return why launches go through Triton's JIT at this moment, as a clause; empty where kernels are cached."""
    if _unknown:
        return _unknown
    if _through_jit:
        return "it was asked for: FASTDIFF_TRITON_LAUNCHER is jit, or a block wants it"
    if _interfered_with():
        return "a launch hook, Triton's debug mode or its instrumentation is set"
    return _unknown_target()


def _unknown_target() -> str:
    """Return why nothing is cached for the current device, as a clause; empty where kernels are."""
    kind = triton.runtime.driver.active.get_current_target().backend
    return (
        "" if kind in TARGETS else f"compiled kernels are cached for {' and '.join(TARGETS)}, and this device is {kind}"
    )


def _interfered_with() -> bool:
    """Return whether launch hooks are set, as by profilers, or what is compiled has been changed."""
    knobs = triton.knobs
    runtime = knobs.runtime
    for hook in (runtime.launch_enter_hook, runtime.launch_exit_hook):
        # A chain of hooks with nobody in it, or a function that was set in its place.
        if hook is not None and getattr(hook, "calls", True):
            return True
    return bool(
        runtime.debug
        or knobs.compilation.instrumentation_mode
        or getattr(runtime, "add_stages_inspection_hook", None) is not None
    )


def guards() -> list[tuple[object, str, object]]:
    """Return what `_interfered_with` looks at and `through_jit` sets, as (owner, attribute, present value).

    While each attribute is the same object, and empty where it is a list, a cached kernel may be launched.
    """
    knobs = triton.knobs
    found = [(knobs.runtime, name) for name in ("launch_enter_hook", "launch_exit_hook", "debug")]
    found += [(knobs.compilation, "instrumentation_mode"), (sys.modules[__name__], "_through_jit")]
    if hasattr(knobs.runtime, "add_stages_inspection_hook"):
        found.append((knobs.runtime, "add_stages_inspection_hook"))
    hooks = [getattr(owner, name) for owner, name in found[:2]]
    found += [(hook, "calls") for hook in hooks if hasattr(hook, "calls")]
    return [(owner, name, getattr(owner, name)) for owner, name in found]


@contextlib.contextmanager
def through_jit() -> Iterator[None]:
    """Launch through Triton's JIT inside a ``with`` block: what a cached launch is compared with."""
    global _through_jit
    before, _through_jit = _through_jit, True
    try:
        yield
    finally:
        _through_jit = before


class Launcher:
    """Launches one kernel, whose parameters are tensors first, then integers (those of ``do_not_specialize`` before the
    others), then compile-time constants."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self._cached: dict[tuple[Any, ...], tuple[Any, Callable[..., None], Any, Any]] = {}
        self._rules: dict[int, Callable[..., str] | None] = {}
        self._unspecialized = 0
        self._may_cache = isinstance(kernel, JITFunction) and not _unknown
        if self._may_cache:
            unspecialized = [
                p.do_not_specialize for p in kernel.params if not p.is_constexpr and not p.name.endswith("_ptr")
            ]
            self._unspecialized = sum(unspecialized)
            assert unspecialized == sorted(unspecialized, reverse=True), (
                "integers that are not specialised on come first"
            )

    def __call__(
        self,
        programs: int,
        tensors: Sequence[Tensor],
        integers: Sequence[int],
        constants: tuple[int, ...],
        num_warps: int,
    ) -> Any:
        """Launch on the current stream of the tensors' device; return what Triton compiled, where it is cached.

        Args:
            programs: the grid, 1 to 2³¹ − 1.
            tensors, integers, constants: the kernel's arguments, in its order; the tensors on one device.
            num_warps: of a program.

        Raises:
            ValueError: there are too many programs for one launch.
        """
        if programs > MOST_PROGRAMS:
            raise ValueError(
                f"{self.kernel.__name__}: the samples need {programs} programs, expected {MOST_PROGRAMS} or fewer in "
                "one launch; take the batch in parts"
            )
        device = tensors[0].get_device()  # -1 for the CPU's, which Triton's interpreter takes
        if device < 0 or device == triton.runtime.driver.active.get_current_device():
            return self._launch(programs, tensors, integers, constants, num_warps)
        with on_device(tensors[0].device):
            return self._launch(programs, tensors, integers, constants, num_warps)

    def _launch(
        self,
        programs: int,
        tensors: Sequence[Tensor],
        integers: Sequence[int],
        constants: tuple[int, ...],
        num_warps: int,
    ) -> Any:
        if not self._may_cache or _through_jit or _interfered_with() or self.kernel.pre_run_hooks:
            self._ask_jit(programs, tensors, integers, constants, num_warps)
            return None
        driver = triton.runtime.driver.active
        device = driver.get_current_device()
        # Tensors that are absent are the first one again.
        first = tensors[0]
        address, dtype = first.data_ptr(), first.dtype
        addresses = [address if t is first else t.data_ptr() for t in tensors]
        if device not in self._rules:
            if _unknown_target():
                self._ask_jit(programs, tensors, integers, constants, num_warps)
                return None
            self._rules[device] = _own_rules()
        rules, unspecialized = self._rules[device], self._unspecialized
        key = (
            device,
            num_warps,
            constants,
            tuple([dtype if t is first else t.dtype for t in tensors]),
            _alignments(addresses) if rules is None else tuple([rules(t, align=True) for t in tensors]),
            tuple(integers[unspecialized:]),
            tuple([0 if -0x80000000 <= i <= 0x7FFFFFFF else 1 if i < 2**63 else 2 for i in integers[:unspecialized]]),
        )
        cached = self._cached.get(key)
        if cached is None:
            return self._cache(key, self._ask_jit(programs, tensors, integers, constants, num_warps))
        kernel, run, function, metadata = cached
        # No metadata for hooks and no hooks: there are none.
        stream = driver.get_current_stream(device)
        run(programs, 1, 1, stream, function, metadata, None, None, None, *addresses, *integers, *constants)
        return kernel

    def _cache(self, key: tuple[Any, ...], kernel: Any) -> Any:
        # The JIT returns None where a hook took over; a kernel that is still being compiled is cached by a later call.
        if not isinstance(kernel, triton.compiler.CompiledKernel):
            return None
        if len(self._cached) >= _CACHE_SIZE:
            self._cached.clear()
        self._cached[key] = (kernel, kernel.run, kernel.function, kernel.packed_metadata)
        return kernel

    def _ask_jit(
        self,
        programs: int,
        tensors: Sequence[Tensor],
        integers: Sequence[int],
        constants: tuple[int, ...],
        num_warps: int,
    ) -> Any:
        # Only the fused products that are written: the same bits as the CPU.
        return self.kernel[(programs,)](
            *tensors, *integers, *constants, num_warps=num_warps, enable_fp_fusion=False
        )  # fmt: skip


def _alignments(addresses: list[int]) -> tuple[bool, ...]:
    """Return which addresses are multiples of 16; empty where all are."""
    together = 0
    for address in addresses:
        together |= address
    return () if together % 16 == 0 else tuple([address % 16 == 0 for address in addresses])


def blocks_of(count: int, size: int) -> int:
    """Return count/size, rounded up; `triton.cdiv` is a wrapper that costs a microsecond."""
    return -(-count // size)


def _own_rules() -> Callable[..., str] | None:
    """Return how the compiler's backend for the current device specialises on a tensor, where not by address alone."""
    backend = triton.compiler.make_backend(triton.runtime.driver.active.get_current_target())
    return None if backend.supports_native_tensor_specialization else backend.get_tensor_specialization


def on_device(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Make a device of any kind the current one while a kernel is launched."""
    if device.type == "cpu":  # Triton's interpreter
        return contextlib.nullcontext()
    return torch.get_device_module(device).device(device)  # type: ignore[no-any-return]
