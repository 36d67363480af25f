# SPDX-License-Identifier: MIT
"""Guidance by more than one condition: two nested ones, or any number side by side."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from ..errors import checked_float, checked_type, error_message
from .method import Guidance, Place
from .scalars import Scalar
from .vectors import Vector


@dataclass(frozen=True, eq=False)
class DualGuidance(Guidance):
    """Two nested conditions (InstructPix2Pix, arXiv 2211.09800, eq. 3): m = u + s_I·(i − u) + g·(c − i).

    The branches are c, with both conditions; i (``partial``), with the first alone, the image there; and u, with none.

    Args:
        scale: g, of the second condition.
        partial_scale: s_I, of the first.
        rescale, start, stop, noise_ratios: as in `Guidance`.
    """

    partial_scale: float = 1.5

    branches: ClassVar[tuple[str, ...]] = ("cond", "partial", "uncond")
    neutral_scale: ClassVar[float | None] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        checked_float(type(self).__name__, "partial_scale", self.partial_scale, -math.inf)

    def combination(self, branches: Mapping[str, Vector], scale: Scalar, place: Place) -> Vector:
        """Return u + s_I·(i − u) + g·(c − i)."""
        cond, partial, uncond = (branches[name] for name in self.branches)
        return uncond + self.partial_scale * (partial - uncond) + (cond - partial) * scale


@dataclass(frozen=True, eq=False)
class ComposedGuidance(Guidance):
    """N conditions side by side (arXiv 2206.01714, eq. 11): m = u + g·Σ w_i·(c_i − u).

    Args:
        condition_weights: w_i by the name of its branch; negative for what is to be avoided.
        scale: g, which multiplies all weights.
        rescale, start, stop, noise_ratios: as in `Guidance`; outside the interval the output is the first branch.
    """

    condition_weights: Mapping[str, float] | None = None

    neutral_scale: ClassVar[float | None] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        operation = type(self).__name__
        remedy = "pass condition_weights={'cond': 1.0, 'style': 0.5}"
        checked_type(operation, "condition_weights", self.condition_weights, Mapping, "weights by name", remedy)
        weights = self.condition_weights
        assert weights is not None
        if not weights or "uncond" in weights:
            got = "is empty" if not weights else "names 'uncond'"
            raise ValueError(error_message(operation, "condition_weights", got, "the conditions by name", remedy))
        for name, weight in weights.items():
            checked_float(operation, f"condition_weights[{name!r}]", weight, -math.inf)
        object.__setattr__(self, "branches", (*weights, "uncond"))

    def combination(self, branches: Mapping[str, Vector], scale: Scalar, place: Place) -> Vector:
        """Return u + g·Σ w_i·(c_i − u)."""
        uncond = guided = branches["uncond"]
        assert self.condition_weights is not None
        for name, weight in self.condition_weights.items():
            guided = guided + (branches[name] - uncond) * (weight * scale)
        return guided
