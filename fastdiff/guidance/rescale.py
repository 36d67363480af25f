# SPDX-License-Identifier: MIT
"""The rescaling factor of classifier-free guidance."""

from __future__ import annotations

from torch import Tensor

from .. import ops


def rescaling_of(guided: Tensor, cond: Tensor, share: float) -> Tensor:
    """Return the factor of each sample's guided output (arXiv 2305.08891, eq. 15 and 16).

    Args:
        guided: the guided output ``u + g·(c − u)``, ``[B, ...]``.
        cond: the conditional output c, like `guided`.
        share: φ, 0 to 1: 1 scales the output to the standard deviation of the conditional one.

    Returns:
        φ·std(c)/std(guided) + 1 − φ, ``[B]``, float32 (float64 for float64).
    """
    return share * (ops.std(cond) / ops.std(guided)) + (1.0 - share)
