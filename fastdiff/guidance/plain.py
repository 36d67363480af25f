# SPDX-License-Identifier: MIT
"""Classifier-free guidance, and auto-guidance, which has the same formula with a weaker model's output."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from .method import Guidance, Place
from .scalars import Scalar
from .vectors import Vector


@dataclass(frozen=True, eq=False)
class PlainGuidance(Guidance):
    """Classifier-free guidance, m = u + g·(c − u) (arXiv 2207.12598, eq. 6).

    With `rescale` it is rescaled guidance, with `start` and `stop` or `noise_ratios` guidance in an interval, and with
    a list or a function as `scale` guidance on a schedule.  Arguments and errors are those of `Guidance`.
    """

    def combination(self, branches: Mapping[str, Vector], scale: Scalar, place: Place) -> Vector:
        """Return u + g·(c − u)."""
        cond, other = (branches[name] for name in self.branches)
        return other + (cond - other) * scale


@dataclass(frozen=True, eq=False)
class AutoGuidance(PlainGuidance):
    """Auto-guidance, m = w + g·(c − w), w being the output of a weaker version of the model (arXiv 2406.02507, eq. 4).

    Arguments and errors are those of `Guidance`.
    """

    branches: ClassVar[tuple[str, ...]] = ("cond", "weak")
