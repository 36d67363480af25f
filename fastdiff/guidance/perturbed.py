# SPDX-License-Identifier: MIT
"""Guidance away from a perturbed output: skipped layers, perturbed attention, smoothed energy."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import ClassVar

from ..errors import checked_float
from .method import Guidance, Place
from .scalars import Scalar
from .vectors import Vector


@dataclass(frozen=True, eq=False)
class PerturbedGuidance(Guidance):
    """Guidance by a perturbed output p, which the caller computes: m = u + g·(c − u) + s·(c − p).

    This is the form of perturbed-attention guidance (arXiv 2403.17377, eq. 13 and 15), of smoothed-energy guidance
    (arXiv 2408.00760, eq. 11) and of skip-layer guidance; they differ in how the model is perturbed for p.

    Args:
        scale: g; 1 needs no unconditional output.
        perturbed_scale: s; 0 needs no perturbed output.
        perturbed_start, perturbed_stop: the share of the steps where s counts, as `start` and `stop` for all.
        rescale, start, stop, noise_ratios: as in `Guidance`.
    """

    perturbed_scale: float = 3.0
    perturbed_start: float = 0.0
    perturbed_stop: float = 1.0

    branches: ClassVar[tuple[str, ...]] = ("cond", "uncond", "perturbed")
    neutral_scale: ClassVar[float | None] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        checked_float(type(self).__name__, "perturbed_scale", self.perturbed_scale, -1e30)
        for name in ("perturbed_start", "perturbed_stop"):
            checked_float(type(self).__name__, name, getattr(self, name), 0.0)

    def phase(self, place: Place) -> Hashable:
        """Return whether s counts."""
        return int(self.perturbed_start * place.total) <= place.index < int(self.perturbed_stop * place.total)

    def combination(self, branches: Mapping[str, Vector], scale: Scalar, place: Place) -> Vector:
        """Return u + g·(c − u) + s·(c − p)."""
        cond, uncond = branches["cond"], branches["uncond"]
        guided = uncond + (cond - uncond) * scale
        if self.phase(place) is True:
            guided = guided + self.perturbed_scale * (cond - branches["perturbed"])
        return guided
