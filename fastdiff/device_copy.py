# SPDX-License-Identifier: MIT
"""Copies from host to device without a host synchronization: through pinned memory, on the current stream."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Return the tensor on `device`; the tensor itself if it is there already.

    A copy from the CPU to a CUDA device is enqueued on the current stream without waiting for it; a copy from pageable
    memory would make the host wait.  torch keeps the pinned memory until the copy is complete.

    Args:
        tensor: a tensor of any shape and dtype.
        device: the target; a CUDA device without an index is the current one.
    """
    device = torch.device(device)
    if tensor.device.type != "cpu" or device.type != "cuda" or _is_traced_or_captured():
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def _is_traced_or_captured() -> bool:
    """Return True while operators are traced or captured in a CUDA graph, where the copy has to be a plain `to`.

    A trace need not contain the pinning.  A replayed graph would read pinned memory that has been reused since; torch
    refuses the plain copy during a capture.
    """
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch.cuda.is_current_stream_capturing()
    )


class OnDevice:
    """A tensor copied to a device once and readable on each of its streams.

    The host does not wait for the copy, so a stream other than the one it was enqueued on has to.
    """

    def __init__(self, tensor: Tensor, device: torch.device) -> None:
        self._tensor = to_device(tensor, device)
        self._copied: torch.cuda.Event | None = None
        if self._tensor.is_cuda:
            self._stream = torch.cuda.current_stream(self._tensor.device)
            self._copied = self._stream.record_event()

    def get(self) -> Tensor:
        """Return the tensor, to be read only; later work on the current stream sees the copied values."""
        if self._copied is not None:
            stream = torch.cuda.current_stream(self._tensor.device)
            # A captured graph must not wait for an event outside it; the warm-up before the capture has waited.
            if stream != self._stream and not torch.cuda.is_current_stream_capturing():
                stream.wait_event(self._copied)
                self._tensor.record_stream(stream)
        return self._tensor
