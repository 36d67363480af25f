# SPDX-License-Identifier: MIT
"""Adaptive projected guidance: a limited, averaged difference, split along and across the conditional output."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from ..errors import as_float, checked_float, unknown_name
from .method import STATE, Guidance, Place
from .scalars import Scalar, divide, maximum, minimum
from .vectors import Vector


def projected_difference(difference: Vector, cond: Vector, eta: float, limit: float) -> Vector:
    """Return d⊥ + η·d∥ of the difference d, shrunk to the length `limit` (arXiv 2410.02416, section 4).

    Args:
        difference: d.
        cond: c, the direction of d∥ = ⟨d, c⟩/‖c‖²·c.
        eta: η.
        limit: the longest ‖d‖; 0 for none.
    """
    if limit > 0.0:
        difference = difference * minimum(divide(limit, difference.norm()), 1.0)
    along = divide(difference.dot(cond), maximum(cond.dot(cond), 1e-24))  # the norm that torch's normalize divides by
    return difference + cond * ((eta - 1.0) * along)


@dataclass(frozen=True, eq=False)
class ProjectedGuidance(Guidance):
    """Adaptive projected guidance, APG (arXiv 2410.02416, section 4).

    m = c + (g − 1)·(d⊥ + η·d∥) with the running average d ← (c − u) + β·d, limited to the length r.

    Args:
        momentum: β; 0 keeps no average.  The paper takes a negative one, −0.5 or −0.75.
        limit: r, the longest ‖d‖ of a sample; 0 for none.
        eta: η, the weight of the part of d along c.
        around: ``cond`` for the formula above; ``uncond`` for u + g·(d⊥ + η·d∥), which diffusers computes.
        scale, rescale, start, stop, noise_ratios: as in `Guidance`.
    """

    momentum: float = 0.0
    limit: float = 15.0
    eta: float = 1.0
    around: str = "cond"

    reduces: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        operation = type(self).__name__
        as_float(operation, "momentum", self.momentum)
        as_float(operation, "eta", self.eta)
        checked_float(operation, "limit", self.limit, 0.0)
        if self.around not in ("cond", "uncond"):
            raise unknown_name(operation, "around", self.around, ("cond", "uncond"))

    @property
    def keeps_state(self) -> bool:
        """True if there is a running average."""
        return self.momentum != 0.0

    def _average(self, branches: Mapping[str, Vector]) -> Vector:
        difference = branches["cond"] - branches["uncond"]
        if self.keeps_state:
            difference = difference + self.momentum * branches[STATE]
        return difference

    def kept(self, branches: Mapping[str, Vector], place: Place) -> Vector | None:
        """Return the running average, if there is one."""
        return self._average(branches) if self.keeps_state else None

    def combination(self, branches: Mapping[str, Vector], scale: Scalar, place: Place) -> Vector:
        """Return c + (g − 1)·(d⊥ + η·d∥), or u + g·(d⊥ + η·d∥)."""
        update = projected_difference(self._average(branches), branches["cond"], self.eta, self.limit)
        if self.around == "cond":
            return branches["cond"] + update * (scale - 1.0)
        return branches["uncond"] + update * scale
