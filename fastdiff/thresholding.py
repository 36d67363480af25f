# SPDX-License-Identifier: MIT
"""Dynamic thresholding: the reduction that feeds the step one scalar a sample."""

from __future__ import annotations

import torch
from torch import Tensor

from .table import compute_dtype


def dynamic_threshold(x0: Tensor, ratio: float, sample_max_value: float = 1.0) -> Tensor:
    """The bound to which the step clamps x0 before dividing by it (arXiv 2205.11487, section 2.3).

    Args:
        x0: predicted clean samples, ``[B, ...]``.
        ratio: which quantile of |x0| to take, in (0, 1].
        sample_max_value: the largest bound, 1 or more.

    Returns:
        ``[B]``, the quantile held to [1, sample_max_value], float32 (float64 for float64 samples).
    """
    if x0.numel() == 0:
        return torch.ones(x0.shape[0], dtype=compute_dtype(x0.dtype), device=x0.device)
    magnitude = x0.to(compute_dtype(x0.dtype)).abs().reshape(x0.shape[0], -1)
    bound = _quantile(magnitude, ratio)
    return bound.clamp(1.0, max(sample_max_value, 1.0))


def _quantile(values: Tensor, ratio: float) -> Tensor:
    """Linear interpolation between the two order statistics around `ratio`, as torch.quantile, at any size."""
    position = ratio * (values.shape[1] - 1)
    low = int(position)
    count = values.shape[1] - low
    # The quantiles that thresholding wants lie near the top: the few largest values suffice.
    top = torch.topk(values, count, dim=1).values
    below = top[:, -1]
    weight = position - low
    return torch.lerp(below, top[:, -2], weight) if weight else below
