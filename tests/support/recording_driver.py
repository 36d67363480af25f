# SPDX-License-Identifier: MIT
"""Triton driver that records the arguments of each launch instead of launching.

Devices 0 and 1 are NVIDIA's sm_90, device 2 is AMD's gfx942.  Kernels can be compiled for them without a GPU.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel

CHIPS = (GPUTarget("cuda", 90, 32), GPUTarget("cuda", 90, 32), GPUTarget("hip", "gfx942", 64))

#: For each launch: function, grid, stream, packed metadata, arguments with tensors as addresses.
LAUNCHES: list[tuple[Any, ...]] = []


class Recorder:
    """Replacement for the class that calls the GPU's launch function; it calls the launch hooks too."""

    def __init__(self, *_: Any) -> None:
        pass

    def __call__(
        self, x: int, y: int, z: int, stream: int, function: Any, metadata: Any, launch_metadata: Any, enter: Any,
        leave: Any, *arguments: Any,
    ) -> None:  # fmt: skip
        if enter is not None:
            enter(launch_metadata)
        values = tuple(a.data_ptr() if isinstance(a, Tensor) else a for a in arguments)
        LAUNCHES.append((function, (x, y, z), stream, metadata, values))
        if leave is not None:
            leave(launch_metadata)


class RecordingDriver:
    launcher_cls = Recorder

    def __init__(self) -> None:
        self.device = 0
        self.stream = 0
        self.utils = SimpleNamespace(
            get_device_properties=lambda _: {"max_shared_mem": 2**20},
            # A function is identified by its binary and its device.
            load_binary=lambda name, binary, _, device: ("module", (name, device, hash(binary)), 32, 0, 1024),
        )

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 1000 * device + self.stream

    def get_current_target(self) -> GPUTarget:
        return CHIPS[self.device]


class NotCompiled(CompiledKernel):  # type: ignore[misc]
    """Placeholder for a compiled kernel; its function is a tuple of all inputs of the compiler."""

    def __init__(self, source: Any, target: GPUTarget, options: dict[str, Any]) -> None:
        inputs = (source.fn.__name__, source.signature, source.constants, source.attrs)
        self.src, self.module, self.name = source, "module", source.fn.__name__
        device = triton.runtime.driver.active.get_current_device()
        self.function = (*map(repr, inputs), device, target, repr(sorted(options.items(), key=lambda item: item[0])))
        self.packed_metadata = (options["num_warps"], 1, 0)
        self.metadata = SimpleNamespace(
            name=self.name, num_warps=options["num_warps"], num_ctas=1, shared=0, global_scratch_size=0,
            profile_scratch_size=0,
        )  # fmt: skip
        self._run = Recorder()


def not_compile(source: Any, target: GPUTarget, options: dict[str, Any], **_: Any) -> NotCompiled:
    """Replace `triton.compiler.compile`: return a placeholder."""
    return NotCompiled(source, target, options)


def install() -> RecordingDriver:
    """Make a recording driver Triton's active driver and return it."""
    driver = RecordingDriver()
    triton.runtime.driver.set_active(driver)
    return driver
