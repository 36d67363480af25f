# SPDX-License-Identifier: MIT
"""Launches of the step kernel from C++: csrc/triton/ holds what Triton compiled and calls the CUDA driver.

The first call of a kind goes through Triton's JIT, which compiles.  Its kernel is installed in the extension, so that
later steps of the kind stay in C++ from their arguments to the launch.
"""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch

from . import config, launch
from .step import _step_kernel

if TYPE_CHECKING:
    from fastdiff.ops.call import StepCall

#: The guards that launches were last enabled with.
_guards: list[tuple[object, str, object]] = []
#: Why launches from C++ cannot be enabled; empty where they are, None before the first attempt.
_problem: str | None = None


def why_not() -> str:
    """Return why steps are not launched from C++, as a clause; empty where they are or no step has been taken yet."""
    return "the GPU is AMD's" if torch.version.hip is not None else _problem or ""


def enable(extension: ModuleType, call: StepCall) -> bool:
    """Make sure that the extension launches the step kernel for calls like this one; return whether it does."""
    global _problem
    sample = call.sample
    if sample.device.type != "cuda" or torch.version.hip is not None or launch.why_through_jit():
        return False
    present = [*launch.guards(), (config, "_overridden", False)]
    present.append((_step_kernel, "pre_run_hooks", _step_kernel.pre_run_hooks))
    if _problem is None or not _same(present, _guards):
        _guards[:] = present
        _problem = extension.enable_triton(present)
    if _problem:
        return False
    draws = call.seeds is not None
    block = config.config_for("draw" if draws else "step", sample).block
    extension.set_triton_block(sample.get_device(), sample.element_size(), draws, block)
    return True


def _same(guards: list[tuple[object, str, object]], others: list[tuple[object, str, object]]) -> bool:
    return len(guards) == len(others) and all(
        a[0] is b[0] and a[1] == b[1] and a[2] is b[2] for a, b in zip(guards, others, strict=True)
    )


def install(extension: ModuleType, key: bytes, kernel: Any) -> None:
    """Install a compiled kernel for the calls of a key that the extension returned.

    A kernel that needs more than a plain launch (clusters, scratch memory) stays with Triton's runner.
    """
    metadata = kernel.metadata
    plain = (
        metadata.num_ctas == 1
        and not getattr(metadata, "launch_cooperative_grid", False)
        and not getattr(metadata, "launch_pdl", False)
        and metadata.global_scratch_size == 0
        and metadata.profile_scratch_size == 0
    )
    if not plain:
        return
    extension.install_triton_kernel(key, kernel.function, 32 * metadata.num_warps, metadata.shared, layout_of(kernel))


def layout_of(kernel: Any) -> str:
    """Return the form of each parameter of a compiled step kernel, as csrc/triton/step_kernels.h has it."""
    forms = {"i32": "i", "i64": "l", "constexpr": "-"}
    signature = [kernel.src.signature[p.name] for p in _step_kernel.params if not p.is_constexpr]
    return "".join("p" if kind.startswith("*") else forms[kind] for kind in signature)
