# SPDX-License-Identifier: MIT
"""CFG-Zero*: the unconditional output is scaled to fit the conditional one, and the first steps are zero."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import ClassVar

from ..errors import checked_integer
from .method import ZERO_PHASE, Guidance, Place
from .scalars import Scalar, divide
from .vectors import Vector


def fitted(uncond: Vector, cond: Vector) -> Vector:
    """Return α·u with α = ⟨c, u⟩/(‖u‖² + 1e-8), the least-squares fit to c."""
    return uncond * divide(cond.dot(uncond), uncond.dot(uncond) + 1e-8)


@dataclass(frozen=True, eq=False)
class ZeroStarGuidance(Guidance):
    """CFG-Zero* (arXiv 2503.18886, eq. 7 and algorithm 1): m = α·u + g·(c − α·u); m = 0 in the first steps.

    Args:
        zero_init_steps: the number of first steps whose output is 0: they call no model.
        scale, rescale, start, stop, noise_ratios: as in `Guidance`.
    """

    zero_init_steps: int = 1

    reduces: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        checked_integer(type(self).__name__, "zero_init_steps", self.zero_init_steps, 0)

    def needed(self, place: Place, scale: float | None) -> tuple[str, ...]:
        """Return no branch in the first steps."""
        return () if place.index < self.zero_init_steps else super().needed(place, scale)

    def uses_products(self, place: Place) -> bool:
        """Return False in the first steps."""
        return place.index >= self.zero_init_steps and super().uses_products(place)

    def phase(self, place: Place) -> Hashable:
        """Return the phase of zeros in the first steps."""
        return ZERO_PHASE if place.index < self.zero_init_steps else None

    def combination(self, branches: Mapping[str, Vector], scale: Scalar, place: Place) -> Vector:
        """Return α·u + g·(c − α·u), or 0 in the first steps."""
        cond = branches["cond"]
        if place.index < self.zero_init_steps:
            return 0.0 * cond
        uncond = fitted(branches["uncond"], cond)
        return uncond + (cond - uncond) * scale
