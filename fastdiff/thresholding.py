# SPDX-License-Identifier: MIT
"""Dynamic thresholding: the reduction that feeds the step one scalar a sample."""

from __future__ import annotations

import torch
from torch import Tensor

from .ops.reductions import quantile
from .table import compute_dtype


def dynamic_threshold(x0: Tensor, ratio: float, sample_max_value: float = 1.0) -> Tensor:
    """The bound to which the step clamps x0 before dividing by it (arXiv 2205.11487, section 2.3).

    Args:
        x0: predicted clean samples, ``[B, ...]``.
        ratio: which quantile of |x0| to take, in (0, 1].
        sample_max_value: the largest bound, above 0; one below 1 is the bound itself, as in diffusers.

    Returns:
        ``[B]``, the quantile held to [1, sample_max_value], float32 (float64 for float64 samples); that of
        torch.quantile, bit for bit.
    """
    if x0.numel() == 0:
        return torch.ones(x0.shape[0], dtype=compute_dtype(x0.dtype), device=x0.device)
    # Between two infinite numbers, and in a sample with a NaN, there is no quantile: the largest bound lets the other
    # elements keep their meaning.
    return quantile(x0, ratio, absolute=True).nan_to_num(nan=sample_max_value).clamp(1.0, sample_max_value)
