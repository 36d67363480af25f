# SPDX-License-Identifier: MIT
"""What the tests on a GPU share: its backends, what ran on it, and tensors brought back."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from fastdiff.ops import backends
from support.oracle import INTERPRETED

BACKENDS = ("cuda", "triton")


def skip_where_missing(name: str) -> None:
    """Skip where a backend does not run on the GPU here, and say why."""
    reason = backends.why_missing(name)
    if not reason and name == "triton" and INTERPRETED:
        reason = "TRITON_INTERPRET is 1: Triton's kernels run on the CPU"
    if reason:
        pytest.skip(f"backend {name!r} is missing: {reason}")


def on_host(outputs: Sequence[Tensor]) -> list[Tensor]:
    return [output.cpu() for output in outputs]


def kernels_of(call: Callable[[], object]) -> list[str]:
    """The names of what runs on the device, copies too."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    found = [event.name for event in profiler.events() or [] if event.device_type == DeviceType.CUDA]
    if not found:
        pytest.skip("the profiler is not allowed to see kernels here")
    return found
