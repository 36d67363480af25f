# SPDX-License-Identifier: MIT
"""Terms of the variational bound, for models that learn the variance of the reverse step.

Ho et al. 2020 (arXiv 2006.11239, eq. 5) write the negative log-likelihood's bound as L_0 + Σ_t L_t + L_T::

    L_t = KL(q(x_{t−1} | x_t, x0) ‖ p(x_{t−1} | x_t))    t ≥ 1
    L_0 = −log p(x0 | x_0's noisiest level)              x0 in 256 levels from −1 to 1, eq. 13
    L_T = KL(q(x_T | x0) ‖ N(0, 1))                      no model in it

Timesteps count from 0 here: t is the index into the schedule, and L_0 belongs to t = 0.  Nichol & Dhariwal 2021 (arXiv
2102.09672) let the model interpolate the logarithm of the variance, eq. 15, and train L_simple + λ·L_vlb, eq. 16, with
the gradient of the bound kept from the mean::

    loss = ops.diffusion_loss(output, x0, t, schedule, seeds=seeds) + 0.001 * vlb_loss(output, x0, x_t, t, schedule)

All terms are in bits per dimension: the mean over a sample's elements, divided by ln 2, as in that paper's code.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ...errors import checked_type, error_message, unknown_name
from ...ops.forward_rows import ForwardScales, checked_timesteps, parse_target
from ...row_layout import compute_dtype
from ...schedules.betas import check_floating

__all__ = ["discretized_log_likelihood", "gaussian_kl", "prior_term", "vlb_loss", "vlb_terms"]

VARIANCE_TYPES = ("learned_range", "learned_unit_range", "fixed_small", "fixed_large")
_LEARNED = VARIANCE_TYPES[:2]


def gaussian_kl(mean: Tensor, log_variance: Tensor, other_mean: Tensor, other_log_variance: Tensor) -> Tensor:
    """Return KL(N(mean, variance) ‖ N(other_mean, other_variance)) of each element, in nats.

    Args:
        mean, log_variance, other_mean, other_log_variance: floating-point tensors that broadcast together.
    """
    # One exponential of the difference, so that a quotient of two tiny variances does not pass through 0/0.
    ratio = log_variance - other_log_variance
    return 0.5 * (torch.expm1(ratio) - ratio + (mean - other_mean) ** 2 * torch.exp(-other_log_variance))


def discretized_log_likelihood(x0: Tensor, mean: Tensor, log_std: Tensor, levels: int = 256) -> Tensor:
    """Return the log-probability of each element in its bin under N(mean, std²), in nats (arXiv 2006.11239, eq. 13).

    Args:
        x0: clean samples, on `levels` evenly spaced values from −1 to 1; the first and last bins are open.
        mean, log_std: of the decoder, floating-point tensors that broadcast with `x0`.
        levels: 256 for 8-bit images.
    """
    half = 1 / (levels - 1)
    scale = torch.exp(-log_std)
    centered = x0 - mean
    # Mirrored to the left where the bin is on the right, so that log Φ is never near 0 and its differences keep digits.
    left = torch.where(centered > 0, -centered, centered)
    is_first, is_last = x0 < -1 + half, x0 > 1 - half
    mirrored = centered > 0
    upper, lower = (left + half) * scale, (left - half) * scale
    log_upper = torch.special.log_ndtr(upper)
    log_upper = torch.where(torch.where(mirrored, is_first, is_last), torch.zeros_like(log_upper), log_upper)
    log_lower = torch.special.log_ndtr(lower)
    open_below = torch.where(mirrored, is_last, is_first)
    # log(e^a − e^b) = a + log(1 − e^(b − a)); an open bin has no lower end.
    difference = torch.where(open_below, torch.full_like(log_lower, -1.0), log_lower - log_upper)
    return torch.where(open_below, log_upper, log_upper + torch.log(-torch.expm1(difference)))


class _Posterior:
    """α, σ and the posterior q(x_{t−1} | x_t, x0) at the timesteps of a batch, shaped to multiply the samples."""

    def __init__(self, operation: str, schedule: Any, x: Tensor, t: Tensor, dtype: torch.dtype) -> None:
        scales = ForwardScales.of(operation, schedule)
        remedy = "pass one timestep a sample"
        checked_type(operation, "t", t, Tensor, f"integers [{len(x)}]", remedy)
        if t.is_floating_point() or t.dim() != 1 or len(t) != len(x):
            got = f"has dtype {t.dtype} and shape {list(t.shape)}"
            raise ValueError(error_message(operation, "t", got, f"integers [{len(x)}]", remedy))
        t = checked_timesteps(operation, t, scales)
        with torch.no_grad():
            alpha, sigma = (values.cpu() for values in scales.at(torch.arange(scales.steps, device="cpu")))
            one = torch.ones(1, dtype=torch.float64, device="cpu")
            alpha_s, sigma_s = torch.cat([one, alpha[:-1]]), torch.cat([0 * one, sigma[:-1]])
            a = alpha / alpha_s
            beta = sigma**2 - (a * sigma_s) ** 2
            log_large = beta.log()
            log_small = (beta * (sigma_s / sigma) ** 2).log()
            # At t = 0 the posterior variance is 0; like the paper's code, take that of t = 1.
            log_small[0] = log_small[1] if scales.steps > 1 else log_large[0]
            table = torch.stack(
                [
                    alpha,
                    sigma,
                    alpha_s * beta / sigma**2,
                    a * (sigma_s / sigma) ** 2,
                    log_small,
                    log_large,
                ]
            )
            chosen = table.to(t.device)[:, t].to(x.device, dtype)
        shape = -1, *[1] * (x.dim() - 1)
        rows: tuple[Tensor, ...] = chosen.reshape(6, *shape).unbind()
        self.alpha, self.sigma, self.of_x0, self.of_x, self.log_small, self.log_large = rows

    def predicted_x0(self, output: Tensor, x: Tensor, prediction_type: str) -> Tensor:
        """Read the model's output as x0."""
        if prediction_type == "epsilon":
            return (x - self.sigma * output) / self.alpha
        if prediction_type == "v_prediction":
            return (self.alpha * x - self.sigma * output) / (self.alpha**2 + self.sigma**2)
        if prediction_type == "flow_prediction":
            return (x - self.sigma * output) / (self.alpha + self.sigma)
        return output

    def mean(self, x0: Tensor, x: Tensor) -> Tensor:
        """The mean of x_{t−1} given x0 and x_t (arXiv 2006.11239, eq. 7, for any α and σ)."""
        return self.of_x0 * x0 + self.of_x * x


def vlb_terms(
    output: Tensor,
    x0: Tensor,
    x_t: Tensor,
    t: Tensor,
    schedule: Any,
    prediction_type: str = "epsilon",
    *,
    variance_type: str = "learned_range",
    clip_denoised: bool = False,
    detach_mean: bool = False,
) -> Tensor:
    """Return each sample's term of the variational bound at its timestep, in bits per dimension.

    Args:
        output: the model's, ``[B, 2C, ...]``: the prediction and v of the variance; ``[B, C, ...]`` with a fixed one.
        x0: clean samples ``[B, C, ...]`` in [−1, 1].
        x_t: the noisy samples that the model was given, like `x0`.
        t: int64 ``[B]``.
        schedule, prediction_type: as in `fastdiff.ops.noise_and_target`.
        variance_type: ``learned_range``, v in [−1, 1]: log variance = f·log β_t + (1 − f)·log β̃_t, f = (v + 1)/2
            (arXiv 2102.09672, eq. 15, and its code); ``learned_unit_range``, f = v; ``fixed_small``, β̃_t;
            ``fixed_large``, β_t.
        clip_denoised: clamp the predicted x0 to [−1, 1].
        detach_mean: give no gradient to the prediction, as L_hybrid asks.

    Returns:
        ``[B]``, float32 (float64 where a tensor is float64).

    Raises:
        TypeError, ValueError: an argument does not fit.
    """
    operation = "vlb_terms"
    if variance_type not in VARIANCE_TYPES:
        raise unknown_name(operation, "variance_type", variance_type, VARIANCE_TYPES)
    target = parse_target(operation, prediction_type)
    for name, tensor in (("output", output), ("x0", x0), ("x_t", x_t)):
        check_floating(operation, name, tensor)
    learned = variance_type in _LEARNED
    expected = list(x0.shape)
    if x_t.shape != x0.shape:
        raise ValueError(_mismatch(operation, "x_t", x_t, expected, "pass the noisy samples that the model was given"))
    if learned:
        if x0.dim() < 2:
            raise ValueError(_mismatch(operation, "x0", x0, "[B, C, ...]", "add a dimension of channels"))
        expected = [x0.shape[0], 2 * x0.shape[1], *x0.shape[2:]]
    if list(output.shape) != expected:
        raise ValueError(_mismatch(operation, "output", output, expected, f"that is what {variance_type!r} needs"))
    dtype = compute_dtype(output.dtype, x0.dtype, x_t.dtype)
    output, x0, x_t = output.to(dtype), x0.to(dtype), x_t.to(dtype)
    posterior = _Posterior(operation, schedule, x0, t, dtype)
    if learned:
        output, v = output.chunk(2, dim=1)
        share = (v + 1) / 2 if variance_type == "learned_range" else v
        log_variance = share * posterior.log_large + (1 - share) * posterior.log_small
    else:
        log_variance = posterior.log_small if variance_type == "fixed_small" else posterior.log_large
        log_variance = log_variance.expand_as(x0)
    if detach_mean:
        output = output.detach()
    predicted = posterior.predicted_x0(output, x_t, target)
    if clip_denoised:
        predicted = predicted.clamp(-1, 1)
    mean = posterior.mean(predicted, x_t)
    first = (t == 0).to(x0.device).reshape(-1, *[1] * (x0.dim() - 1))
    # Each term is taken of x0 itself at the other's timesteps: a gradient that overflows there would be NaN times 0.
    later_mean, later_variance = torch.where(first, x0, mean), torch.where(first, 0.0, log_variance)
    divergence = gaussian_kl(posterior.mean(x0, x_t), posterior.log_small, later_mean, later_variance)
    first_mean, first_variance = torch.where(first, mean, x0), torch.where(first, log_variance, 0.0)
    decoder = -discretized_log_likelihood(x0, first_mean, 0.5 * first_variance)
    return _bits(torch.where(first, decoder, divergence))


def vlb_loss(
    output: Tensor,
    x0: Tensor,
    x_t: Tensor,
    t: Tensor,
    schedule: Any,
    prediction_type: str = "epsilon",
    *,
    variance_type: str = "learned_range",
    reduction: str = "mean",
) -> Tensor:
    """Return an estimate of L_vlb for L_hybrid (arXiv 2102.09672, eq. 16): T times `vlb_terms`, at uniform timesteps.

    The prediction gets no gradient, the variance does.

    Args:
        output, x0, x_t, t, schedule, prediction_type, variance_type: as in `vlb_terms`.
        reduction: ``mean`` or ``sum`` over the samples, or ``none``: ``[B]``.

    Returns:
        ``[]`` or ``[B]``, in bits per dimension.
    """
    if reduction not in ("mean", "sum", "none"):
        raise unknown_name("vlb_loss", "reduction", reduction, ("mean", "sum", "none"))
    terms = vlb_terms(output, x0, x_t, t, schedule, prediction_type, variance_type=variance_type, detach_mean=True)
    each = terms * ForwardScales.of("vlb_loss", schedule).steps
    if reduction == "none":
        return each
    return each.mean() if reduction == "mean" else each.sum()


def prior_term(x0: Tensor, schedule: Any) -> Tensor:
    """Return L_T = KL(q(x_T | x0) ‖ N(0, 1)) of each sample, in bits per dimension: ``[B]``.

    Args:
        x0: clean samples ``[B, ...]``.
        schedule: as in `fastdiff.ops.noise_and_target`.
    """
    check_floating("prior_term", "x0", x0)
    scales = ForwardScales.of("prior_term", schedule)
    alpha, sigma = (float(one) for one in scales.at(torch.tensor(scales.steps - 1, device="cpu")))
    mean = alpha * x0.to(compute_dtype(x0.dtype))
    nothing = torch.zeros((), dtype=mean.dtype, device=mean.device)
    return _bits(gaussian_kl(mean, nothing + 2 * math.log(sigma), nothing, nothing))


def _bits(nats: Tensor) -> Tensor:
    return (nats.flatten(1).mean(1) if nats.dim() > 1 else nats) / math.log(2)


def _mismatch(operation: str, name: str, tensor: Tensor, expected: object, remedy: str) -> str:
    return error_message(operation, name, f"has shape {list(tensor.shape)}", str(expected), remedy)
