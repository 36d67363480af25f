# SPDX-License-Identifier: MIT
"""Replacement for the CUDA driver's library, through which the extension launches Triton's kernels without a GPU.

The extension takes CPU tensors for the device's.  Nothing is executed: each launch is recorded.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

COMPILER = shutil.which(os.environ.get("CXX") or "c++") or shutil.which("g++")
SOURCE = Path(__file__).with_name("fake_driver.cpp")


class Launch(ctypes.Structure):
    _fields_ = (
        ("function", ctypes.c_uint64),
        ("stream", ctypes.c_uint64),
        ("grid", ctypes.c_uint64 * 3),
        ("block", ctypes.c_uint64 * 3),
        ("shared_bytes", ctypes.c_uint64),
        ("attribute_count", ctypes.c_uint64),
        ("parameter_count", ctypes.c_uint64),
        ("parameters", ctypes.c_uint64 * 40),
    )


class FakeDriver:
    """The library, built in a folder."""

    def __init__(self, folder: Path) -> None:
        assert COMPILER is not None
        self.path = folder / "libfakedriver.so"
        if not self.path.exists():
            command = [COMPILER, "-O1", "-shared", "-fPIC", "-o", str(self.path), str(SOURCE)]
            subprocess.run(command, check=True, capture_output=True, text=True)
        self.library = ctypes.CDLL(str(self.path))

    def __getattr__(self, name: str) -> int:
        kind = ctypes.c_int64 if name == "launches" else ctypes.c_int
        return int(kind.in_dll(self.library, name).value)

    def set(self, **values: int) -> None:
        for name, value in values.items():
            ctypes.c_int.in_dll(self.library, name).value = value

    @property
    def last(self) -> Launch:
        return Launch.in_dll(self.library, "last")

    @contextmanager
    def enabled(self, extension: ModuleType, guards: list[tuple[object, str, object]] | None = None) -> Iterator[None]:
        """Launch Triton's kernels for CPU tensors through this library inside a ``with`` block."""
        problem = extension.enable_triton(guards or [], str(self.path), True)
        assert not problem, problem
        try:
            yield
        finally:
            extension.disable_triton()
            extension.clear_triton_kernels()


def parameters_by_layout(launch: Launch, layout: str) -> list[int]:
    """Return the values that a launch passed: addresses, and integers with their signs."""
    forms = [form for form in layout if form != "-"]
    assert launch.parameter_count == len(forms) + 2, "two addresses of scratch memory follow"
    values = []
    for form, word in zip(forms, launch.parameters, strict=False):
        if form == "i":
            word = ctypes.c_int32(word & 0xFFFFFFFF).value
        elif form == "l":
            word = ctypes.c_int64(word).value
        values.append(int(word))
    return values
