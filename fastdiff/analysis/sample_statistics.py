# SPDX-License-Identifier: MIT
"""Statistics of samples that need no other model: their diversity and their sharpness."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from ..errors import checked_type, error_message


def compute_sample_variance(samples: Tensor) -> float:
    """Return the variance among samples, averaged over their elements: ``samples.flatten(1).var(0).mean()``.

    It measures diversity: it is 0 for copies of one sample, and the variance of the data for samples like the data.
    The variance of the mean image does not (docs/pitfalls.md).

    Args:
        samples: ``[B, ...]``, floating, B of 2 or more.  Computed in float64.

    Raises:
        TypeError, ValueError: it is another kind of tensor, or has fewer than two samples.
    """
    _check_floating("compute_sample_variance", "samples", samples)
    if samples.dim() < 1 or samples.shape[0] < 2 or samples.numel() == 0:
        got, remedy = f"has shape {list(samples.shape)}", "draw more samples: one alone has no variance"
        raise ValueError(
            error_message("compute_sample_variance", "samples", got, "[B, ...] with B of 2 or more", remedy)
        )
    return float(samples.detach().double().reshape(samples.shape[0], -1).var(0).mean())


def compute_sharpness(sample: Tensor) -> float:
    """Return the mean length of an image's gradient by Sobel's operator, in intensity a pixel.

    The two kernels are divided by 8, so a ramp that rises by r from pixel to pixel has sharpness r.  Border pixels,
    which lack neighbours, are left out.  Noise counts as sharp too: compare finished samples.

    Args:
        sample: ``[H, W]``, ``[C, H, W]`` or ``[B, C, H, W]``, floating, H and W of 3 or more; averaged over all its
            channels and images.  Computed in float64.

    Raises:
        TypeError, ValueError: it is another kind of tensor, or too small.
    """
    _check_floating("compute_sharpness", "sample", sample)
    if not 2 <= sample.dim() <= 4 or min(sample.shape[-2:]) < 3 or sample.numel() == 0:
        got, expected = f"has shape {list(sample.shape)}", "[H, W], [C, H, W] or [B, C, H, W] of 3 by 3 pixels or more"
        raise ValueError(error_message("compute_sharpness", "sample", got, expected, "pass images"))
    across = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]], dtype=torch.float64) / 8
    kernels = torch.stack([across, across.T]).unsqueeze(1).to(sample.device)
    planes = sample.detach().double().reshape(-1, 1, *sample.shape[-2:])
    return float(functional.conv2d(planes, kernels).norm(dim=1).mean())


def _check_floating(operation: str, argument: str, samples: object) -> None:
    checked_type(operation, argument, samples, Tensor, "a floating-point tensor", "pass a tensor of samples")
    assert isinstance(samples, Tensor)
    if not samples.is_floating_point():
        got, remedy = f"has dtype {samples.dtype}", f"convert it with {argument}.float()"
        raise TypeError(error_message(operation, argument, got, "a floating-point tensor", remedy))
