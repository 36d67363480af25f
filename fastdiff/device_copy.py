# SPDX-License-Identifier: MIT
"""From the host to the device without a host sync: through pinned memory, in the order of the current stream."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """The tensor on `device`; the caller's own where it is there already.

    A copy from the CPU to a CUDA device is only enqueued, on the current stream: what runs there later finds the
    values, and the host does not wait.  (From ordinary memory it would, until the device has come that far.)
    torch keeps the pinned memory until the copy is over.

    Args:
        tensor: any shape and dtype.
        device: where to; a CUDA device without a number is the current one.
    """
    device = torch.device(device)
    if tensor.device.type != "cpu" or device.type != "cuda" or _is_watched():
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def _is_watched() -> bool:
    """Whether operators are traced, which need not see where host memory comes from, or captured.

    A graph would read pinned memory again that has long been somebody else's; torch refuses the plain copy.
    """
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch.cuda.is_current_stream_capturing()
    )


class OnDevice:
    """A tensor that was brought to a device once, and may be read on any of its streams.

    Since the host does not wait for the copy, another stream than the one that it was enqueued on has to.
    """

    def __init__(self, tensor: Tensor, device: torch.device) -> None:
        self._tensor = to_device(tensor, device)
        self._arrived: torch.cuda.Event | None = None
        if self._tensor.is_cuda:
            self._stream = torch.cuda.current_stream(self._tensor.device)
            self._arrived = self._stream.record_event()

    def get(self) -> Tensor:
        """The tensor, there for what is enqueued on the current stream from now on; not to be written."""
        if self._arrived is not None:
            stream = torch.cuda.current_stream(self._tensor.device)
            # A capture must not wait for what lies outside it; it comes after a warm-up, which has waited.
            if stream != self._stream and not torch.cuda.is_current_stream_capturing():
                stream.wait_event(self._arrived)
                self._tensor.record_stream(stream)
        return self._tensor
