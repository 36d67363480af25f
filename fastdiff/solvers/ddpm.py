# SPDX-License-Identifier: MIT
"""DDPM: draw from the posterior q(x_s | x_t, x0)."""

from __future__ import annotations

import math
from dataclasses import replace
from enum import Enum

from ..errors import parse_choice
from ..row_layout import Variance
from ..schedules.levels import Levels
from .affine import NOISE, SAMPLE
from .prediction import Prediction
from .table import StepTable


class VarianceType(str, Enum):
    """The variance of the reverse step, named as in diffusers."""

    FIXED_SMALL = "fixed_small"
    FIXED_SMALL_LOG = "fixed_small_log"
    FIXED_LARGE = "fixed_large"
    FIXED_LARGE_LOG = "fixed_large_log"
    LEARNED = "learned"
    LEARNED_RANGE = "learned_range"
    #: Not one of diffusers': a model whose v lies in [0, 1].
    LEARNED_UNIT_RANGE = "learned_unit_range"

    @classmethod
    def parse(cls, value: str | VarianceType) -> VarianceType:
        return parse_choice(cls, "ddpm", "variance_type", value)


#: The floor of the posterior variance, as in diffusers: that of the last step is 0 and has no logarithm.
SMALLEST_VARIANCE = 1e-20

_RANGES = (VarianceType.LEARNED_RANGE, VarianceType.LEARNED_UNIT_RANGE)


def ddpm(
    levels: Levels, prediction: Prediction, *, variance_type: str | VarianceType = VarianceType.FIXED_SMALL
) -> StepTable:
    """Compile the table of DDPM (arXiv 2006.11239, eq. 6 and 7, written for any α and σ).

    With a = α_t/α_s and β = σ_t² − a²σ_s² (the variance added from s to t), the posterior has the mean
    ``α_s·β/σ_t² · x0 + a·σ_s²/σ_t² · x`` and the variance ``β·σ_s²/σ_t²`` (small) or β (large).  A step to the
    clean sample adds no noise.

    Args:
        levels: the levels to visit.
        prediction: how to read the model.
        variance_type: `fixed_small` and `fixed_small_log` (the posterior variance), `fixed_large` and
            `fixed_large_log` (β; diffusers' own fixed_large_log takes the root of a negative logarithm, ours
            the variance that it means), `learned` (the model's second output is the variance), `learned_range`
            (v in [−1, 1] interpolates between the two logarithms, as in the code of arXiv 2102.09672 and in
            diffusers), `learned_unit_range` (v in [0, 1], as in that paper's eq. 15).
    """
    kind = VarianceType.parse(variance_type)
    rows = []
    for i in range(len(levels)):
        t, s = levels[i], levels[i + 1]
        model = prediction.at(t)
        a = t.alpha / s.alpha
        beta = t.sigma**2 - (a * s.sigma) ** 2
        prev = (s.alpha * beta / t.sigma**2) * model.x0 + (a * s.sigma**2 / t.sigma**2) * SAMPLE
        small = max(beta * (s.sigma / t.sigma) ** 2, SMALLEST_VARIANCE)
        offset, slope = 0.0, 0.0
        if s.sigma > 0.0:
            if kind in (VarianceType.FIXED_SMALL, VarianceType.FIXED_SMALL_LOG):
                prev = prev + math.sqrt(small) * NOISE
            elif kind in (VarianceType.FIXED_LARGE, VarianceType.FIXED_LARGE_LOG):
                prev = prev + math.sqrt(beta) * NOISE
            else:
                prev = prev + NOISE
                # v in [-1, 1] spans [log small, log large]; half of it is the log of the standard deviation.
                offset = 0.25 * (math.log(beta) + math.log(small))
                slope = 0.25 * (math.log(beta) - math.log(small))
                if kind is VarianceType.LEARNED_UNIT_RANGE:  # 2v − 1 in place of v
                    offset, slope = offset - slope, 2.0 * slope
        row = model.row(prev)
        if kind in _RANGES:
            row = replace(row, variance_offset=offset, variance_slope=slope)
        rows.append(row)
    variance = Variance.LEARNED_RANGE if kind in _RANGES else Variance.FIXED
    if kind is VarianceType.LEARNED:
        variance = Variance.LEARNED
    return StepTable(tuple(rows), levels.initial_scale, variance, thresholding=prediction.thresholding)
