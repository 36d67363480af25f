# SPDX-License-Identifier: MIT
"""Own loops of exponential integrators: RES, SEEDS, exponential Heun, ER-SDE."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ..solvers.er_sde import default_noise_scaler, er_sde
from ..solvers.exponential_rk import res_2s, res_3s, seeds_2, seeds_3
from ..solvers.res_multistep import res_multistep
from .first_order import ExtraArgs, Sigmas
from .run import Callback, Model, NoiseSampler, Seeds, run


def sample_res_multistep(
    model: Model,
    x: Tensor,
    sigmas: Sigmas,
    extra_args: ExtraArgs = None,
    callback: Callback | None = None,
    disable: bool | None = None,
) -> Tensor:
    """RES multistep (arXiv 2308.02157): a second-order exponential integrator with the last x0."""
    return run(res_multistep, model, x, sigmas, extra_args, callback, disable)


def sample_res_multistep_ancestral(
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
    """RES multistep (arXiv 2308.02157) with ancestral noise."""
    return run(
        res_multistep, model, x, sigmas, extra_args, callback, disable,
        options={"eta": eta, "s_noise": s_noise}, noise_sampler=noise_sampler, seeds=seeds,
    )  # fmt: skip


def sample_res_2s(
    model: Model,
    x: Tensor,
    sigmas: Sigmas,
    extra_args: ExtraArgs = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    c2: float = 0.5,
    eta: float = 0.0,
    s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
    *,
    seeds: Seeds = None,
) -> Tensor:
    """RES with two stages (arXiv 2308.02157, section 3.1); two model calls a step.  η adds the noise of SEEDS."""
    return run(
        res_2s, model, x, sigmas, extra_args, callback, disable,
        options={"c2": c2, "eta": eta, "s_noise": s_noise}, calls=2, noise_by="stage",
        noise_sampler=noise_sampler, seeds=seeds,
    )  # fmt: skip


def sample_res_3s(
    model: Model,
    x: Tensor,
    sigmas: Sigmas,
    extra_args: ExtraArgs = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    c2: float = 0.5,
    c3: float = 1.0,
    eta: float = 0.0,
    s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
    *,
    seeds: Seeds = None,
) -> Tensor:
    """RES with three stages (arXiv 2308.02157); three model calls a step.  η adds the noise of SEEDS."""
    return run(
        res_3s, model, x, sigmas, extra_args, callback, disable,
        options={"c2": c2, "c3": c3, "eta": eta, "s_noise": s_noise}, calls=3, noise_by="stage",
        noise_sampler=noise_sampler, seeds=seeds,
    )  # fmt: skip


def sample_seeds_2(
    model: Model,
    x: Tensor,
    sigmas: Sigmas,
    extra_args: ExtraArgs = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    eta: float = 1.0,
    s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
    r: float = 0.5,
    solver_type: str = "phi_1",
    *,
    seeds: Seeds = None,
) -> Tensor:
    """SEEDS-2 (arXiv 2305.14267, algorithm 2); two model calls a step, each with noise."""
    return run(
        seeds_2, model, x, sigmas, extra_args, callback, disable,
        options={"eta": eta, "s_noise": s_noise, "r": r, "solver_type": solver_type}, calls=2, noise_by="stage",
        noise_sampler=noise_sampler, seeds=seeds,
    )  # fmt: skip


def sample_seeds_3(
    model: Model,
    x: Tensor,
    sigmas: Sigmas,
    extra_args: ExtraArgs = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    eta: float = 1.0,
    s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
    r_1: float = 1 / 3,
    r_2: float = 2 / 3,
    *,
    seeds: Seeds = None,
) -> Tensor:
    """SEEDS-3 (arXiv 2305.14267, algorithm 3); three model calls a step, each with noise."""
    return run(
        seeds_3, model, x, sigmas, extra_args, callback, disable,
        options={"eta": eta, "s_noise": s_noise, "r_1": r_1, "r_2": r_2}, calls=3, noise_by="stage",
        noise_sampler=noise_sampler, seeds=seeds,
    )  # fmt: skip


def sample_exp_heun_2_x0(
    model: Model,
    x: Tensor,
    sigmas: Sigmas,
    extra_args: ExtraArgs = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    solver_type: str = "phi_2",
) -> Tensor:
    """Exponential Heun on x0 in log σ: `sample_seeds_2` with its second call at the end of the step and no noise."""
    return sample_seeds_2(model, x, sigmas, extra_args, callback, disable, 0.0, 0.0, None, 1.0, solver_type)


def sample_exp_heun_2_x0_sde(
    model: Model,
    x: Tensor,
    sigmas: Sigmas,
    extra_args: ExtraArgs = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    eta: float = 1.0,
    s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
    solver_type: str = "phi_2",
    *,
    seeds: Seeds = None,
) -> Tensor:
    """Exponential Heun on x0 with noise: `sample_seeds_2` with its second call at the end of the step."""
    return sample_seeds_2(
        model, x, sigmas, extra_args, callback, disable, eta, s_noise, noise_sampler, 1.0, solver_type, seeds=seeds
    )


def sample_er_sde(
    model: Model,
    x: Tensor,
    sigmas: Sigmas,
    extra_args: ExtraArgs = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
    noise_scaler: Callable[[float], float] = default_noise_scaler,
    max_stage: int = 3,
    *,
    seeds: Seeds = None,
) -> Tensor:
    """ER-SDE-Solver (arXiv 2309.06169, algorithms 2 and 3); `noise_scaler` is φ of a noise level, a float."""
    return run(
        er_sde, model, x, sigmas, extra_args, callback, disable,
        options={"s_noise": s_noise, "noise_scaler": noise_scaler, "max_stage": max_stage},
        noise_sampler=noise_sampler, seeds=seeds,
    )  # fmt: skip
