# SPDX-License-Identifier: MIT
"""Tangential guidance: the unconditional output keeps its part along the first singular vector of both outputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from .method import Guidance, Place
from .scalars import Scalar, divide, hypot, select_zero
from .vectors import Vector


def projected_on_first_singular_vector(cond: Vector, uncond: Vector) -> Vector:
    """Return u projected on the first right singular vector of the two rows c and u.

    The left singular vectors are those of the Gram matrix [[⟨c,c⟩, ⟨c,u⟩], [⟨c,u⟩, ⟨u,u⟩]]; the first is (cos θ, sin θ)
    with tan 2θ = 2⟨c,u⟩/(⟨c,c⟩ − ⟨u,u⟩), and the projection of u is sin θ·(cos θ·c + sin θ·u).
    """
    difference = cond.dot(cond) - uncond.dot(uncond)
    twice = 2.0 * cond.dot(uncond)
    length = hypot(difference, twice)
    # For orthogonal rows of equal length every direction is a first one: take c, which is orthogonal to u.
    sine = select_zero(length, 0.0, divide(twice, length))
    cosine = select_zero(length, 1.0, divide(difference, length))
    return cond * (0.5 * sine) + uncond * (0.5 * (1.0 - cosine))


@dataclass(frozen=True, eq=False)
class TangentialGuidance(Guidance):
    """Tangential classifier-free guidance (arXiv 2503.18137, algorithm 1): m = u' + g·(c − u'), u' the projection of u.

    Arguments and errors are those of `Guidance`.
    """

    reduces: ClassVar[bool] = True

    def combination(self, branches: Mapping[str, Vector], scale: Scalar, place: Place) -> Vector:
        """Return u' + g·(c − u')."""
        cond = branches["cond"]
        uncond = projected_on_first_singular_vector(cond, branches["uncond"])
        return uncond + (cond - uncond) * scale
