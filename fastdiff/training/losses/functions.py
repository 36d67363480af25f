# SPDX-License-Identifier: MIT
"""Training losses of a prediction and its target, as plain functions and as `AdvancedLossFunctions`.

They are the readable form: both tensors are given.  `fastdiff.ops.diffusion_loss` computes the same values in one pass
from the model's output, x0 and the seeds of the noise, and stores neither noise nor target.

A sample's loss is the mean of ρ(pred − target) over its elements, times its weight.  Arithmetic is in float32, in
float64 where a tensor is float64.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from ...errors import checked_float, checked_type, error_message, unknown_name
from ...ops.diffusion_loss import LEAST_HUBER_C, LOSSES, REDUCTIONS
from ...row_layout import compute_dtype
from ...schedules import LinearNoiseScheduler
from ...schedules.betas import check_floating
from .variational_bound import vlb_loss
from .weights import debiased_weights, min_snr_weights, p2_weights, signal_to_noise_ratio

__all__ = [
    "AdvancedLossFunctions",
    "debiased_loss",
    "huber_loss",
    "l1_loss",
    "l2_loss",
    "p2_loss",
    "snr_loss",
    "v_prediction_loss",
]


def _residual(operation: str, pred: Tensor, target: Tensor) -> Tensor:
    """Return pred − target in the compute dtype, after checks."""
    check_floating(operation, "pred", pred)
    check_floating(operation, "target", target)
    if target.shape != pred.shape or target.device != pred.device:  # broadcasting would compare other pairs
        got, expected = (f"{list(one.shape)} on {one.device}" for one in (target, pred))
        remedy = "make target like pred"
        raise ValueError(error_message(operation, "target", f"is {got}", f"{expected} like pred", remedy))
    if pred.dim() == 0 or pred.numel() == 0:
        got = f"has shape {list(pred.shape)}"
        raise ValueError(error_message(operation, "pred", got, "[B, ...] with elements", "pass a batch"))
    dtype = compute_dtype(pred.dtype, target.dtype)
    return pred.to(dtype) - target.to(dtype)


def _reduced(operation: str, values: Tensor, weights: Tensor | None, reduction: str) -> Tensor:
    """Average ρ(r) ``[B, ...]`` over each sample, weigh the samples and reduce them."""
    if reduction not in REDUCTIONS:
        raise unknown_name(operation, "reduction", reduction, REDUCTIONS)
    each = values.flatten(1).mean(1) if values.dim() > 1 else values
    if weights is not None:
        checked_type(operation, "weights", weights, Tensor, "a torch.Tensor", "pass one weight a sample")
        if list(weights.shape) != [len(each)]:
            got, remedy = f"has shape {list(weights.shape)}", "pass one weight a sample, such as table[timesteps]"
            raise ValueError(error_message(operation, "weights", got, f"[{len(each)}]", remedy))
        each = each * weights.to(each)
    if reduction == "none":
        return each
    return each.mean() if reduction == "mean" else each.sum() * (values.numel() // len(each))


def _values(operation: str, residual: Tensor, loss: str, c: float) -> Tensor:
    """Return ρ(r) of a loss by name."""
    if loss == "l2":
        return residual**2
    if loss == "l1":
        return residual.abs()
    if loss != "huber":
        raise unknown_name(operation, "loss", loss, LOSSES)
    checked_float(operation, "c", c, LEAST_HUBER_C)
    # √(r² + c²) − c without its cancellation for |r| much below c.
    square = residual**2
    return square / ((square + c * c).sqrt() + c)


def l2_loss(pred: Tensor, target: Tensor, *, weights: Tensor | None = None, reduction: str = "mean") -> Tensor:
    """Mean squared error.

    Args:
        pred: the model's prediction ``[B, ...]``, any floating dtype.
        target: like `pred`.
        weights: ``[B]``, one a sample.
        reduction: ``mean`` over samples and elements, their ``sum``, or ``none``: ``[B]``, the mean over each
            sample's elements.

    Returns:
        ``[]`` or ``[B]``, float32 (float64 where a tensor is float64).

    Raises:
        TypeError, ValueError: an argument does not fit.
    """
    residual = _residual("l2_loss", pred, target)
    return _reduced("l2_loss", _values("l2_loss", residual, "l2", 0.0), weights, reduction)


def l1_loss(pred: Tensor, target: Tensor, *, weights: Tensor | None = None, reduction: str = "mean") -> Tensor:
    """Mean absolute error; arguments as in `l2_loss`."""
    residual = _residual("l1_loss", pred, target)
    return _reduced("l1_loss", _values("l1_loss", residual, "l1", 0.0), weights, reduction)


def huber_loss(
    pred: Tensor, target: Tensor, c: float = 0.001, *, weights: Tensor | None = None, reduction: str = "mean"
) -> Tensor:
    """Pseudo-Huber loss √(r² + c²) − c of each element (Charbonnier et al. 1997).

    About r²/(2c) for |r| well below c, and |r| − c above.  Song & Dhariwal 2023 (arXiv 2310.14189, section 3.3) take
    the root of a whole sample's distance instead.

    Args:
        c: at least 1e-18, in the units of the prediction.
        pred, target, weights, reduction: as in `l2_loss`.
    """
    residual = _residual("huber_loss", pred, target)
    return _reduced("huber_loss", _values("huber_loss", residual, "huber", c), weights, reduction)


def _snr_of(
    operation: str, timesteps: Any, scheduler: Any, alphas_cumprod: Tensor | None, prediction_type: str | None
) -> tuple[Tensor, str]:
    """Return S at the timesteps, and the prediction type; see `snr_loss` for what is assumed."""
    if scheduler is not None and alphas_cumprod is not None:
        remedy = "leave one of the two out"
        raise ValueError(error_message(operation, "alphas_cumprod", "is given beside scheduler", "one of them", remedy))
    schedule = alphas_cumprod if scheduler is None else scheduler
    if schedule is None:
        schedule = LinearNoiseScheduler()
        got, expected = "and alphas_cumprod are left out", "the training schedule"
        remedy = "pass it; DDPM's is assumed, linear from 0.0001 to 0.02 with T = 1000"
        warnings.warn(error_message(operation, "scheduler", got, expected, remedy), stacklevel=3)
    if prediction_type is None:
        prediction_type = getattr(getattr(scheduler, "config", None), "prediction_type", None) or "epsilon"
    if not isinstance(timesteps, Tensor):
        timesteps = torch.as_tensor(timesteps)
    return signal_to_noise_ratio(schedule, timesteps.reshape(-1)), prediction_type


def snr_loss(
    pred: Tensor,
    target: Tensor,
    noise: Tensor | None,
    timesteps: Tensor,
    gamma: float = 5.0,
    *,
    scheduler: Any = None,
    alphas_cumprod: Tensor | None = None,
    prediction_type: str | None = None,
    loss: str = "l2",
    huber_c: float = 0.001,
    reduction: str = "mean",
) -> Tensor:
    """Loss with min-SNR-γ weights (arXiv 2303.09556): see `fastdiff.training.weights.min_snr_weights`.

    Args:
        pred, target, reduction: as in `l2_loss`; `target` is what the prediction type says.
        noise: not used; the weights need the timesteps alone.
        timesteps: integers ``[B]``, or ``[1]`` for all samples.
        gamma: γ.
        scheduler: the training schedule: one of fastdiff or diffusers.
        alphas_cumprod: instead of it, ᾱ ``[T]``.  Without either, DDPM's linear schedule is assumed, with a warning.
        prediction_type: that of `scheduler.config` where None, and ``epsilon`` where there is none.
        loss, huber_c: ``l2``, ``l1`` or ``huber``.
    """
    snr, kind = _snr_of("snr_loss", timesteps, scheduler, alphas_cumprod, prediction_type)
    weights = min_snr_weights(snr, kind, gamma)
    return _weighted("snr_loss", pred, target, weights, loss, huber_c, reduction)


def p2_loss(
    pred: Tensor,
    target: Tensor,
    timesteps: Tensor,
    gamma: float = 1.0,
    k: float = 1.0,
    *,
    scheduler: Any = None,
    alphas_cumprod: Tensor | None = None,
    prediction_type: str | None = None,
    loss: str = "l2",
    huber_c: float = 0.001,
    reduction: str = "mean",
) -> Tensor:
    """Loss with P2 weights (arXiv 2204.00227): see `fastdiff.training.weights.p2_weights`; others as in `snr_loss`."""
    snr, kind = _snr_of("p2_loss", timesteps, scheduler, alphas_cumprod, prediction_type)
    return _weighted("p2_loss", pred, target, p2_weights(snr, kind, gamma, k), loss, huber_c, reduction)


def debiased_loss(
    pred: Tensor,
    target: Tensor,
    timesteps: Tensor,
    *,
    scheduler: Any = None,
    alphas_cumprod: Tensor | None = None,
    prediction_type: str | None = None,
    loss: str = "l2",
    huber_c: float = 0.001,
    reduction: str = "mean",
) -> Tensor:
    """Loss with debiased weights (arXiv 2310.08442): see `fastdiff.training.weights.debiased_weights`.

    Arguments as in `snr_loss`.
    """
    snr, kind = _snr_of("debiased_loss", timesteps, scheduler, alphas_cumprod, prediction_type)
    return _weighted("debiased_loss", pred, target, debiased_weights(snr, kind), loss, huber_c, reduction)


def _weighted(
    operation: str, pred: Tensor, target: Tensor, weights: Tensor, loss: str, c: float, reduction: str
) -> Tensor:
    residual = _residual(operation, pred, target)
    if len(weights) == 1:
        weights = weights.expand(len(residual))
    return _reduced(operation, _values(operation, residual, loss, c), weights, reduction)


def v_prediction_loss(
    pred: Tensor,
    target: Tensor,
    alpha_bar: Tensor | float,
    noise: Tensor | None = None,
    *,
    weights: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Mean squared error of v = √ᾱ·ε − √(1 − ᾱ)·x0 (Salimans & Ho 2022, arXiv 2202.00512, appendix D).

    Args:
        pred: the model's velocity ``[B, ...]``.
        target: with `noise` the clean sample x0, of which v is made; without it v itself, and `alpha_bar` is checked
            and not used.
        alpha_bar: ᾱ at the samples' timesteps, in [0, 1]: a number, ``[B]``, or a shape that broadcasts, ``[B, 1, …]``.
        noise: ε, like `target`.
        weights, reduction: as in `l2_loss`.
    """
    operation = "v_prediction_loss"
    signal = _alpha_bar(operation, pred, alpha_bar)
    if noise is not None:
        _residual(operation, pred, target)  # for its checks
        check_floating(operation, "noise", noise)
        if noise.shape != target.shape:
            got, remedy = f"has shape {list(noise.shape)}", "pass the noise of the noisy samples"
            raise ValueError(error_message(operation, "noise", got, f"{list(target.shape)} like target", remedy))
        signal = signal.to(compute_dtype(pred.dtype, target.dtype, noise.dtype))
        target = signal.sqrt() * noise.to(signal) - (1 - signal).sqrt() * target.to(signal)
    residual = _residual(operation, pred, target)
    return _reduced(operation, residual**2, weights, reduction)


def _alpha_bar(operation: str, pred: Tensor, given: Tensor | float) -> Tensor:
    """Return ᾱ in a shape that multiplies the samples, in float64."""
    signal = torch.as_tensor(given, dtype=torch.float64, device=pred.device)
    if signal.dim() == 1 and pred.dim() > 1:
        signal = signal.reshape(-1, *[1] * (pred.dim() - 1))
    sides = tuple(signal.shape)
    if signal.dim() > pred.dim() or any(
        one not in (1, other) for one, other in zip(sides[::-1], pred.shape[::-1], strict=False)
    ):
        got, remedy = f"has shape {list(sides)}", "pass alphas_cumprod[timesteps]"
        raise ValueError(error_message(operation, "alpha_bar", got, f"a number or [{pred.shape[0]}]", remedy))
    if signal.device.type == "cpu" and not bool(((signal >= 0) & (signal <= 1)).all()):
        got, remedy = f"spans {float(signal.min()):g} to {float(signal.max()):g}", "pass ᾱ, not its root"
        raise ValueError(error_message(operation, "alpha_bar", got, "values in [0, 1]", remedy))
    return signal


class AdvancedLossFunctions:
    """The losses of this module as static methods."""

    l2_loss = staticmethod(l2_loss)
    l1_loss = staticmethod(l1_loss)
    huber_loss = staticmethod(huber_loss)
    snr_loss = staticmethod(snr_loss)
    p2_loss = staticmethod(p2_loss)
    debiased_loss = staticmethod(debiased_loss)
    v_prediction_loss = staticmethod(v_prediction_loss)
    vlb_loss = staticmethod(vlb_loss)
