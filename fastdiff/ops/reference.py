# SPDX-License-Identifier: MIT
"""The fused step in plain torch: the specification that every other backend is tested against.

It runs on any device, is differentiable, and allocates as torch does.  The order of operations is the contract::

    m = u + g·(c − u)
    d = (0 + p·x) + q·m;  clamped to ±clip;  with a threshold s: clamped to ±s and divided by s
    out = ((0 + a_x·x) + a_m·m) + a_d·d + a_0·h_0 + … + a_3·h_3 + a_z·(std·z)
    prev = (1 − w)·prev + w·b with a mask w; prev where w is 0, b where w is 1

computed in float32 (float64 where a tensor is float64), and each output rounded once to its dtype; z may be drawn from
seeds (`fastdiff.philox`), and then is not rounded to the samples' dtype.  A term whose coefficient is 0 is not added,
so a tensor that a row does not use may be absent, or hold anything.  Compiled backends fuse each product with its sum
(fma); here the product is rounded first, which is why agreement is stated in units of rounding, not of bits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import philox
from ..row_layout import (
    CLIP,
    COLUMNS,
    KEEP_0,
    KEEP_1,
    MODEL_INPUT_SCALE,
    NUM_REGISTERS,
    PREDICTION_SAMPLE,
    PREV_SAMPLE,
    STORE_0,
    STORE_1,
    VARIANCE_OFFSET,
    VARIANCE_SLOPE,
    Variance,
)
from .call import StepCall


def step(call: StepCall) -> tuple[Tensor, ...]:
    """Run a call: return its outputs as new tensors, inside autograd's graph, and write model input and history.

    A skipped sample stays as it is; its kept outputs hold what their targets hold there, or 0.
    """
    # Kept outputs that go to history slots are rounded to the slots' dtypes.
    stored = 0 if not call.write_history else 2 if call.mask is None else 1
    dtypes = call.output_dtypes + [call.table.dtype] * stored
    if isinstance(call.row_index, Tensor):
        coefficients, taken = select_rows(call.table, call.row_index)
        results = _outputs(call, coefficients if len(coefficients) > 1 else coefficients[0], dtypes)
        before = [call.sample, *(call.targets[1:] or (None, None))]
        results = [
            _where(taken, value, old if isinstance(old, Tensor) else None)
            for value, old in zip(results, before, strict=False)
        ]
    else:
        results = _outputs(call, call.table[call.row_index], dtypes)
    after: list[Tensor | None] = []
    if call.write_history:
        after = _updated_history(call, results[1:])
        results = results[:1]
    if call.model_input is not None:
        call.model_input.copy_(_model_input(call, results[0]))
    for slot, value in zip(call.history, after, strict=False):
        if slot is not None and value is not None:
            slot.copy_(value)
    return tuple(results)


def select_rows(table: Tensor, row_indices: Tensor) -> tuple[Tensor, Tensor]:
    """Return the selected rows, ``[B, 32]`` or ``[1, 32]``, and which of the indices are in the table."""
    row_indices = row_indices.reshape(-1)
    return table[row_indices.clamp(0, len(table) - 1)], (row_indices >= 0) & (row_indices < len(table))


def drawn_noise(sample: Tensor, seeds: Tensor, step: int | Tensor, purpose: int, parts: int = 1) -> Tensor:
    """Return the noise that a step draws, float32 in the shape of `sample`; so many samples in a row share a seed."""
    size, seeds, first = math.prod(sample.shape[1:]), seeds.reshape(-1), None
    if parts != 1:
        first = torch.arange(parts, device=seeds.device).repeat(len(seeds)) * size
        seeds = seeds.repeat_interleave(parts)
    return philox.normals(seeds, step, purpose, size, first).reshape(sample.shape)


def per_sample(scalars: Tensor, like: Tensor) -> Tensor:
    """Reshape scalars ``[1]``, ``[]`` or ``[B]`` to multiply ``[B, ...]``."""
    if scalars.numel() == 1:
        return scalars.reshape(())
    return scalars.reshape(-1, *[1] * (like.dim() - 1))


def _outputs(call: StepCall, coefficients: Tensor, dtypes: Sequence[torch.dtype]) -> list[Tensor]:
    """Return prev_sample and the kept outputs of rows ``[32]`` for all samples, or ``[B, 32]``, one each."""
    dtype = coefficients.dtype
    x, m = call.sample.to(dtype), call.model_output.to(dtype)
    scalar = _Scalars(coefficients, x)
    if call.uncond is not None and (scale := call.guidance_tensor()) is not None:
        u = call.uncond.to(dtype)
        m = u + per_sample(scale, x) * (m - u)
    outputs = (PREV_SAMPLE, KEEP_0, KEEP_1)[: len(dtypes)]
    maps = outputs if call.mask is None else (*outputs, KEEP_1)
    d = None
    if any(scalar.known[first + COLUMNS.index("prediction")] != 0.0 for first in maps):
        d = _prediction(x, m, scalar, call.threshold)
    z = call.noise
    if call.seeds is not None:
        z = drawn_noise(call.sample, call.seeds, call.noise_step, call.purpose, call.parts)
    z = None if z is None else z.to(dtype)
    if z is not None and call.variance is not None:
        z = z * _learned_std(call.variance.to(dtype), scalar, call.variance_kind)
    history = [None if h is None else h.to(dtype) for h in call.history]
    history += [None] * (NUM_REGISTERS - len(history))
    terms = [x, m, d, *history, z]
    sums = [_weighted_sum(scalar, first, terms) for first in maps]
    if call.mask is not None:
        sums[0] = _blend(sums[0], sums.pop(), call.mask.to(dtype))
    return [value.to(to) for value, to in zip(sums, dtypes, strict=True)]


def _blend(prev: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    soft = (1 - mask) * prev + mask * target
    return torch.where(mask == 0, prev, torch.where(mask == 1, target, soft))


def _where(taken: Tensor, value: Tensor, old: Tensor | None) -> Tensor:
    return torch.where(per_sample(taken, value), value, torch.zeros_like(value) if old is None else old.to(value.dtype))


def _updated_history(call: StepCall, kept: Sequence[Tensor]) -> list[Tensor | None]:
    """Return the history slots after a step: each sample's kept outputs where its row says, else what they held."""
    assert isinstance(call.row_index, Tensor)
    coefficients, taken = select_rows(call.table, call.row_index)
    after: list[Tensor | None] = []
    for j, slot in enumerate(call.history):
        if slot is not None:
            for store, value in zip((STORE_0, STORE_1)[: len(kept)], kept, strict=True):
                here = per_sample(taken & (coefficients[:, store] == j), value)
                slot = torch.where(here, value.to(slot.dtype), slot)
        after.append(slot)
    return after


def _model_input(call: StepCall, prev_sample: Tensor) -> Tensor:
    """Return the next model input: the rounded sample times the row's scale, which is 1 where a sample is skipped."""
    assert call.model_input is not None
    x = prev_sample.to(call.table.dtype)
    if isinstance(call.row_index, Tensor):
        coefficients, taken = select_rows(call.table, call.row_index)
        scale = torch.where(taken, coefficients[:, MODEL_INPUT_SCALE], 1.0)
        scaled = per_sample(scale, x) * x
    else:
        scaled = call.table[call.row_index, MODEL_INPUT_SCALE] * x
    once = scaled.to(call.model_input.dtype)
    return torch.cat([once] * call.model_input_copies) if call.model_input_copies > 1 else once


class _Scalars:
    """The columns of one row, or of one row a sample, each shaped to multiply ``[B, ...]``.

    `known` holds them as numbers where there is one row and reading it is no host sync, else NaN.
    """

    def __init__(self, row: Tensor, like: Tensor) -> None:
        self._row, self._like = row, like
        at_hand = row.dim() == 1 and row.device.type == "cpu"
        self.known: list[float] = row.tolist() if at_hand else [math.nan] * row.shape[-1]

    def __getitem__(self, column: int) -> Tensor:
        return per_sample(self._row[..., column], self._like)


def _prediction(x: Tensor, m: Tensor, scalar: _Scalars, threshold: Tensor | None) -> Tensor:
    d = _weighted_sum(scalar, PREDICTION_SAMPLE, [x, m])
    d = torch.clamp(d, -scalar[CLIP], scalar[CLIP])
    if threshold is not None:
        s = per_sample(threshold, x)
        d = torch.clamp(d, -s, s) / s
    return d


def _weighted_sum(scalar: _Scalars, first: int, terms: Sequence[Tensor | None]) -> Tensor:
    """Return one affine map, whose weights begin at column `first`."""
    total = torch.zeros_like(terms[0])  # type: ignore[arg-type]
    for column, term in enumerate(terms, first):
        known = scalar.known[column]
        if term is None or known == 0.0:
            continue
        weight = scalar[column]
        added = total + weight * term
        # A selection where the value is not known here: 0·NaN must not be added.
        total = torch.where(weight != 0, added, total) if math.isnan(known) else added
    return total


def _learned_std(v: Tensor, scalar: _Scalars, variance_kind: int) -> Tensor:
    """Return the standard deviation that the model's second output v gives, element by element."""
    if variance_kind == Variance.LEARNED_RANGE:
        return torch.exp(scalar[VARIANCE_OFFSET] + scalar[VARIANCE_SLOPE] * v)
    return torch.sqrt(v)
