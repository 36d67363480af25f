# SPDX-License-Identifier: MIT
"""The weights of a step's branches: one reduction, then scalars; and the factor of rescaled guidance in them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..device_copy import to_device
from ..errors import error_message
from ..row_layout import compute_dtype
from .combining import combine
from .method import SAMPLE, STATE, Guidance, Place, RowWeights
from .rescale import rescaling_of
from .scalars import Scalar

#: Up to this many samples on the CPU, scalars are Python floats: a tensor operation costs as much as a formula.
MOST_ON_HOST = 16


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
    """Return the weights of a step's branches, rescaled; arguments and result are those of `formula_weights`."""
    rows, shares = formula_weights(methods, place, names, tensors, sample, with_state)
    if not any(shares):
        return rows
    return rescaled_weights(rows, shares, [method.branches[0] for method in methods], names, tensors, sample)


def formula_weights(
    methods: Sequence[Guidance], place: Place, names: Sequence[str], tensors: Sequence[Tensor], sample: Tensor,
    with_state: Sequence[bool],
) -> tuple[list[RowWeights], list[float]]:  # fmt: skip
    """Return the weights of a step's branches before rescaling, and φ of all samples or of each.

    Args:
        methods: one for all samples, or one a sample.
        place: the step.
        names: the branches at hand, ``state`` included where there is one.
        tensors: their tensors, ``[B, ...]``.
        sample: x, like them.
        with_state: for each method, True if it has kept a tensor in an earlier step.

    Returns:
        The weights: one entry for all samples, or one a sample; or one whose scalars are tensors ``[B]``.  And φ, 0 for
        no rescaling: one number for all samples, or one a sample.
    """
    batch = sample.shape[0]
    reduces = any(method.uses_products(place) for method in methods)
    given = [*tensors, sample] if any(method.uses_sample for method in methods) else list(tensors)
    on_host = sample.device.type == "cpu" and batch <= MOST_ON_HOST
    scales = host_scales(methods, place, batch) if on_host or not reduces else None
    places = [place._replace(has_state=True) if has else place for has in with_state]
    if scales is not None:
        rows = batch if reduces else max(len(scales), len(methods))
        products: list[Any] = ops.host_gram(given) if reduces else [None] * rows
        found, shares = [], []
        for i in range(rows):
            own = i if len(methods) > 1 else 0
            method, at, scale = methods[own], places[own], scales[i if len(scales) > 1 else 0]
            found.append(method.weights(names, at, products[i], scale))
            shares.append(method.rescale_at(at, scale))
        found = found if len(found) == 1 else _complete_kept(found, names)
    else:
        of_all: Any = None
        if reduces:
            matrices = ops.gram(given).double()
            numbers = range(len(given))
            of_all = [[matrices[:, i, j] for j in numbers] for i in numbers]
        like = torch.empty((), dtype=torch.float64, device=sample.device)
        of_method = {
            method: method.weights(names, at, of_all, method.device_scale(at, batch, like))
            for method, at in dict(zip(methods, places, strict=True)).items()
        }
        found = list(of_method.values()) if len(methods) == 1 else [_mixed_row(methods, of_method, names, batch, like)]
        shares = [method.rescale_at(at, None) for method, at in zip(methods, places, strict=True)]
    return found, shares


def rescaled_weights(
    rows: Sequence[RowWeights], shares: Sequence[float], firsts: Sequence[str], names: Sequence[str],
    tensors: Sequence[Tensor], sample: Tensor,
) -> list[RowWeights]:  # fmt: skip
    """Multiply the weights of the guided output by its factor of rescaling, a sample.

    The guided output is combined in a pass of its own, and its standard deviation measured: that would cancel in a
    formula of scalar products, where the mean is large beside it.

    Args:
        rows: the weights of the branches, for all samples, for each, or with scalars ``[B]``.
        shares: φ of all samples or of each; 0 leaves the weights as they are.
        firsts: the name of the conditional branch of all samples or of each.
        names, tensors, sample: as in `step_weights`.
    """
    batch = sample.shape[0]
    used, weights = without_zeros(sample, list(tensors), [(row, None) for row, _ in rows])
    (guided,) = combine(sample, used, weights, dtype=compute_dtype(sample.dtype))
    factors: list[Tensor] = []
    for first in dict.fromkeys(firsts):
        own = [share if first == firsts[i % len(firsts)] else 0.0 for i, share in enumerate(shares)]
        if len(own) == 1:
            factors.append(rescaling_of(guided, tensors[names.index(first)], own[0]))
        elif any(own):
            share = to_device(torch.tensor(own, dtype=torch.float64), sample.device)
            found = rescaling_of(guided, tensors[names.index(first)], share)
            factors.append(torch.where(share == 0.0, 1.0, found))
    factor = math.prod(factors[1:], start=factors[0])
    if sample.device.type == "cpu" and batch <= MOST_ON_HOST:
        each = rows if len(rows) > 1 else [rows[0]] * batch
        return [([w * number for w in row], kept) for (row, kept), number in zip(each, factor.tolist(), strict=True)]
    row, kept = rows[0]
    if len(rows) > 1:
        row, kept = _columns([row for row, _ in rows], sample), kept and _columns([k for _, k in rows], sample)
    return [([weight * factor.double() if _is_used(weight) else weight for weight in row], kept)]


def _columns(rows: Sequence[Any], like: Tensor) -> Sequence[Tensor]:
    """Return the columns of rows of numbers, float64 ``[B]`` each, on the device of `like`."""
    return to_device(torch.tensor(rows, dtype=torch.float64), like.device).unbind(1)


def _mixed_row(
    methods: Sequence[Guidance], of_method: Mapping[Guidance, RowWeights], names: Sequence[str], batch: int,
    like: Tensor,
) -> RowWeights:  # fmt: skip
    """Return weights ``[B]`` for a method a sample: each method's are computed for all, used for its own."""
    width = len(names) + 1
    weights: list[Scalar] = [torch.zeros_like(like).expand(batch)] * width
    kept: list[Scalar] = list(weights)
    keeps = False
    for method, (row, row_kept) in of_method.items():
        own = torch.tensor([other is method for other in methods], device=like.device)
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


def without_zeros(
    sample: Tensor, tensors: list[Tensor], rows: list[RowWeights]
) -> tuple[list[Tensor], list[RowWeights]]:
    """Leave out the branches whose weight is 0 in every row; the sample takes the place of the last one, unread."""
    used = [j for j in range(len(tensors)) if any(_is_used(row[j]) or (k and _is_used(k[j])) for row, k in rows)]
    if not used:
        return [sample], [((0.0, row[-1]), None) for row, _ in rows]
    if len(used) == len(tensors):
        return tensors, rows
    columns = [*used, len(tensors)]
    return [tensors[j] for j in used], [
        ([row[j] for j in columns], None if k is None else [k[j] for j in columns]) for row, k in rows
    ]


def _is_used(weight: Scalar) -> bool:
    return isinstance(weight, Tensor) or weight != 0.0


def plain_scale(rows: Sequence[RowWeights], sample: Tensor) -> float | Tensor | None:
    """Return the scale with which plain guidance is the whole combination; None where a row is needed."""
    scales: list[float] = []
    for (first, *others), _ in rows:
        if len(others) > 2 or isinstance(first, Tensor) or any(isinstance(w, Tensor) for w in others):
            return None
        second = others[0] if len(others) == 2 else 0.0
        if others[-1] != 0.0 or abs(first + second - 1.0) > 1e-15 * (abs(first) + abs(second)):
            return None
        scales.append(first)
    if all(scale == scales[0] for scale in scales):
        return scales[0]
    return torch.tensor(scales, dtype=compute_dtype(sample.dtype)).to(sample.device)
