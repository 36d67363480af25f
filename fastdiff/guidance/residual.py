# SPDX-License-Identifier: MIT
"""Residual classifier-free guidance: the negative output is computed from a clean sample, without a model call."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from ..errors import checked_float, unknown_name
from .method import SAMPLE, STATE, Guidance, Place
from .scalars import Scalar
from .vectors import Vector


@dataclass(frozen=True, eq=False)
class ResidualGuidance(Guidance):
    """RCFG of StreamDiffusion (arXiv 2312.12491, section 3.2): m = δ·v + g·(c − δ·v).

    v is the output of a model that would predict the clean sample r from x: with x0 = p·x + q·m it is (r − p·x)/q.

    Args:
        negative: ``self``: r is the branch ``reference``, the input image, and the unconditional model is never called.
            ``onetime``: r is the clean sample that the unconditional output of the first guided step predicts; that
            step is plain guidance and keeps r.
        delta: δ, the weight of v.
        scale, rescale, start, stop, noise_ratios: as in `Guidance`.
    """

    negative: str = "self"
    delta: float = 1.0

    branches: ClassVar[tuple[str, ...]] = ("cond", "uncond")
    uses_sample: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        checked_float(type(self).__name__, "delta", self.delta, -math.inf)
        if self.negative not in ("self", "onetime"):
            raise unknown_name(type(self).__name__, "negative", self.negative, ("self", "onetime"))
        names = ("cond", "reference") if self.negative == "self" else ("cond", "uncond")
        object.__setattr__(self, "branches", names)

    @property
    def keeps_state(self) -> bool:
        """True for ``onetime``, which keeps the clean sample."""
        return self.negative == "onetime"

    def branches_at(self, place: Place) -> tuple[str, ...]:
        """Return the conditional branch alone once the clean sample is kept."""
        return self.branches[:1] if self.negative == "onetime" and place.has_state else self.branches

    def kept(self, branches: Mapping[str, Vector], place: Place) -> Vector | None:
        """Return r = p·x + q·u in the first guided step of ``onetime``."""
        if self.negative == "self" or place.has_state:
            return None
        p, q = place.prediction
        return p * branches[SAMPLE] + q * branches["uncond"]

    def combination(self, branches: Mapping[str, Vector], scale: Scalar, place: Place) -> Vector:
        """Return δ·v + g·(c − δ·v); in the first step of ``onetime`` u + g·(c − u)."""
        cond = branches["cond"]
        if self.negative == "onetime" and not place.has_state:
            uncond = branches["uncond"]
            return uncond + (cond - uncond) * scale
        reference = branches["reference" if self.negative == "self" else STATE]
        p, q = place.prediction
        virtual = (self.delta / q) * (reference - p * branches[SAMPLE])
        return virtual + (cond - virtual) * scale
