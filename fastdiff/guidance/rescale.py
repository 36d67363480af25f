# SPDX-License-Identifier: MIT
"""The rescaling factor of guidance, and the rows of a step that apply it without a pass of its own."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import ops
from ..row_layout import COLUMNS, PREDICTION_OUTPUT, PREV_SAMPLE
from .scalars import Scalar, divide

#: The columns of a row that multiply the model's output, in its three maps. PREDICTION_OUTPUT does in the prediction.
_IN_MAPS = slice(PREV_SAMPLE + COLUMNS.index("model_output"), None, len(COLUMNS))


def rescaling_of(guided: Tensor, cond: Tensor, share: float | Tensor) -> Tensor:
    """Return the factor of each sample's guided output (arXiv 2305.08891, eq. 15 and 16).

    Args:
        guided: the guided output, ``u + g·(c − u)`` or another method's, ``[B, ...]``.
        cond: the conditional output c, like `guided`, in any dtype.
        share: φ, 0 to 1, a number or ``[B]``: 1 scales the output to the standard deviation of the conditional one.

    Returns:
        φ·std(c)/std(guided) + 1 − φ, ``[B]``, float32 (float64 for float64).
    """
    return _factor(ops.std(cond), ops.std(guided), share)


def host_rescaling_of(guided: Tensor, cond: Tensor, share: float) -> list[float]:
    """Return `rescaling_of` as numbers, one a sample: on the CPU tensor operations on a few numbers take longer."""
    deviations = zip(ops.std(cond).tolist(), ops.std(guided).tolist(), strict=True)
    return [_factor(of_cond, of_guided, share) for of_cond, of_guided in deviations]


def _factor(of_cond: Scalar, of_guided: Scalar, share: Scalar) -> Scalar:
    return share * divide(of_cond, of_guided) + (1.0 - share)


def rows_with_scaled_output(row: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    """Return a row for each sample in which the model's output is multiplied by the sample's factor.

    Args:
        row: one row of coefficients, ``[1, 32]``.
        factor: ``[B]``, on the device of `row`.

    Returns:
        The coefficients ``[B, 32]`` and the row index ``[B]`` of each sample.
    """
    rows = row.repeat(len(factor), 1)
    scale = factor.to(row.dtype)[:, None]
    # By slices, which a CUDA graph can hold: a list of columns would come from the host.
    rows[:, PREDICTION_OUTPUT : PREDICTION_OUTPUT + 1] *= scale
    rows[:, _IN_MAPS] *= scale
    return rows, torch.arange(len(factor), device=row.device)
