# SPDX-License-Identifier: MIT
"""Classifier-free guidance of drop-in steps: its rescaling factor, and the guided output as a tensor."""

from __future__ import annotations

import torch
from torch import Tensor

from ..guidance.rescale import rescaling_of
from ..sampling.single_steps import cfg_combine


def rescaling(uncond: Tensor, cond: Tensor, scale: float | Tensor, share: float, sample: Tensor) -> Tensor:
    """Return the factor of each sample's guided output (arXiv 2305.08891, eq. 15 and 16).

    Args:
        uncond, cond: the model's outputs, like `sample` or with twice its channels, of which the first half counts.
        scale: the guidance scale, a float or ``[B]``.
        share: φ, 0 to 1: 1 scales the output to the standard deviation of the conditional one.
        sample: the samples, ``[B, ...]``.

    Returns:
        ``[B]``, float32 (float64 for float64).
    """
    if cond.shape != sample.shape:
        uncond, cond = uncond[:, : sample.shape[1]], cond[:, : sample.shape[1]]
    return rescaling_of(cfg_combine(cond, uncond, scale), cond, share)


def combined(uncond: Tensor, cond: Tensor, scale: float | Tensor, factor: Tensor | None) -> Tensor:
    """Return the guided output as a tensor, for a step that is not fused."""
    guided = cfg_combine(cond, uncond, scale)
    if factor is None:
        return guided
    return guided * factor.reshape(-1, *[1] * (guided.dim() - 1)).to(guided.dtype)


def combined_by_torch(uncond: Tensor, cond: Tensor, scale: float | Tensor, share: float, channels: int) -> Tensor:
    """Return the guided output by torch's operators, for `torch.compile` to fuse.

    Args:
        uncond, cond, scale, share: as in `rescaling`.
        channels: the number of the outputs' channels whose standard deviation counts for the rescaling.
    """
    wide = torch.promote_types(cond.dtype, torch.float32)
    u, c = uncond.to(wide), cond.to(wide)
    if isinstance(scale, Tensor) and scale.dim() > 0:
        scale = scale.reshape(-1, *[1] * (cond.dim() - 1))
    guided = u + scale * (c - u)
    if share != 0.0:
        axes = tuple(range(1, cond.dim()))
        stds = [x[:, :channels].std(dim=axes, keepdim=True) for x in (c, guided)]
        guided = guided * (share * (stds[0] / stds[1]) + (1.0 - share))
    return guided.to(cond.dtype)
