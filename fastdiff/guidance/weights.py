# SPDX-License-Identifier: MIT
"""The weights of a step's branches: one reduction, then scalars."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .. import ops
from ..errors import error_message
from .method import SAMPLE, STATE, Guidance, Place
from .scalars import Scalar
from .vectors import Products

#: Up to this many samples on the CPU, scalars are Python floats: a tensor operation costs as much as a formula.
MOST_ON_HOST = 16

#: The weights of the branches and, last, of the sample in the guided output; the same in what guidance keeps.
RowWeights = tuple[Sequence[Scalar], Sequence[Scalar] | None]


def host_scales(methods: Sequence[Guidance], place: Place, batch: int) -> list[float] | None:
    """Return the scale of each row of a step on the host: one for all, or one a sample; None if one is on a GPU.

    Raises:
        ValueError: a tensor of scales is for another number of samples.
    """
    found: list[float] = []
    for i, method in enumerate(methods):
        scales = method.host_scales(place)
        if scales is None:
            return None
        _check_batch(method, len(scales), batch)
        if len(methods) == 1:
            return scales
        found.append(scales[i if len(scales) > 1 else 0])
    return found


def _check_batch(method: Guidance, number: int, batch: int) -> None:
    if number not in (1, batch):
        got, remedy = f"has {number} numbers", "pass one scale, or one a sample"
        message = error_message(type(method).__name__, "scale", got, f"1 or {batch}", remedy)
        raise ValueError(message)


def step_weights(
    methods: Sequence[Guidance], place: Place, names: Sequence[str], tensors: Sequence[Tensor], sample: Tensor,
    with_state: Sequence[bool],
) -> list[RowWeights]:  # fmt: skip
    """Return the weights of a step's branches.

    Args:
        methods: one for all samples, or one a sample.
        place: the step.
        names: the branches at hand, ``state`` included where there is one.
        tensors: their tensors, ``[B, ...]``.
        sample: x, like them.
        with_state: for each method, True if it has kept a tensor in an earlier step.

    Returns:
        One entry for all samples, or one a sample; or one whose scalars are tensors ``[B]``.
    """
    batch = sample.shape[0]
    reduces = any(method.uses_reduction(place) for method in methods)
    given = [*tensors, sample] if any(method.uses_sample for method in methods) else list(tensors)
    on_host = sample.device.type == "cpu" and batch <= MOST_ON_HOST
    scales = host_scales(methods, place, batch) if on_host or not reduces else None
    places = [replace(place, has_state=True) if has else place for has in with_state]
    if scales is not None:
        rows = batch if reduces else max(len(scales), len(methods))
        products = _host_products(given) if reduces else [None] * rows
        found = []
        for i in range(rows):
            own = i if len(methods) > 1 else 0
            scale = scales[i if len(scales) > 1 else 0]
            found.append(_row(methods[own], places[own], names, products[i], scale))
        return _complete_kept(found, names)
    of_all = _device_products(given) if reduces else None
    like = torch.empty((), dtype=torch.float64, device=sample.device)
    first = methods[0]
    if len(methods) == 1:
        return [_row(first, places[0], names, of_all, first.device_scale(place, batch, like))]
    return [_mixed_row(methods, places, names, of_all, batch, like)]


def _row(method: Guidance, place: Place, names: Sequence[str], products: Products | None, scale: Scalar) -> RowWeights:
    guided, kept = method.weights(names, products, scale, place)
    if kept is None:
        return guided.weights, None
    return guided.weights, kept.weights


def _mixed_row(
    methods: Sequence[Guidance], places: Sequence[Place], names: Sequence[str], products: Products | None, batch: int,
    like: Tensor,
) -> RowWeights:  # fmt: skip
    """Return weights ``[B]`` for a method a sample: each method's are computed for all, used for its own."""
    width = len(names) + 1
    weights: list[Scalar] = [torch.zeros_like(like).expand(batch)] * width
    kept: list[Scalar] = list(weights)
    keeps = False
    for i, method in enumerate(methods):
        if method in methods[:i]:
            continue
        own = torch.tensor([other is method for other in methods], device=like.device)
        row, row_kept = _row(method, places[i], names, products, method.device_scale(places[i], batch, like))
        weights = [torch.where(own, new, old) for new, old in zip(row, weights, strict=True)]
        if row_kept is not None:
            keeps = True
            kept = [torch.where(own, new, old) for new, old in zip(row_kept, kept, strict=True)]
        elif STATE in names:
            kept[names.index(STATE)] = torch.where(own, 1.0, kept[names.index(STATE)])
    return weights, kept if keeps else None


def _complete_kept(rows: list[RowWeights], names: Sequence[str]) -> list[RowWeights]:
    """Return the rows with something to keep in all of them, if there is in one: the others keep what was kept."""
    if all(kept is None for _, kept in rows):
        return rows
    same = [1.0 if name == STATE else 0.0 for name in (*names, SAMPLE)]
    return [(weights, same if kept is None else kept) for weights, kept in rows]


def _host_products(tensors: Sequence[Tensor]) -> list[Products | None]:
    matrices, sums = ops.gram(tensors, sums=True)
    elements = tensors[0][0].numel()
    return [Products(m, s, elements) for m, s in zip(matrices.tolist(), sums.tolist(), strict=True)]


def _device_products(tensors: Sequence[Tensor]) -> Products:
    matrices, sums = (found.double() for found in ops.gram(tensors, sums=True))
    numbers = range(len(tensors))
    rows = [[matrices[:, i, j] for j in numbers] for i in numbers]
    return Products(rows, [sums[:, i] for i in numbers], tensors[0][0].numel())
