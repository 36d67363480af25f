# SPDX-License-Identifier: MIT
"""Own loops of order 1: one model call a step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ..errors import as_float, error_message
from ..schedules.levels import Levels
from ..solvers.ddim import ddim
from ..solvers.ddpm import ddpm
from ..solvers.euler import euler
from ..solvers.euler_ancestral import euler_ancestral
from ..solvers.flow_euler import flow_euler
from ..solvers.prediction import Prediction
from ..solvers.table import StepTable
from ..solvers.tcd import tcd_through
from .denoisers import Denoiser
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
    return run(ddpm, model, x, sigmas, extra_args, callback, disable, noise_sampler=noise_sampler, seeds=seeds)


def sample_lcm(
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
    """Multistep consistency sampling (arXiv 2303.01469, algorithm 1; 2310.04378): x0 + σ·z at each level.

    The model returns the consistency function of its samples, boundary conditions included.
    """
    return run(
        flow_euler, model, x, sigmas, extra_args, callback, disable,
        options={"stochastic_sampling": True}, noise_sampler=noise_sampler, seeds=seeds,
    )  # fmt: skip


def sample_tcd(
    model: Model,
    x: Tensor,
    sigmas: Sigmas,
    extra_args: ExtraArgs = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    eta: float = 0.3,
    noise_sampler: NoiseSampler | None = None,
    *,
    schedule: Denoiser | None = None,
    seeds: Seeds = None,
) -> Tensor:
    """Strategic stochastic sampling of trajectory consistency models (arXiv 2402.19159, algorithm 4).

    Each step goes to the level at (1 − γ) times the time of the next, and back up to the next by fresh noise.

    Args:
        model, x, sigmas, extra_args, callback, disable, noise_sampler, seeds: as in `fastdiff.loops`.
        eta: γ from 0, which is Euler's method, to 1.
        schedule: turns σ into the model's time and back; the model itself where it is a `Denoiser`.

    Raises:
        ValueError: there is no schedule, or γ is out of range.
    """
    clock = schedule if schedule is not None else model
    if not isinstance(clock, Denoiser):
        got, expected = "is missing", "a Denoiser, which knows the times of the levels"
        raise ValueError(error_message("sample_tcd", "schedule", got, expected, "pass schedule=EpsilonDenoiser(…)"))
    if not 0.0 <= as_float("sample_tcd", "eta", eta) <= 1.0:
        raise ValueError(error_message("sample_tcd", "eta", f"is {eta}", "0 to 1", "0.3 is the usual one"))
    below = []
    for sigma in map(float, sigmas[1:]):
        below.append(min(sigma, clock.t_to_sigma((1.0 - eta) * clock.sigma_to_t(sigma))) if sigma > 0.0 else 0.0)
    return run(
        _tcd, model, x, sigmas, extra_args, callback, disable,
        options={"below": tuple(below)}, noise_sampler=noise_sampler, seeds=seeds,
    )  # fmt: skip


def _tcd(levels: Levels, prediction: Prediction, *, below: Sequence[float]) -> StepTable:
    ends = levels.points[1:]
    return tcd_through(
        levels,
        prediction,
        [s if sigma == s.sigma else levels.locate(sigma) for sigma, s in zip(below, ends, strict=True)],
    )


def sample_flow_euler(
    model: Model,
    x: Tensor,
    sigmas: Sigmas,
    extra_args: ExtraArgs = None,
    callback: Callback | None = None,
    disable: bool | None = None,
) -> Tensor:
    """Euler's method for rectified flow (arXiv 2209.03003, section 2.1).

    Args:
        model: returns x0 of x = (1 − σ)·x0 + σ·ε, or is a `FlowPathDenoiser`.
        x: the samples at the first level; pure noise at σ = 1.
        sigmas: times from 1 down to 0; `get_sigmas_flow` makes them.
        extra_args, callback, disable: as in `fastdiff.loops`.
    """
    return run(flow_euler, model, x, sigmas, extra_args, callback, disable, flow=True)
