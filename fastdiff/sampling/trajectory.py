# SPDX-License-Identifier: MIT
"""The frames of a loop: every n-th sample, in memory that is allocated once, on the device or moved off it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import checked_integer


class Trajectory:
    """Copies samples into frames: the first sample, every n-th step's and the last.

    All frames are one tensor, allocated before the loop: a loop that has begun cannot run out of memory for them.
    Frames on the CPU of a loop on a GPU lie in pinned memory, and the copies are enqueued without waiting.

    Args:
        like: a sample, ``[B, ...]``.
        every: the number of steps between frames.
        total: the number of steps of the loop.
        device: where the frames are kept; None for the device of the samples.

    Attributes:
        steps: the number of steps taken before each frame so far.
    """

    def __init__(self, like: Tensor, every: int, total: int, device: torch.device | str | None = None) -> None:
        self._every = every
        self._total = total
        kept_on = like.device if device is None else torch.device(device)
        count = 1 + -(-total // every)
        self._frames = torch.empty(
            (count, *like.shape),
            dtype=like.dtype,
            device=kept_on,
            pin_memory=like.device.type == "cuda" and kept_on.type == "cpu",
        )
        self._ready: torch.cuda.Event | None = None
        self.steps: list[int] = []

    def add(self, step: int, sample: Tensor, *, last: bool = False) -> None:
        """Copy the sample after `step` steps if it is one of the frames; `last` takes it in any case."""
        if self.steps and self.steps[-1] == step:
            return
        if last or step % self._every == 0 or step == self._total:
            self._frames[len(self.steps)].copy_(sample, non_blocking=True)
            self.steps.append(step)
            if sample.device.type == "cuda" and self._frames.device.type == "cpu":
                event = torch.cuda.Event()  # type: ignore[no-untyped-call]
                event.record(torch.cuda.current_stream(sample.device))
                self._ready = event

    def tensor(self) -> Tensor:
        """Return the frames, ``[F, B, ...]``; wait for those that are on their way to the CPU."""
        if self._ready is not None:
            self._ready.synchronize()
            self._ready = None
        return self._frames[: len(self.steps)]

    def __getstate__(self) -> dict[str, Any]:
        """A copy, or a pickle, has the finished frames."""
        return {**self.__dict__, "_frames": self.tensor(), "_ready": None}


def frames_every(return_trajectory: object) -> int:
    """Return the number of steps between frames that `return_trajectory` asks for, 0 for no trajectory.

    Raises:
        TypeError, ValueError: it is neither a bool nor an integer of at least 1.
    """
    if isinstance(return_trajectory, bool):
        return int(return_trajectory)
    return checked_integer("sample", "return_trajectory", return_trajectory, 1)
