# SPDX-License-Identifier: MIT
"""Perpendicular negative guidance: a negative prompt acts across the positive one only."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from ..errors import checked_float
from .method import Guidance, Place
from .scalars import Scalar, divide
from .vectors import Vector


@dataclass(frozen=True, eq=False)
class PerpendicularGuidance(Guidance):
    """Perp-Neg (arXiv 2304.04968, eq. 7 and 8): m = u + g·(a − w·b⊥), a = c − u, b = n − u, b⊥ = b − ⟨b, a⟩/‖a‖²·a.

    Args:
        negative_weight: w, of the negative branch n.
        scale, rescale, start, stop, noise_ratios: as in `Guidance`.
    """

    negative_weight: float = 1.0

    branches: ClassVar[tuple[str, ...]] = ("cond", "uncond", "negative")
    reduces: ClassVar[bool] = True
    neutral_scale: ClassVar[float | None] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        checked_float(type(self).__name__, "negative_weight", self.negative_weight, -math.inf)

    def combination(self, branches: Mapping[str, Vector], scale: Scalar, place: Place) -> Vector:
        """Return u + g·(a − w·b⊥)."""
        cond, uncond, negative = (branches[name] for name in self.branches)
        positive, other = cond - uncond, negative - uncond
        across = other - positive * divide(other.dot(positive), positive.dot(positive))
        return uncond + (positive - self.negative_weight * across) * scale
