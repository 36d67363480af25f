# SPDX-License-Identifier: MIT
"""Magnitude-aware guidance: the scale falls with the size of the difference of the two outputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from ..errors import checked_float
from .method import Guidance, Place
from .scalars import Scalar, divide, exp
from .vectors import Vector


@dataclass(frozen=True, eq=False)
class MagnitudeAwareGuidance(Guidance):
    """MAMBO-G (arXiv 2508.03442): m = u + g'·(c − u), g' = 1 + (g − 1)·e^(−α·‖c − u‖/‖u‖).

    Args:
        alpha: α, how fast the scale falls.
        scale, rescale, start, stop, noise_ratios: as in `Guidance`.
    """

    alpha: float = 8.0

    reduces: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        checked_float(type(self).__name__, "alpha", self.alpha, 0.0)

    def combination(self, branches: Mapping[str, Vector], scale: Scalar, place: Place) -> Vector:
        """Return c + (g − 1)·e^(−α·‖c − u‖/‖u‖)·(c − u)."""
        cond, uncond = branches["cond"], branches["uncond"]
        difference = cond - uncond
        falling = exp(-self.alpha * divide(difference.norm(), uncond.norm()))
        return cond + difference * ((scale - 1.0) * falling)
