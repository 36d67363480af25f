# SPDX-License-Identifier: MIT
"""Own loops of the DPM-Solver++ family."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ..solvers.dpm_multistep import dpm_multistep
from ..solvers.dpm_sde import dpmpp_2m_sde, dpmpp_3m_sde, dpmpp_sde
from ..solvers.dpmpp_2s_ancestral import dpmpp_2s_ancestral
from ..solvers.sigma_steps import ancestral_split
from .first_order import ExtraArgs, Sigmas
from .run import Callback, Model, NoiseSampler, Seeds, run


def ancestral_calls(sigmas: Sequence[float], options: Mapping[str, Any]) -> list[int]:
    """Return two model calls for each step down to some noise, one for a step with σ_down = 0."""
    eta = options["eta"]
    downs = [ancestral_split("loops", a, b, eta)[0] for a, b in itertools.pairwise(sigmas)]
    return [2 if down > 0.0 else 1 for down in downs]


def sample_dpmpp_2s_ancestral(
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
    """DPM-Solver++(2S) steps with ancestral noise (arXiv 2211.01095, k-diffusion); two model calls a step."""
    return run(
        dpmpp_2s_ancestral, model, x, sigmas, extra_args, callback, disable,
        options={"eta": eta, "s_noise": s_noise}, calls=ancestral_calls, noise_sampler=noise_sampler, seeds=seeds,
    )  # fmt: skip


def sample_dpmpp_2m(
    model: Model,
    x: Tensor,
    sigmas: Sigmas,
    extra_args: ExtraArgs = None,
    callback: Callback | None = None,
    disable: bool | None = None,
) -> Tensor:
    """DPM-Solver++(2M) (arXiv 2211.01095, algorithm 2)."""
    return run(dpm_multistep, model, x, sigmas, extra_args, callback, disable, options={"lower_order_final": False})


def sample_dpmpp_sde(
    model: Model,
    x: Tensor,
    sigmas: Sigmas,
    extra_args: ExtraArgs = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    eta: float = 1.0,
    s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
    r: float = 1 / 2,
    *,
    seeds: Seeds = None,
) -> Tensor:
    """DPM-Solver++ SDE (arXiv 2211.01095, k-diffusion) on a Brownian path; two model calls a step."""
    return run(
        dpmpp_sde, model, x, sigmas, extra_args, callback, disable,
        options={"eta": eta, "s_noise": s_noise, "r": r}, calls=2, brownian=True,
        noise_sampler=noise_sampler, seeds=seeds,
    )  # fmt: skip


def sample_dpmpp_2m_sde(
    model: Model,
    x: Tensor,
    sigmas: Sigmas,
    extra_args: ExtraArgs = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    eta: float = 1.0,
    s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
    solver_type: str = "midpoint",
    *,
    seeds: Seeds = None,
) -> Tensor:
    """DPM-Solver++(2M) SDE (arXiv 2211.01095, section 5, k-diffusion) on a Brownian path."""
    return run(
        dpmpp_2m_sde, model, x, sigmas, extra_args, callback, disable,
        options={"eta": eta, "s_noise": s_noise, "solver_type": solver_type}, brownian=True,
        noise_sampler=noise_sampler, seeds=seeds,
    )  # fmt: skip


def sample_dpmpp_2m_sde_heun(
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
    """`sample_dpmpp_2m_sde` with ``solver_type="heun"``."""
    return sample_dpmpp_2m_sde(
        model, x, sigmas, extra_args, callback, disable, eta, s_noise, noise_sampler, "heun", seeds=seeds
    )


def sample_dpmpp_3m_sde(
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
    """DPM-Solver++(3M) SDE (arXiv 2211.01095, k-diffusion) on a Brownian path."""
    return run(
        dpmpp_3m_sde, model, x, sigmas, extra_args, callback, disable,
        options={"eta": eta, "s_noise": s_noise}, brownian=True, noise_sampler=noise_sampler, seeds=seeds,
    )  # fmt: skip
