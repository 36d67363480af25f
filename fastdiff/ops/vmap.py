# SPDX-License-Identifier: MIT
"""torch.func.vmap of the operators: the mapped dimension is folded into the batch.

Samples are next to each other in a batch anyway, each with a row, a scale and a seed of its own, so a mapped step is
one launch of a larger batch, and a mapped reduction one of more samples.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import error_message
from .call import STEP_ARGUMENTS, named
from .layout import block_strides

LIKE_SAMPLE = tuple(argument.name for argument in STEP_ARGUMENTS if argument.role in ("sample", "mask", "history"))
_PER_SAMPLE = tuple(
    argument.name for argument in STEP_ARGUMENTS if argument.role in ("scalar", "counter") and "Tensor" in argument.type
)


def fold_step(
    info: Any, in_dims: tuple[int | None, ...], *args: Any, apply: Any = None
) -> tuple[list[Tensor], list[int]]:
    """Run `fastdiff::step` under vmap; `apply` calls the operator in place of the dispatcher."""
    given, size = named(STEP_ARGUMENTS, args), info.batch_size
    folded, batch, shape = fold_step_arguments(given, named(STEP_ARGUMENTS, in_dims), size)
    results = (apply or torch.ops.fastdiff.step)(*folded.values())
    count, inner = given["keeps"] + 1, shape[1:]
    out = [result.reshape(size, *shape) for result in results[:count]]
    copies = given["model_input_copies"]
    out += [
        result.reshape(copies, size, batch, *inner).movedim(1, 0).reshape(size, copies * batch, *inner)
        for result in results[count:]
    ]
    return out, [0] * len(out)


def fold_step_arguments(
    given: dict[str, Any], dims: dict[str, int | None], size: int
) -> tuple[dict[str, Any], int, torch.Size]:
    """Return a step's arguments for one batch of all mapped calls, and the batch and the samples' shape of each."""
    shape = mapped_first(given["sample"], dims["sample"], size).shape[1:]
    batch = shape[0] if len(shape) > 0 else 1
    folded = dict(given)
    for name in LIKE_SAMPLE:
        if given[name] is not None:
            folded[name] = fold_samples(given[name], dims[name], size)
    for name in _PER_SAMPLE:
        if given[name] is not None:
            # Seeds are one for each of a sample's parts.
            count = batch // given["parts"] if name == "seeds" else batch
            folded[name] = fold_scalars(given[name], dims[name], size, count)
    if dims["table"] is not None:
        folded |= _fold_tables(mapped_first(given["table"], dims["table"], size), folded, given["row_index"], batch)
    return folded, batch, shape


def fold_samples(tensor: Tensor, dim: int | None, size: int) -> Tensor:
    """Return the samples of all mapped calls as one batch, with the elements in the memory order of their calls.

    The order is that in which a sum adds them, so its bits are those of the calls.
    """
    mapped = mapped_first(tensor, dim, size)
    if mapped.dim() == 1:
        return mapped
    if size == 0:
        return mapped.flatten(0, 1)
    strides = block_strides(mapped[0])
    order = sorted(range(1, len(strides)), key=lambda d: strides[d], reverse=True)
    folded = mapped.permute(0, 1, *(d + 1 for d in order)).flatten(0, 1)
    return folded.permute(0, *(1 + order.index(d) for d in range(1, len(strides))))


def mapped_first(tensor: Tensor, dim: int | None, size: int) -> Tensor:
    """Return a tensor with the mapped dimension first, expanded where it is not mapped."""
    return tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)


def fold_scalars(scalars: Tensor, dim: int | None, size: int, batch: int) -> Tensor:
    """Return one value for all samples where there is one, else one for each sample of the folded batch."""
    if dim is None and scalars.numel() == 1 and size * batch != 1:
        return scalars.reshape(1) if batch > 1 else scalars.reshape(1).expand(size)
    mapped = mapped_first(scalars, dim, size)
    mapped = mapped.reshape(size, mapped.numel() // size)
    return mapped.expand(size, batch).reshape(-1)


def _fold_tables(tables: Tensor, folded: dict[str, Any], row_index: int, batch: int) -> dict[str, Any]:
    """Return the tables as one, and each sample's row index in it."""
    size, length = tables.shape[:2]
    indices = folded["row_indices"]
    if indices is None:
        indices = torch.full((1,), row_index, dtype=torch.int64, device=tables.device)
    first = torch.arange(size, device=tables.device).repeat_interleave(batch) * length
    # A row outside its table skips its sample; it must not reach into the next table.
    indices = torch.where((indices >= 0) & (indices < length), indices + first, -1)
    return {"table": tables.reshape(size * length, -1), "row_indices": indices}


def fold_loss(given: dict[str, Any], dims: dict[str, int | None], size: int) -> tuple[dict[str, Any], int]:
    """Return the arguments of `fastdiff::diffusion_loss` for one batch of all mapped ones, and the size of each."""
    batch = mapped_first(given["x0"], dims["x0"], size).shape[1]
    folded = dict(given)
    for name in ("output", "x0", "noise"):
        if given[name] is not None:
            folded[name] = fold_samples(given[name], dims[name], size)
    for name in ("row_indices", "seeds", "noise_steps"):
        if given[name] is not None:
            folded[name] = fold_scalars(given[name], dims[name], size, batch)
    if dims["table"] is not None:
        folded |= _fold_tables(mapped_first(given["table"], dims["table"], size), folded, given["row_index"], batch)
    return folded, batch


def fold_randn(
    info: Any,
    in_dims: tuple[int | None, ...],
    seeds: Tensor,
    shape: list[int],
    steps: Tensor | None,
    step: int,
    purpose: int,
    dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, int]:
    """Run `fastdiff::randn` under vmap."""
    size, batch = info.batch_size, shape[0]
    keys = fold_scalars(seeds, in_dims[0], size, batch)
    numbers = None if steps is None else fold_scalars(steps, in_dims[2], size, batch)
    drawn = torch.ops.fastdiff.randn(keys, [size * batch, *shape[1:]], numbers, step, purpose, dtype, backend)
    return drawn.reshape(size, *shape), 0


def refuse_step_rows(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
    """Refuse `fastdiff::step_rows` under vmap: history that is not mapped would be written once for each sample."""
    raise RuntimeError(
        error_message(
            "step_rows",
            "history",
            "is written in place and vmap has no rule for that",
            "a step without history to write",
            "call ops.step(row_index=indices) with history= and keeps= under vmap",
        )
    )
