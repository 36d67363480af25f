# SPDX-License-Identifier: MIT
"""The gradient of a replayed log-probability: the step again, with other coefficients.

The score (prev − mean)/σ² is one fused step with the previous sample in the noise's place.  Where the row is linear its
multiples are the gradients themselves; elsewhere the pullback through the mean is that of ops/autograd.py.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import error_message
from ..row_layout import CLIP, COLUMNS, KEEP_0, PREDICTION_OUTPUT, PREDICTION_SAMPLE, PREV_SAMPLE, ROW_WIDTH
from . import backends
from .autograd import apply_operator, coefficients_of, gradients, input_weights, may_clip
from .call import HISTORY_SLOTS, RESULT_DTYPES, STEP_ARGUMENTS
from .checks import readable_without_sync

_NOISE = PREV_SAMPLE + COLUMNS.index("noise")
#: Arguments whose gradient is a multiple of the score where the row is linear; three fit into one step.
_LINEAR = {"sample", "model_output", "uncond", "noise", *HISTORY_SLOTS}
_MAPS = 3


def gradients_of(given: dict[str, Any], wanted: dict[str, bool], grad: Tensor) -> dict[str, Tensor | None]:
    """Return the gradients of the wanted arguments, by name.

    It is g·(prev − mean)/σ² times the derivative of prev − mean, with its sign.

    Args:
        given: the values of ``fastdiff::step_log_prob`` by name, with the previous sample in the noise's place.
        wanted: for each of them whether its gradient is.
        grad: g, of the log-probabilities, ``[B]``.

    Raises:
        RuntimeError: the table requires grad.
    """
    if wanted["table"]:
        raise RuntimeError(
            error_message("log_prob", "table", "requires grad", "a table outside autograd's graph", "detach it")
        )
    rows, divisors = _divisors(given)
    asked = [name for name, want in wanted.items() if want]
    if set(asked) <= _LINEAR and len(asked) <= _MAPS and not _bounds_prediction(given):
        return dict(zip(asked, _of_linear_row(given, rows, divisors, grad, asked), strict=True))
    # g·(prev − mean)/σ², the gradient of the mean.
    ones = torch.ones(1, 1, dtype=torch.float64, device=rows.device)
    (score,) = _scaled_distances(given, rows, divisors, grad, ones, [given["table"].dtype])
    found: dict[str, Tensor | None] = {}
    if wanted["noise"]:
        found["noise"] = (-score).to(given["noise"].dtype)
    of_mean = {name: given[name] for name in given if name not in ("replay", "mean")}
    of_mean |= {"noise": None, "prev_sample_dtype": None}
    found |= gradients(of_mean, {**wanted, "noise": False}, [score])
    return {name: found.get(name) for name in asked}


def direct_gradients(fields: dict[str, Any], mean: bool, names: list[str], grad: Tensor) -> dict[str, Tensor] | None:
    """Return the gradients of a replay by one call of the extension; None where it does not take the call.

    It takes one linear row of all samples, whose numbers can be read here, and a guidance scale that is a number.

    Args:
        fields: the step's, with four history slots and the previous sample in the noise's place.
        mean: whether the log-probability is the mean over the elements.
        names: the arguments whose gradients are wanted.
        grad: of the log-probabilities, ``[B]``.
    """
    sample, table, row, scale = (fields[name] for name in ("sample", "table", "row_index", "guidance_scale"))
    extension = backends.direct_extension()
    if extension is None or torch._C._len_torch_dispatch_stack() > 0 or len(names) > _MAPS:
        return None
    if any(isinstance(value, Tensor) for value in (row, scale, fields["threshold"])):
        return None
    if not readable_without_sync(table) or not _LINEAR.issuperset(names):
        return None
    count = sample.numel() // len(sample) if mean else 1
    found = _scaled_row(tuple(table[row].tolist()), tuple(names), scale, count, table.dtype)
    if found is None:
        return None
    head, maps = found
    history = fields["history"]
    tensors = {**fields, **dict(zip(HISTORY_SLOTS, history, strict=True))}
    out: list[Tensor | torch.dtype] = [tensors[name].dtype for name in names]
    # The bits of `_scaled_distances`: in float64, and rounded once.
    coefficients, index = torch.addcmul(head, grad.double()[:, None], maps).to(table.dtype), None
    if len(sample) > 1:
        # Where samples have rows of their own the extension writes kept outputs that are given.
        out[1:] = [torch.empty_like(sample, dtype=tensors[name].dtype) for name in names[1:]]
        index = torch.arange(len(sample))
    done = extension.step(
        sample=sample,
        model_output=fields["model_output"],
        table=coefficients,
        row_index=0 if index is None else index,
        uncond=fields["uncond"],
        guidance_scale=scale,
        history=history,
        noise=fields["noise"],
        keeps=len(names) - 1,
        out=out,
    )
    return dict(zip(names, done, strict=True)) if isinstance(done, tuple) else None


@functools.lru_cache(maxsize=256)
def _scaled_row(
    row: tuple[float, ...], names: tuple[str, ...], scale: float | None, count: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor] | None:
    """Return the scalars of a row without its maps, and maps that give each named argument's gradient for g = 1.

    Both are float64 ``[1, 32]``: the first has zeros for the maps, the second for the scalars.  None where the row
    clips, or where σ² underflows.
    """
    divisor = row[_NOISE] * row[_NOISE] * count
    if row[CLIP] < math.inf or divisor == 0.0:
        return None
    of_prev = row[PREV_SAMPLE:KEEP_0]
    weights = input_weights(row, 0, scale, dtype) | {"noise": -1.0}
    # The previous sample is the step's noise, so that the row's map with its signs turned is the distance.
    distance = [*(-weight for weight in of_prev[:-1]), 1.0]
    maps = [weights[name] * weight / divisor for name in names for weight in distance]
    head = [*row[:PREV_SAMPLE], *[0.0] * (ROW_WIDTH - PREV_SAMPLE)]
    padded = [*[0.0] * PREV_SAMPLE, *maps, *[0.0] * (ROW_WIDTH - PREV_SAMPLE - len(maps))]
    with torch.inference_mode(False):
        both = torch.tensor([[head], [padded]], dtype=torch.float64, device="cpu")
    return both[0], both[1]


def _divisors(given: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Return the rows ``[1, 32]`` or ``[B, 32]``, and σ² of each times the elements of a mean; float64.

    It is infinite where a row adds no noise, so that its gradient is 0.
    """
    rows = coefficients_of(given["table"], given["row_index"], given["row_indices"])
    weights = rows[:, _NOISE]
    variance = torch.where(weights == 0, torch.inf, weights * weights)
    return rows, variance * (math.prod(given["sample"].shape[1:]) if given["mean"] else 1)


def _bounds_prediction(given: dict[str, Any]) -> bool:
    table = given["table"]
    return given["threshold"] is not None or may_clip(table, given["row_index"], given["row_indices"])


def _of_linear_row(
    given: dict[str, Any], rows: Tensor, divisors: Tensor, grad: Tensor, names: list[str]
) -> Sequence[Tensor]:
    """Return the gradients of up to three arguments by one step: the score times each one's weight in the mean."""
    maps = rows[:, PREV_SAMPLE:]
    of_d = maps[:, COLUMNS.index("prediction")]
    of_m = maps[:, COLUMNS.index("model_output")] + rows[:, PREDICTION_OUTPUT] * of_d
    scale = given["guidance_scale"]
    scale = None if scale is None else scale.double().reshape(-1)
    weights = []
    for name in names:
        if name == "sample":
            weights.append(maps[:, 0] + rows[:, PREDICTION_SAMPLE] * of_d)
        elif name == "noise":  # the previous sample
            weights.append(-torch.ones_like(of_d))
        elif name in HISTORY_SLOTS:
            weights.append(maps[:, COLUMNS.index(name)])
        elif scale is None:
            weights.append(of_m)
        else:
            weights.append(of_m * (scale if name == "model_output" else 1.0 - scale))
    count = max(len(weight) for weight in weights)
    together = torch.stack([weight.expand(count) for weight in weights], 1)
    return _scaled_distances(given, rows, divisors, grad, together, [given[name].dtype for name in names])


def _scaled_distances(
    given: dict[str, Any],
    rows: Tensor,
    divisors: Tensor,
    grad: Tensor,
    weights: Tensor,
    dtypes: list[torch.dtype],
) -> Sequence[Tensor]:
    """Return g·(prev − mean)/divisor times each of up to three `weights` ``[1 or B, maps]``, in one step.

    The previous sample is the step's noise, so that the row's map with its signs turned is the distance.
    """
    distance = -rows[:, PREV_SAMPLE : PREV_SAMPLE + len(COLUMNS)]
    distance[:, -1] = 1.0
    maps = weights[:, :, None] * distance[:, None, :] / divisors[:, None, None] * grad.double()[:, None, None]
    batch, keeps = len(grad), weights.shape[1] - 1
    maps = torch.nn.functional.pad(maps.flatten(1), (0, (_MAPS - keeps - 1) * len(COLUMNS)))
    table = torch.cat([rows[:, :PREV_SAMPLE].expand(batch, -1), maps], 1).to(given["table"].dtype)
    targets = dict(zip(RESULT_DTYPES, [*dtypes, None, None], strict=False))
    values = {
        **{name: given[name] for name in given if name not in ("replay", "mean")},
        **targets,
        "table": table,
        "keeps": keeps,
        "row_index": 0,
        "row_indices": torch.arange(batch, device=table.device) if batch > 1 else None,
    }
    return apply_operator(*(values[a.name] for a in STEP_ARGUMENTS))
