# SPDX-License-Identifier: MIT
"""Own loops that reuse earlier slopes or x0: Adams methods, DEIS, UniPC, SA-Solver, gradient estimation."""

from __future__ import annotations

from torch import Tensor

from ..solvers.deis import deis
from ..solvers.gradient_estimation import gradient_estimation
from ..solvers.ipndm import ipndm
from ..solvers.ipndm_v import ipndm_v
from ..solvers.lms import lms
from ..solvers.sa_solver import sa_solver
from ..solvers.unipc import unipc
from .first_order import ExtraArgs, Sigmas
from .run import Callback, Model, NoiseSampler, Seeds, run


def sample_lms(
    model: Model,
    x: Tensor,
    sigmas: Sigmas,
    extra_args: ExtraArgs = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    order: int = 4,
) -> Tensor:
    """Linear multistep (k-diffusion): the slope is the polynomial in σ through its last values; order 1 to 4."""
    return run(lms, model, x, sigmas, extra_args, callback, disable, options={"multistep_order": order})


def sample_ipndm(
    model: Model,
    x: Tensor,
    sigmas: Sigmas,
    extra_args: ExtraArgs = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    max_order: int = 4,
) -> Tensor:
    """iPNDM (arXiv 2202.09778, 2204.13902): Adams–Bashforth with the weights of even steps, in the last step too."""
    return run(ipndm, model, x, sigmas, extra_args, callback, disable, options={"multistep_order": max_order})


def sample_deis(
    model: Model,
    x: Tensor,
    sigmas: Sigmas,
    extra_args: ExtraArgs = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    max_order: int = 3,
) -> Tensor:
    """DEIS, ρAB in log ρ (arXiv 2204.13902, section 3.3): ε interpolated in log σ; order 1 to 3."""
    options = {"solver_order": max_order, "lower_order_final": False}
    return run(deis, model, x, sigmas, extra_args, callback, disable, options=options)


def sample_unipc(
    model: Model,
    x: Tensor,
    sigmas: Sigmas,
    extra_args: ExtraArgs = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    order: int = 3,
    variant: str = "bh1",
    lower_order_final: bool = True,
) -> Tensor:
    """UniPC (arXiv 2302.04867) with predictor and corrector from one model call a step.

    Args:
        model, x, sigmas, extra_args, callback, disable: as in `fastdiff.loops`.
        order: 1 to 3; the order of accuracy is one more.
        variant: ``bh1`` or ``bh2``, the paper's B(h).
        lower_order_final: lower the order at the end, to 1 in the last step.
    """
    options = {"solver_order": order, "unipc_type": variant, "lower_order_final": lower_order_final}
    return run(unipc, model, x, sigmas, extra_args, callback, disable, options=options)


def sample_unipc_bh2(
    model: Model,
    x: Tensor,
    sigmas: Sigmas,
    extra_args: ExtraArgs = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    order: int = 3,
    lower_order_final: bool = True,
) -> Tensor:
    """`sample_unipc` with ``variant="bh2"``."""
    return sample_unipc(model, x, sigmas, extra_args, callback, disable, order, "bh2", lower_order_final)


def sample_sa_solver(
    model: Model,
    x: Tensor,
    sigmas: Sigmas,
    extra_args: ExtraArgs = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    tau: float = 1.0,
    s_tmin: float = 0.0,
    s_tmax: float = float("inf"),
    noise_sampler: NoiseSampler | None = None,
    predictor_order: int = 3,
    corrector_order: int = 4,
    *,
    seeds: Seeds = None,
    lower_order_final: bool = True,
) -> Tensor:
    """SA-Solver (arXiv 2309.05019, algorithm 1): a stochastic Adams predictor and corrector.

    Args:
        model, x, sigmas, extra_args, callback, disable, noise_sampler, seeds: as in `fastdiff.loops`.
        tau: the noise, 0 for the ODE and 1 for DDPM's, of steps that begin between `s_tmin` and `s_tmax`.
        s_tmin, s_tmax: the range of σ with noise.
        predictor_order: 1 to 4.
        corrector_order: 1 to 4; 0 for no corrector.
        lower_order_final: lower both orders at the end, to 1 in the last step.
    """
    options = {
        "tau": tau, "s_tmin": s_tmin, "s_tmax": s_tmax,
        "predictor_order": predictor_order, "corrector_order": corrector_order,
        "lower_order_final": lower_order_final,
    }  # fmt: skip
    return run(
        sa_solver, model, x, sigmas, extra_args, callback, disable,
        options=options, noise_sampler=noise_sampler, seeds=seeds,
    )  # fmt: skip


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
