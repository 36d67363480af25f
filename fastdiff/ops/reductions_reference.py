# SPDX-License-Identifier: MIT
"""The reductions in plain torch, on any device: what the other backends are held to.

They take samples that are blocks of memory, each with one element or more unless it says otherwise; gradients are the
operators' (fastdiff/ops/reductions.py).

`quantile` is torch's own, at any size. The sums follow the order of ``csrc/reduce_math.h`` add for add; where the
compiled backends fuse a product with its sum, here the product is rounded first, so `mean` agrees to the bit and the
others to rounding.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..row_layout import compute_dtype

#: Elements a block and lanes a block; csrc/reduce_math.h has the same numbers.
BLOCK, LANES = 1024, 64

#: Up to 2.13 torch.quantile rounds the position among float32 numbers to float32; from 2.14 on it keeps it in float64.
_ROUNDS_POSITION = torch.__version__ < "2.14"


def rank(q: float, count: int, dtype: torch.dtype) -> tuple[int, float]:
    """Return the order statistic of `count` numbers that the quantile `q` is: its rank, and the share of the next.

    `q` and the position q·(count − 1) are rounded as the torch.quantile of this torch does, up to the 2²⁴ numbers that
    it takes; beyond, float32 cannot count, and both are kept in float64.
    """
    last = count - 1
    if dtype == torch.float32 and count <= 2**24:
        share = torch.tensor(q, dtype=torch.float32, device="cpu")
        position = float((share * last).item()) if _ROUNDS_POSITION else float(share.item()) * last
    else:
        position = q * last
    low = min(int(position), last)
    weight = float(torch.tensor(position - low, dtype=dtype, device="cpu").item())
    # A share that rounds up to 1 is the next number itself.
    return (low + 1, 0.0) if weight >= 1.0 else (low, max(weight, 0.0))


def quantile(x: Tensor, low: int, weight: float, absolute: bool) -> Tensor:
    """The numbers of rank `low` and the next, interpolated; see `fastdiff.ops.quantile`."""
    values = x.to(compute_dtype(x.dtype))
    values = (values.abs() if absolute else values).reshape(x.shape[0], -1)
    ordered = values.sort(dim=1).values  # NaN comes last
    below = ordered[:, low]
    above = ordered[:, low + 1] if weight else below
    # A tensor, because torch interpolates by numbers in another way.
    result = torch.lerp(below, above, torch.full_like(below, weight))
    return torch.where(ordered[:, -1].isnan(), ordered[:, -1], result)


def mean(x: Tensor) -> Tensor:
    """The mean a sample; see `fastdiff.ops.mean`."""
    dtype = compute_dtype(x.dtype)
    return (_total(_block_sums(_blocks(x))) / _inner(x)).to(dtype)


def std(x: Tensor, correction: float) -> Tensor:
    """The standard deviation a sample; see `fastdiff.ops.std`."""
    dtype, inner = compute_dtype(x.dtype), _inner(x)
    blocks = _blocks(x)
    count = torch.full((blocks.shape[1],), BLOCK, dtype=dtype, device=x.device)
    count[-1:] -= blocks.shape[1] * BLOCK - inner
    center = _block_sums(blocks) / count  # what it rounds off, `rest` puts back
    there = torch.arange(BLOCK, device=x.device) < count[:, None]
    away = torch.where(there, blocks - center[..., None], 0.0)
    n, rest = count.double(), _block_sums(away).double()
    totals = n * center.double() + rest
    average = _total(totals) / inner
    own = _block_sums(away * away).double() - rest * (1.0 / n) * rest
    distance = totals * (1.0 / n) - average[:, None]
    spread = _total(own + n * distance * distance).clamp(min=0.0)
    return (spread / max(inner - correction, 0.0)).sqrt().to(dtype)


def norm(x: Tensor) -> Tensor:
    """The Euclidean norm a sample; see `fastdiff.ops.norm`."""
    blocks = _blocks(x)
    return _total(_block_sums(blocks * blocks)).sqrt().to(compute_dtype(x.dtype))


def dot(x: Tensor, y: Tensor) -> Tensor:
    """The scalar product a sample; see `fastdiff.ops.dot`."""
    return _total(_block_sums(_blocks(x) * _blocks(y))).to(compute_dtype(x.dtype))


def gram(tensors: Sequence[Tensor], sums: bool) -> Tensor:
    """All scalar products a sample, ``[B, K, K]``, with the sums as one more column; see `fastdiff.ops.gram`."""
    blocks = [_blocks(x) for x in tensors]
    pairs = {
        (i, j): _total(_block_sums(blocks[i] * blocks[j])) for i in range(len(blocks)) for j in range(i, len(blocks))
    }
    rows = []
    for i in range(len(blocks)):
        row = [pairs[min(i, j), max(i, j)] for j in range(len(blocks))]
        if sums:
            row.append(_total(_block_sums(blocks[i])))
        rows.append(torch.stack(row, 1))
    return torch.stack(rows, 1).to(compute_dtype(tensors[0].dtype))


def sum_of_squares(x: Tensor) -> Tensor:
    """The sum of the squares a sample, ``[B]`` float64, before the last rounding."""
    blocks = _blocks(x)
    return _total(_block_sums(blocks * blocks))


def total(x: Tensor) -> Tensor:
    """The sum a sample, ``[B]`` float64, before the last rounding."""
    return _total(_block_sums(_blocks(x)))


def memory_order(x: Tensor) -> Tensor:
    """A view of `x` whose dimensions after the first are in the order of memory, the slowest first."""
    order = sorted(range(1, x.dim()), key=lambda d: x.stride(d), reverse=True)
    return x.permute(0, *order)


def _inner(x: Tensor) -> int:
    return x[0].numel() if x.shape[0] else 0


def _blocks(x: Tensor) -> Tensor:
    """``[B, blocks, 1024]`` in the compute dtype and in the order of memory, filled up with zeros."""
    flat = memory_order(x).reshape(x.shape[0], -1).to(compute_dtype(x.dtype))
    missing = -flat.shape[1] % BLOCK
    return torch.nn.functional.pad(flat, (0, missing)).reshape(x.shape[0], -1, BLOCK)


def _block_sums(blocks: Tensor) -> Tensor:
    """``[B, blocks]``: each lane in the order of its elements, then the lanes in halves."""
    return _fold(_in_order(blocks.reshape(*blocks.shape[:-1], BLOCK // LANES, LANES)))


def _total(parts: Tensor) -> Tensor:
    """``[B]``, float64: the blocks' numbers, added as the elements of a block are."""
    missing = -parts.shape[1] % LANES
    padded = torch.nn.functional.pad(parts.double(), (0, missing))
    return _fold(_in_order(padded.reshape(parts.shape[0], -1, LANES)))


def _in_order(rounds: Tensor) -> Tensor:
    """Sum over the dimension before the last, the first round first."""
    lanes = torch.zeros_like(rounds[..., 0, :]) if rounds.shape[-2] else rounds.new_zeros((*rounds.shape[:-2], LANES))
    for r in range(rounds.shape[-2]):
        lanes = lanes + rounds[..., r, :]
    return lanes


def _fold(lanes: Tensor) -> Tensor:
    while lanes.shape[-1] > 1:
        half = lanes.shape[-1] // 2
        lanes = lanes[..., :half] + lanes[..., half:]
    return lanes[..., 0]
