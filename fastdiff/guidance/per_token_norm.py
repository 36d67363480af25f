# SPDX-License-Identifier: MIT
"""Guidance whose output keeps the conditional one's norm in each token."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from ..errors import checked_integer
from .method import Guidance, Place
from .scalars import Scalar, divide
from .vectors import Vector


@dataclass(frozen=True, eq=False)
class PerTokenNormGuidance(Guidance):
    """Guidance with the norm of c in each token: m·‖c‖/‖m‖, m = u + g·(c − u), as the pipelines of Lumina 2 and
    Qwen-Image normalize it.

    A token is the last dimension of a sample, or the last `token_dims`; the tokens take the place of the samples in the
    reduction and in the rows of the step.

    Args:
        token_dims: the number of trailing dimensions of a token, 1 or more; the first dimension is the batch always.
        scale, start, stop, noise_ratios: as in `Guidance`; `rescale` then acts on each token.
    """

    token_dims: int = 1

    reduces: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        checked_integer(type(self).__name__, "token_dims", self.token_dims, 1)

    def combination(self, branches: Mapping[str, Vector], scale: Scalar, place: Place) -> Vector:
        """Return m·‖c‖/‖m‖."""
        cond, uncond = branches["cond"], branches["uncond"]
        guided = uncond + (cond - uncond) * scale
        return guided * divide(cond.norm(), guided.norm())
