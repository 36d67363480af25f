# SPDX-License-Identifier: MIT
"""Dynamic thresholding: the reduction that feeds the step one scalar a sample."""

from __future__ import annotations

import torch
from torch import Tensor

from ..row_layout import compute_dtype
from .reductions import quantile


def dynamic_threshold(x0: Tensor, ratio: float, sample_max_value: float = 1.0, *, keep_nan: bool = False) -> Tensor:
    """The bound to which the step clamps x0 before dividing by it (arXiv 2205.11487, section 2.3).

    Args:
        x0: predicted clean samples, ``[B, ...]``.
        ratio: which quantile of |x0| to take, in (0, 1].
        sample_max_value: the largest bound. Below 1 it is the bound of every sample, as in diffusers.
        keep_nan: give NaN where there is no quantile, in a sample with a NaN, as diffusers does.

    Returns:
        ``[B]``, the quantile held to 1 or more and then to sample_max_value or less, float32 (float64 for float64
        samples); the quantile is that of torch.quantile, bit for bit.
    """
    if x0.numel() == 0:
        smallest = min(1.0, sample_max_value)
        return torch.full((x0.shape[0],), smallest, dtype=compute_dtype(x0.dtype), device=x0.device)
    bounds = quantile(x0, ratio, absolute=True)
    if keep_nan:
        return bounds.clamp(1.0, sample_max_value)
    # Between two infinite numbers, and in a sample with a NaN, there is no quantile: the largest bound lets the other
    # elements keep their meaning.
    return bounds.nan_to_num(nan=sample_max_value).clamp(1.0, sample_max_value)
