# SPDX-License-Identifier: MIT
"""The forward process and its targets in float64, written down from the papers, for the tests of the fused ones."""

from __future__ import annotations

import torch
from torch import Tensor

KINDS = ("epsilon", "sample", "v_prediction", "flow_prediction")
STEPS = 1000


def linear_signal() -> Tensor:
    """ᾱ of the linear schedule (arXiv 2006.11239, section 4), float64 ``[1000]``."""
    return (1 - torch.linspace(1e-4, 0.02, STEPS, dtype=torch.float64)).cumprod(0)


def scales(signal: Tensor, t: Tensor, x0: Tensor) -> tuple[Tensor, Tensor]:
    """α and σ of each sample, shaped to multiply it."""
    chosen = signal.double()[t].reshape(-1, *[1] * (x0.dim() - 1))
    return chosen.sqrt(), (1 - chosen).sqrt()


def noisy_and_target(x0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """x_t and the target in float64."""
    x, z = x0.double(), noise.double()
    targets = {
        "epsilon": z, "sample": x, "v_prediction": alpha * z - sigma * x, "flow_prediction": z - x,
    }  # fmt: skip
    return alpha * x + sigma * z, targets[kind]


def penalty(residual: Tensor, loss: str, c: float) -> Tensor:
    """ρ of a residual in float64."""
    r = residual.double()
    if loss == "l2":
        return r**2
    return r.abs() if loss == "l1" else (r**2 + c**2).sqrt() - c
