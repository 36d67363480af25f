# SPDX-License-Identifier: MIT
"""Uniform numbers from samples' seeds, for draws of training that belong to a sample."""

from __future__ import annotations

import torch
from torch import Tensor

from ..philox import philox_words


def seeded_uniforms(seeds: Tensor, purpose: int, count: int) -> Tensor:
    """Return uniform numbers in (0, 1), ``[B, count]`` float64 on the seeds' device.

    Args:
        seeds: ``[B]`` int64.
        purpose: a `fastdiff.philox.Purpose`, or another number that no other draw from these seeds uses.
        count: numbers a sample.
    """
    chunks = torch.arange((count + 3) // 4, dtype=torch.int64, device=seeds.device)
    key = (seeds[:, None] & 0xFFFFFFFF, (seeds[:, None] >> 32) & 0xFFFFFFFF)
    zero = torch.zeros_like(seeds[:, None])
    words = philox_words((chunks[None, :] + zero, zero, zero, zero + purpose), key)
    return (torch.stack(words, dim=-1).flatten(1)[:, :count].to(torch.float64) + 0.5) * 2.0**-32
