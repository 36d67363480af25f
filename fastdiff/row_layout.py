# SPDX-License-Identifier: MIT
"""The layout of a row of scalars, as every backend reads it, and the dtype that its scalars are stored in.

A row has `ROW_WIDTH` numbers: eight scalars, then three affine maps of one coefficient a column of `COLUMNS`.
csrc/row_layout.h and kernels/triton/step.py read the same layout.
"""

from __future__ import annotations

from enum import IntEnum

import torch

#: The columns of an affine map, in the order in which every backend adds them up.
COLUMNS = ("sample", "model_output", "prediction", "history_0", "history_1", "history_2", "history_3", "noise")

#: Scalars of a row before the three affine maps.
PREDICTION_SAMPLE, PREDICTION_OUTPUT, CLIP, VARIANCE_OFFSET, VARIANCE_SLOPE = range(5)
MODEL_INPUT_SCALE, STORE_0, STORE_1 = 5, 6, 7
PREV_SAMPLE, KEEP_0, KEEP_1 = 8, 16, 24
ROW_WIDTH = 32
NUM_REGISTERS = 4


class Variance(IntEnum):
    """How the noise coefficient is scaled element by element, by the model's second output v."""

    FIXED = 0
    #: exp(offset + slope·v): Improved DDPM's interpolation between two log variances (arXiv 2102.09672, eq. 15).
    LEARNED_RANGE = 1
    #: sqrt(v): the model predicts the variance itself.
    LEARNED = 2


def blank_row() -> list[float]:
    """Return the scalars of a row whose maps are 0: no prediction, no clipping, model input as it is, nothing kept."""
    row = [0.0] * ROW_WIDTH
    row[CLIP], row[MODEL_INPUT_SCALE] = float("inf"), 1.0
    row[STORE_0] = row[STORE_1] = -1.0
    return row


def compute_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """The dtype in which a step on tensors of these dtypes is computed, and in which its table is stored."""
    return torch.float64 if torch.float64 in dtypes else torch.float32
