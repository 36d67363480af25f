# SPDX-License-Identifier: MIT
"""Tables with the weights of guidance, and the pass that combines branches alone."""

from __future__ import annotations

import functools
from array import array
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from .. import ops
from ..device_copy import to_device
from ..errors import error_message
from ..row_layout import ROW_WIDTH, compute_dtype
from .method import RowWeights
from .rows import (
    COMBINING_ROW,
    MOST_BRANCHES,
    OUTPUT_COLUMNS,
    Placement,
    combining_placement,
    guided_row,
    table_of,
)
from .scalars import Scalar


def table_and_scale(
    base: Sequence[float], placement: Placement, rows: Sequence[RowWeights], terms: Sequence[Scalar], like: Tensor
) -> tuple[Tensor, float | Tensor]:
    """Return the table of a step, ``[1, 32]`` or ``[B, 32]``, and its guidance scale, a float or ``[B]``.

    Args:
        base: the solver's row, or `COMBINING_ROW`.
        placement: where the branches are.
        rows: their weights, for all samples, for each, or with scalars ``[B]``.
        terms: the weights of the extra terms.
        like: the samples, ``[B, ...]``.
    """
    made = [guided_row(base, placement, weights, kept, terms) for weights, kept in rows]
    table = table_of([row for row, _ in made], like.shape[0], like)
    first = made[0][1]
    if isinstance(first, Tensor):
        return table, first.to(table.dtype)
    if len(made) == 1:
        return table, first
    return table, to_device(torch.tensor([scale for _, scale in made], dtype=table.dtype), like.device)


class HostTable:
    """A table on the CPU, written anew for each step in the same memory: making a tensor takes longer than a row.

    Args:
        rows: 1, or one a sample.
        like: the samples.
    """

    def __init__(self, rows: int, like: Tensor) -> None:
        self.of, dtype = like.dtype, compute_dtype(like.dtype)
        self._code: Literal["d", "f"] = "d" if dtype is torch.float64 else "f"
        self._numbers = array(self._code, [0.0] * (rows * ROW_WIDTH))
        self._scales = array(self._code, [1.0] * rows)
        with torch.inference_mode(False):
            self.tensor = torch.frombuffer(self._numbers, dtype=dtype).view(rows, ROW_WIDTH)
            self.scales = torch.frombuffer(self._scales, dtype=dtype)

    def __len__(self) -> int:
        return self.tensor.shape[0]

    def write(self, base: Sequence[float], placement: Placement, rows: Sequence[RowWeights]) -> float | Tensor:
        """Write the solver's row with the branches' weights of each row; return the guidance scale or scales.

        Args:
            base, placement, rows: as in `table_and_scale`, all of them floats.
        """
        scale = 1.0
        for i, (weights, kept) in enumerate(rows):
            row, scale = guided_row(base, placement, weights, kept)
            self._numbers[i * ROW_WIDTH : (i + 1) * ROW_WIDTH] = array(self._code, row)
            self._scales[i] = scale
        return scale if len(rows) == 1 else self.scales

    def write_pairs(
        self, base: Sequence[float], pairs: Sequence[tuple[float, float]]
    ) -> tuple[tuple[Tensor, int | Tensor], float | Tensor]:
        """Write the solver's row for a pair of branches, combined as κ·(b + g·(a − b)) by the step.

        Args:
            base: as in `write`.
            pairs: (κ, g) of all samples, or of each.

        Returns:
            The table and the row index, as in `fastdiff.ops.step`; and g, or all of them.
        """
        row = array(self._code, base)
        for i, (factor, scale) in enumerate(pairs):
            start = i * ROW_WIDTH
            self._numbers[start : start + ROW_WIDTH] = row
            self._scales[i] = scale
            for column in OUTPUT_COLUMNS:
                if base[column] != 0.0:
                    self._numbers[start + column] = base[column] * factor
        if len(pairs) == 1:
            return (self.tensor, 0), pairs[0][1]
        return (self.tensor, row_index(self.tensor)), self.scales


def row_index(table: Tensor) -> int | Tensor:
    """Return the row of each sample in a table of one row, or of one a sample."""
    return 0 if table.shape[0] == 1 else _count(table.shape[0], table.device)


@functools.lru_cache(maxsize=64)
def _count(number: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.arange(number, device=device)


def as_tokens(tensor: Tensor, dims: int | None) -> Tensor:
    """Return a tensor with a sample for each token of the last `dims` dimensions; itself for None."""
    return tensor if dims is None else tensor.reshape(-1, *tensor.shape[tensor.dim() - dims :])


def or_empty(tensor: Tensor | None, like: Tensor) -> Tensor:
    """Return a tensor to write: the given one, or a new one."""
    return torch.empty_like(like) if tensor is None else tensor


def combine(
    sample: Tensor, tensors: Sequence[Tensor], rows: Sequence[RowWeights], *, token_dims: int | None = None,
    state: Tensor | None = None, dtype: torch.dtype | None = None, backend: str | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Combine branches in one pass.

    Args:
        sample: x, whose weight is the last of each row.
        tensors: the branches, ``[B, ...]``, six at most.
        rows: their weights, and those of a second sum.
        token_dims: the trailing dimensions of a token, where the rows are for tokens.
        state: a tensor to write the second sum to; may be one of `tensors`.
        dtype: of the guided output; the samples' where None.
        backend: forces one, as in `fastdiff.ops.step`.

    Returns:
        The guided output, and the second sum where the rows have one.

    Raises:
        ValueError: there are more tensors than one pass reads.
    """
    keeps = rows[0][1] is not None
    if len(tensors) > MOST_BRANCHES - keeps:
        got, expected = f"are {len(tensors)}", f"at most {MOST_BRANCHES - keeps} in one pass"
        raise ValueError(error_message("combine", "branches", got, expected, "combine some of them before"))
    placement = combining_placement(len(tensors), keeps=keeps)
    shape = sample.shape
    x, *branches = (as_tokens(tensor, token_dims) for tensor in (sample, *tensors))
    table, scale = table_and_scale(COMBINING_ROW, placement, rows, (), x)
    outs = [torch.empty_like(x, dtype=dtype), *([or_empty(state, x)] if keeps else [])]
    graph = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, *branches))
    results = ops.step(
        x,
        branches[0],
        table,
        row_index(table),
        uncond=branches[1] if placement.paired else None,
        guidance_scale=scale if placement.paired else None,
        history=branches[1 + placement.paired :],
        keeps=len(outs) - 1,
        out=None if graph else outs,
        backend=backend,
    )
    return results if token_dims is None else tuple(result.reshape(shape) for result in results)


def combined_pair(
    table: HostTable, pairs: Sequence[tuple[float, float]], sample: Tensor, tensors: Sequence[Tensor]
) -> Tensor:
    """Return κ·(b + g·(a − b)) in the compute dtype, from rows that are written to a table on the CPU.

    Args:
        table: to write.
        pairs: (κ, g) of all samples, or of each.
        sample: x, which is not read.
        tensors: a and b, like `sample`.
    """
    (own, index), scale = table.write_pairs(COMBINING_ROW, pairs)
    a, b = tensors
    return ops.step(sample, a, own, index, uncond=b, guidance_scale=scale, out=[own.dtype])[0]


def weighted_sum(sample: Tensor, tensors: Sequence[Tensor], rows: Sequence[RowWeights]) -> Tensor:
    """Return the guided output by torch's operators, inside autograd's graph."""
    total = torch.zeros_like(sample)
    for j, tensor in enumerate((*tensors, sample)):
        weights = [row[j] for row, _ in rows]
        first = weights[0]
        if not isinstance(first, Tensor):
            first = torch.tensor(weights, dtype=torch.float64, device=sample.device)
        weight = first.reshape(-1, *[1] * (sample.dim() - 1)).to(compute_dtype(sample.dtype))
        if len(weights) > 1 or isinstance(weights[0], Tensor) or weights[0] != 0.0:
            total = total + weight * tensor
    return total
