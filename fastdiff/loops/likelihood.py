# SPDX-License-Identifier: MIT
"""The log-likelihood of samples under a denoiser, by the probability-flow ODE (arXiv 2011.13456, section 4.3)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import checked_float, checked_type, error_message
from .first_order import ExtraArgs
from .run import Model
from .runge_kutta import check_range

#: Dormand and Prince's pair of orders 5 and 4 (1980): the nodes, the weights of each stage, and the weights of the
#: difference of both results; the last stage's weights are those of order 5.
_NODES = (0.0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0)
_STAGES: tuple[tuple[float, ...], ...] = (
    (),
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
_ERROR = (71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)

#: Samples and log-likelihoods, or their derivatives in σ.
_State = tuple[Tensor, Tensor]


def log_likelihood(
    model: Model,
    x: Tensor,
    sigma_min: float,
    sigma_max: float,
    extra_args: ExtraArgs = None,
    atol: float = 1e-4,
    rtol: float = 1e-4,
) -> tuple[Tensor, dict[str, int]]:
    """Return the log-likelihood of each sample, in nats, with Hutchinson's estimate of the divergence.

    The ODE is solved from `sigma_min` to `sigma_max` by Dormand and Prince's method with adaptive steps, and the prior
    is N(0, σ_max²).  The estimate's directions are ±1 from torch's default generator, one for all σ, as k-diffusion
    draws them.

    Args:
        model: ``model(x, sigma, **extra_args)``, differentiable in x; see `fastdiff.loops`.
        x: samples, ``[B, ...]``, float32 or float64.
        sigma_min, sigma_max: the range of σ, above 0.
        extra_args: keyword arguments for the model.
        atol, rtol: tolerances of a step, for the samples and the log-likelihoods.

    Returns:
        The log-likelihoods, ``[B]``, and ``{"fevals": …}``, the number of model calls.

    Raises:
        TypeError, ValueError: an argument does not fit.
        RuntimeError: the step size has become too small to go on.
    """
    operation = "log_likelihood"
    checked_type(operation, "x", x, Tensor, "a tensor [B, ...]", "pass samples")
    check_range(operation, sigma_min, sigma_max)
    checked_float(operation, "atol", atol, 0.0, strict=True)
    checked_float(operation, "rtol", rtol, 0.0)
    directions = torch.randint_like(x, 2) * 2 - 1
    calls = 0

    def derivative(sigma: float, state: _State) -> _State:
        nonlocal calls
        calls += 1
        with torch.enable_grad():
            at = state[0].detach().requires_grad_()
            slope = (at - model(at, at.new_full((len(at),), sigma), **(extra_args or {}))) / sigma
            (gradient,) = torch.autograd.grad((slope * directions).sum(), at)
        return slope.detach(), (directions * gradient).flatten(1).sum(1)

    with torch.no_grad():
        latent, change = _integrate(
            derivative, (x.detach(), x.new_zeros(len(x))), float(sigma_min), float(sigma_max), atol, rtol
        )
        squares = latent.flatten(1).square().sum(1)
        elements = latent[0].numel()
        prior = -0.5 * squares / sigma_max**2 - elements * (math.log(sigma_max) + 0.5 * math.log(2.0 * math.pi))
    return prior + change, {"fevals": calls}


def _integrate(
    derivative: Callable[[float, _State], _State], state: _State, start: float, end: float, atol: float, rtol: float
) -> _State:
    """Solve an ODE; the error of a step is the larger root mean square of the two parts over their tolerances."""
    now, step = start, 0.01 * start
    first = derivative(now, state)
    while now < end:
        step = min(step, end - now)
        if now + step == now:
            raise RuntimeError(
                error_message(
                    "log_likelihood",
                    "the step",
                    f"is {step:g} at σ = {now:g}",
                    "one that moves",
                    "raise atol or rtol, or check the model's output for NaN",
                )
            )
        slopes = [first]
        ahead = state
        for node, weights in zip(_NODES[1:], _STAGES[1:], strict=True):
            ahead = _combined(state, slopes, weights, step)
            slopes.append(derivative(now + node * step, ahead))
        wrong = _combined(None, slopes, _ERROR, step)
        error = max(
            float((part / (atol + rtol * torch.maximum(old.abs(), new.abs()))).square().mean().sqrt())
            for part, old, new in zip(wrong, state, ahead, strict=True)
        )
        if error <= 1.0:
            now, state, first = (end if step == end - now else now + step), ahead, slopes[-1]
        step *= min(10.0, max(0.2, 0.9 * max(error, 1e-10) ** -0.2)) if math.isfinite(error) else 0.2
    return state


def _combined(state: _State | None, slopes: Sequence[_State], weights: Sequence[float], step: float) -> _State:
    """Return the state plus the weighed slopes times the step."""

    def part(index: int) -> Tensor:
        total: Any = 0.0 if state is None else state[index]
        for slope, weight in zip(slopes, weights, strict=True):
            if weight:
                total = total + slope[index] * (weight * step)
        combined: Tensor = total
        return combined

    return part(0), part(1)
