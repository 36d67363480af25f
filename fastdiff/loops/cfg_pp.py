# SPDX-License-Identifier: MIT
"""Own loops under CFG++ (arXiv 2406.08070): the slope comes from the unconditional prediction.

The model returns two tensors, ``(denoised, uncond_denoised)``: the guided prediction of x0 and the unconditional one.
"""

from __future__ import annotations

from torch import Tensor

from ..solvers.cfg_pp import dpmpp_2m_cfg_pp, euler_ancestral_cfg_pp
from ..solvers.dpmpp_2s_ancestral import dpmpp_2s_ancestral
from ..solvers.gradient_estimation import gradient_estimation
from ..solvers.res_multistep import res_multistep
from .dpm_solvers import ancestral_calls
from .first_order import ExtraArgs, Sigmas
from .run import Callback, Model, NoiseSampler, Seeds, run


def sample_euler_cfg_pp(
    model: Model,
    x: Tensor,
    sigmas: Sigmas,
    extra_args: ExtraArgs = None,
    callback: Callback | None = None,
    disable: bool | None = None,
) -> Tensor:
    """Euler's method under CFG++ (arXiv 2406.08070, algorithm 1); the model returns ``(denoised, uncond_denoised)``."""
    return run(euler_ancestral_cfg_pp, model, x, sigmas, extra_args, callback, disable, options={"eta": 0.0})


def sample_euler_ancestral_cfg_pp(
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
    """Euler ancestral under CFG++; the model returns ``(denoised, uncond_denoised)``."""
    return run(
        euler_ancestral_cfg_pp, model, x, sigmas, extra_args, callback, disable,
        options={"eta": eta, "s_noise": s_noise}, noise_sampler=noise_sampler, seeds=seeds,
    )  # fmt: skip


def sample_dpmpp_2s_ancestral_cfg_pp(
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
    """DPM-Solver++(2S) ancestral under CFG++; the model returns ``(denoised, uncond_denoised)``."""
    return run(
        dpmpp_2s_ancestral, model, x, sigmas, extra_args, callback, disable,
        options={"eta": eta, "s_noise": s_noise, "cfg_pp": True}, calls=ancestral_calls,
        noise_sampler=noise_sampler, seeds=seeds,
    )  # fmt: skip


def sample_dpmpp_2m_cfg_pp(
    model: Model,
    x: Tensor,
    sigmas: Sigmas,
    extra_args: ExtraArgs = None,
    callback: Callback | None = None,
    disable: bool | None = None,
) -> Tensor:
    """DPM-Solver++(2M) under CFG++; the model returns ``(denoised, uncond_denoised)``."""
    return run(dpmpp_2m_cfg_pp, model, x, sigmas, extra_args, callback, disable)


def sample_res_multistep_cfg_pp(
    model: Model,
    x: Tensor,
    sigmas: Sigmas,
    extra_args: ExtraArgs = None,
    callback: Callback | None = None,
    disable: bool | None = None,
) -> Tensor:
    """RES multistep under CFG++; the model returns ``(denoised, uncond_denoised)``."""
    return run(res_multistep, model, x, sigmas, extra_args, callback, disable, options={"cfg_pp": True})


def sample_res_multistep_ancestral_cfg_pp(
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
    """RES multistep with ancestral noise under CFG++; the model returns ``(denoised, uncond_denoised)``."""
    return run(
        res_multistep, model, x, sigmas, extra_args, callback, disable,
        options={"eta": eta, "s_noise": s_noise, "cfg_pp": True}, noise_sampler=noise_sampler, seeds=seeds,
    )  # fmt: skip


def sample_gradient_estimation_cfg_pp(
    model: Model,
    x: Tensor,
    sigmas: Sigmas,
    extra_args: ExtraArgs = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    ge_gamma: float = 2.0,
) -> Tensor:
    """Gradient estimation under CFG++; the model returns ``(denoised, uncond_denoised)``."""
    return run(
        gradient_estimation, model, x, sigmas, extra_args, callback, disable,
        options={"ge_gamma": ge_gamma, "cfg_pp": True},
    )  # fmt: skip
