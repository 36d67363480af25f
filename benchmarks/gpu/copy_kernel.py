# SPDX-License-Identifier: MIT
"""Vectorised copy in Triton, with 16 bytes per access for aligned tensors."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _copy_kernel(src_ptr, dst_ptr, size, BLOCK: tl.constexpr):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < size
    tl.store(dst_ptr + offsets, tl.load(src_ptr + offsets, mask=mask), mask=mask)


def copy(src: Tensor, dst: Tensor, block: int, warps: int) -> None:
    """Copy a contiguous tensor, with `block` elements and `warps` warps per program."""
    size = src.numel()
    _copy_kernel[(triton.cdiv(size, block),)](src, dst, size, BLOCK=block, num_warps=warps)
