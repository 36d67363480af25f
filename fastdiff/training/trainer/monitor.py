# SPDX-License-Identifier: MIT
"""Statistics of training between two reports, kept on the device: nothing here waits for it until `Monitor.read`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

#: Timesteps fall into as many equal intervals, from those with the least noise to those with the most.
BUCKETS = 4


class Monitor:
    """Loss, loss a timestep bucket, gradient norms and steps that were not finite, since the last report.

    Args:
        device: where the sums are kept.
        num_timesteps: T; timesteps are 0 to T − 1, or 0 to 1 where they are floating.
    """

    def __init__(self, device: torch.device, num_timesteps: int) -> None:
        self._num_timesteps = num_timesteps
        # Sums and counts of the loss, in all and a bucket: float64, so that counts and sums of long runs are exact.
        # An accelerator without float64 (MPS) keeps float32.
        dtype = torch.float32 if device.type == "mps" else torch.float64
        self._sums = torch.zeros((2, BUCKETS + 1), dtype=dtype, device=device)
        self._norm = torch.zeros((), dtype=torch.float32, device=device)
        self._largest = torch.zeros((), dtype=torch.float32, device=device)
        self._bad = torch.zeros((), dtype=torch.float32, device=device)

    @torch.no_grad()
    def add_losses(self, losses: Tensor, timesteps: Tensor) -> None:
        """Add the losses ``[B]`` of samples at timesteps ``[B]``; those that are not finite are left out."""
        finite = losses.isfinite()
        values = torch.where(finite, losses.detach(), 0.0).to(self._sums.dtype)
        scale = BUCKETS if timesteps.is_floating_point() else BUCKETS / self._num_timesteps
        bucket = (timesteps * scale).long().clamp(0, BUCKETS - 1) + 1
        pair = torch.stack([values, finite.to(values)])
        self._sums.index_add_(1, bucket, pair)
        self._sums[:, 0] += pair.sum(1)

    @torch.no_grad()
    def add_step(self, norm: Tensor, bad: Tensor) -> None:
        """Add the gradient norm ``[]`` of an optimizer step, and 1 where it was not finite and the step was skipped."""
        self._norm.copy_(norm)
        self._largest.copy_(torch.maximum(self._largest, norm.float()))
        self._bad += bad

    def read(self, reduce_sum: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Return the statistics and begin anew; this waits for the device.

        Args:
            reduce_sum: adds a tensor over all processes.

        Returns:
            ``loss``, the mean over samples; ``loss/t0`` …, its mean a bucket of timesteps, for buckets that were drawn;
            ``grad_norm`` of the last step before clipping, ``grad_norm_max`` of all; ``bad_steps``.
        """
        sums, counts = reduce_sum(self._sums.clone()).tolist()
        norm, largest, bad = torch.stack([self._norm, self._largest, self._bad]).tolist()
        for tensor in (self._sums, self._largest, self._bad):
            tensor.zero_()
        found = {"loss": sums[0] / counts[0] if counts[0] else float("nan")}
        for i in range(BUCKETS):
            if counts[i + 1]:
                found[f"loss/t{i}"] = sums[i + 1] / counts[i + 1]
        return {**found, "grad_norm": norm, "grad_norm_max": largest, "bad_steps": bad}
