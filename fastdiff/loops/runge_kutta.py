# SPDX-License-Identifier: MIT
"""Own loops with several model calls a step in σ: Heun, Heun++, Restart, DPM-Solver-fast."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import error_message
from ..schedules.sigmas import get_sigmas_karras
from ..solvers.dpm_fast import dpm_fast, fast_orders
from ..solvers.flow_heun import flow_heun
from ..solvers.heun import heun
from ..solvers.heunpp import heunpp2
from ..solvers.kdpm2 import kdpm2
from ..solvers.kdpm2_ancestral import kdpm2_ancestral
from ..solvers.restart import restart, restart_steps
from .dpm_solvers import ancestral_calls
from .first_order import ExtraArgs, Sigmas
from .program import sigma_levels
from .run import Callback, ChurnOptions, Model, NoiseSampler, Seeds, run


def sample_heun(
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
    """Heun's method in σ (arXiv 2206.00364, algorithm 2), with churn; two model calls a step, one in the last."""
    churn = ChurnOptions(s_churn, s_tmin, s_tmax, s_noise)
    return run(
        heun, model, x, sigmas, extra_args, callback, disable,
        options={"churn": churn}, calls=2, noise_by="rise", noise_sampler=noise_sampler, seeds=seeds,
    )  # fmt: skip


def sample_heunpp2(
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
    """Heun++ (Carzit, sd-webui-samplers-scheduler), with churn; three model calls a step, two and one at the end."""
    churn = ChurnOptions(s_churn, s_tmin, s_tmax, s_noise)
    return run(
        heunpp2, model, x, sigmas, extra_args, callback, disable,
        options={"churn": churn}, calls=_heunpp2_calls, noise_by="rise", noise_sampler=noise_sampler, seeds=seeds,
    )  # fmt: skip


def _heunpp2_calls(sigmas: Sequence[float], options: Mapping[str, Any]) -> list[int]:
    n = len(sigmas) - 1
    return [min(3, n - i) for i in range(n)]


def sample_dpm_2(
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
    """DPM-Solver-2 in the form of algorithm 2 of arXiv 2206.00364 (k-diffusion), with churn; two model calls a step."""
    churn = ChurnOptions(s_churn, s_tmin, s_tmax, s_noise)
    return run(
        kdpm2, model, x, sigmas, extra_args, callback, disable,
        options={"churn": churn}, calls=2, noise_by="rise", noise_sampler=noise_sampler, seeds=seeds,
    )  # fmt: skip


def sample_dpm_2_ancestral(
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
    """DPM-Solver-2 steps with ancestral noise (k-diffusion); two model calls a step."""
    return run(
        kdpm2_ancestral, model, x, sigmas, extra_args, callback, disable,
        options={"eta": eta, "s_noise": s_noise}, calls=ancestral_calls, noise_sampler=noise_sampler, seeds=seeds,
    )  # fmt: skip


def sample_flow_heun(
    model: Model,
    x: Tensor,
    sigmas: Sigmas,
    extra_args: ExtraArgs = None,
    callback: Callback | None = None,
    disable: bool | None = None,
) -> Tensor:
    """Heun's method for rectified flow (arXiv 2209.03003); two model calls a step.

    Args:
        model, x, sigmas, extra_args, callback, disable: as in `sample_flow_euler`.
    """
    return run(flow_heun, model, x, sigmas, extra_args, callback, disable, calls=2, flow=True)


def sample_restart(
    model: Model,
    x: Tensor,
    sigmas: Sigmas,
    extra_args: ExtraArgs = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    s_noise: float = 1.0,
    restart_list: Mapping[float, Sequence[float]] | None = None,
    noise_sampler: NoiseSampler | None = None,
    *,
    seeds: Seeds = None,
) -> Tensor:
    """Restart (arXiv 2306.14878, algorithm 1) with Heun steps: go down, add noise up to σ_max, and go down again.

    Args:
        model, x, sigmas, extra_args, callback, disable, noise_sampler, seeds: as in `fastdiff.loops`.
        s_noise: the standard deviation of the added noise.
        restart_list: {σ: (levels of the walk down again, times, σ_max)}; σ and σ_max are moved to the nearest of
            `sigmas`, and the walk has Karras' spacing.  None restarts once at 0.1 from 2 with 10 levels for 20 steps or
            more, and twice with a quarter of the steps for 36 or more; the levels before it are then spaced again, so
            that the loop has the same number of steps, as in the WebUI.
    """
    values = [float(sigma) for sigma in sigmas]
    if restart_list is None:
        values, restart_list = _default_restarts(values)
    restarts = []
    for target, (levels, times, highest) in restart_list.items():
        low, high = _nearest(values, target), _nearest(values, highest)
        if high < low:
            walk = get_sigmas_karras(int(levels), values[low], values[high])[:-1].tolist()
            restarts.append((low, tuple(walk), int(times)))
    return run(
        restart, model, x, values, extra_args, callback, disable,
        options={"restarts": tuple(restarts), "s_noise": s_noise}, calls=_restart_calls, noise_by="rise",
        noise_sampler=noise_sampler, seeds=seeds,
    )  # fmt: skip


def _default_restarts(sigmas: list[float]) -> tuple[list[float], dict[float, tuple[int, int, float]]]:
    steps = len(sigmas) - 1
    if steps < 20:
        return sigmas, {}
    walk, times = (steps // 4, 2) if steps >= 36 else (9, 1)
    levels = get_sigmas_karras(steps - walk * times, sigmas[-2], sigmas[0]).tolist()
    return levels, {0.1: (walk + 1, times, 2.0)}


def _nearest(sigmas: Sequence[float], wanted: float) -> int:
    return min(range(len(sigmas)), key=lambda i: abs(sigmas[i] - wanted))


def _restart_calls(sigmas: Sequence[float], options: Mapping[str, Any]) -> list[int]:
    return [2 if end.sigma > 0.0 else 1 for _, end in restart_steps(sigma_levels(sigmas), options["restarts"])]


def sample_dpm_fast(
    model: Model,
    x: Tensor,
    sigma_min: float,
    sigma_max: float,
    n: int,
    extra_args: ExtraArgs = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    eta: float = 0.0,
    s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
    *,
    seeds: Seeds = None,
) -> Tensor:
    """DPM-Solver-fast (arXiv 2206.00927, section 3.4): n model calls in steps of order 3, evenly spaced in log σ.

    Args:
        model, x, extra_args, callback, disable, noise_sampler, seeds: as in `fastdiff.loops`.
        sigma_min, sigma_max: the range of σ, both above 0; samples end at `sigma_min`.
        n: model calls, at least 1.
        eta, s_noise: of ancestral noise; 0 adds none.
    """
    check_range("sample_dpm_fast", sigma_min, sigma_max)
    orders = fast_orders(n)
    grid = torch.linspace(-math.log(sigma_max), -math.log(sigma_min), len(orders) + 1, dtype=torch.float64)
    return run(
        dpm_fast, model, x, (-grid).exp(), extra_args, callback, disable,
        options={"orders": orders, "eta": eta, "s_noise": s_noise}, calls=_fast_calls,
        noise_sampler=noise_sampler, seeds=seeds,
    )  # fmt: skip


def _fast_calls(sigmas: Sequence[float], options: Mapping[str, Any]) -> Sequence[int]:
    orders: Sequence[int] = options["orders"]
    return orders


def check_range(operation: str, sigma_min: float, sigma_max: float) -> None:
    """Refuse a range of σ that is empty or reaches 0."""
    if not 0.0 < float(sigma_min) < float(sigma_max):
        raise ValueError(
            error_message(
                operation,
                "sigma_min",
                f"is {float(sigma_min):g} beside sigma_max {float(sigma_max):g}",
                "0 < sigma_min < sigma_max",
                "end at a small noise level",
            )
        )
