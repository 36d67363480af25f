# SPDX-License-Identifier: MIT
"""Own loops of order 1: one model call a step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ..solvers.ddim import ddim
from ..solvers.ddpm import ddpm
from ..solvers.euler import euler
from ..solvers.euler_ancestral import euler_ancestral
from .run import Callback, ChurnOptions, Model, NoiseSampler, Seeds, run

Sigmas = Tensor | Sequence[float]
ExtraArgs = Mapping[str, Any] | None


def sample_euler(
    model: Model,
    x: Tensor,
    sigmas: Sigmas,
    extra_args: ExtraArgs = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = float("inf"),
    s_noise: float = 1.0,
    *,
    noise_sampler: NoiseSampler | None = None,
    seeds: Seeds = None,
) -> Tensor:
    """Euler's method in σ (arXiv 2206.00364, algorithm 2 without its second-order correction), with churn."""
    churn = ChurnOptions(s_churn, s_tmin, s_tmax, s_noise)
    return run(
        euler, model, x, sigmas, extra_args, callback, disable,
        options={"churn": churn}, noise_by="rise", noise_sampler=noise_sampler, seeds=seeds,
    )  # fmt: skip


def sample_euler_ancestral(
    model: Model,
    x: Tensor,
    sigmas: Sigmas,
    extra_args: ExtraArgs = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    eta: float = 1.0,
    s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
    *,
    seeds: Seeds = None,
) -> Tensor:
    """Euler steps down to less noise than the next level has, and fresh noise up to it (k-diffusion)."""
    return run(
        euler_ancestral, model, x, sigmas, extra_args, callback, disable,
        options={"eta": eta, "s_noise": s_noise}, noise_sampler=noise_sampler, seeds=seeds,
    )  # fmt: skip


def sample_ddim(
    model: Model,
    x: Tensor,
    sigmas: Sigmas,
    extra_args: ExtraArgs = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    eta: float = 0.0,
    noise_sampler: NoiseSampler | None = None,
    *,
    seeds: Seeds = None,
) -> Tensor:
    """DDIM (arXiv 2010.02502, eq. 12 and 16): with η = 0 it is Euler's method in σ, with η = 1 DDPM."""
    return run(
        ddim, model, x, sigmas, extra_args, callback, disable,
        options={"eta": eta}, noise_sampler=noise_sampler, seeds=seeds,
    )  # fmt: skip


def sample_ddpm(
    model: Model,
    x: Tensor,
    sigmas: Sigmas,
    extra_args: ExtraArgs = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    noise_sampler: NoiseSampler | None = None,
    *,
    seeds: Seeds = None,
) -> Tensor:
    """DDPM (arXiv 2006.11239, eq. 6 and 7) between the given levels, with the posterior's variance."""
    return run(
        ddpm, model, x, sigmas, extra_args, callback, disable, noise_sampler=noise_sampler, seeds=seeds
    )
