# SPDX-License-Identifier: MIT
"""Own loops that reuse earlier slopes or x0: Adams–Bashforth, gradient estimation."""

from __future__ import annotations

from torch import Tensor

from ..solvers.gradient_estimation import gradient_estimation
from ..solvers.ipndm_v import ipndm_v
from .first_order import ExtraArgs, Sigmas
from .run import Callback, Model, run


def sample_ipndm_v(
    model: Model,
    x: Tensor,
    sigmas: Sigmas,
    extra_args: ExtraArgs = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    max_order: int = 4,
) -> Tensor:
    """Variable-step iPNDM (arXiv 2204.13902): Adams–Bashforth with the weights of the actual levels.

    The code in common use has a misplaced bracket in its weights of orders 3 and 4; these are the exact integrals.
    """
    return run(ipndm_v, model, x, sigmas, extra_args, callback, disable, options={"max_order": max_order})


def sample_gradient_estimation(
    model: Model,
    x: Tensor,
    sigmas: Sigmas,
    extra_args: ExtraArgs = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    ge_gamma: float = 2.0,
) -> Tensor:
    """Gradient estimation (arXiv 2306.04848, algorithm 2): Euler's method with a slope extrapolated by γ."""
    return run(gradient_estimation, model, x, sigmas, extra_args, callback, disable, options={"ge_gamma": ge_gamma})
