# SPDX-License-Identifier: MIT
"""Weights of the training loss over timesteps, from the signal-to-noise ratio S = α²/σ².

A paper weighs the error of one prediction.  The errors of the others follow from x_t = α·x0 + σ·ε, which the model
knows: with e = |ε − ε̂|² it is |x0 − x̂0|² = e/S, |v − v̂|² = e·(S + 1)/S (for α² + σ² = 1) and, for the velocity ε − x0,
e·(1 + 1/√S)².  A weight w of e is therefore w·S for x0, w·S/(S + 1) for v and w/(1 + 1/√S)² for the velocity: all
prediction types train the same objective.

`fastdiff.ops.diffusion_loss` takes the weights as ``[B]``, one a sample, or ``[T]``, one a timestep.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...errors import checked_float, checked_type, error_message, unknown_name
from ...ops.forward_rows import ForwardScales, checked_timesteps, parse_target
from ..config_checks import LOSS_WEIGHTINGS

__all__ = ["debiased_weights", "min_snr_weights", "p2_weights", "signal_to_noise_ratio", "weight_table"]


def signal_to_noise_ratio(schedule: Any, t: Tensor | None = None) -> Tensor:
    """Return S = α²/σ² at timesteps, or at all of them.

    Args:
        schedule: a noise schedule of fastdiff, a scheduler of diffusers, or ᾱ ``[T]``, as in
            `fastdiff.ops.noise_and_target`.
        t: integer timesteps ``[B]``, 0 to T − 1; for a flow schedule also floats in [0, 1], which are σ.  None for all
            T.  Their range is checked on the CPU.

    Returns:
        float64, ``[B]`` on the device of `t`, or ``[T]`` on the CPU; infinite where σ is 0.

    Raises:
        TypeError: the schedule is none of these, or `t` is floating point on a schedule that is not a flow's.
        ValueError: a timestep is out of range.
    """
    operation = "signal_to_noise_ratio"
    scales = ForwardScales.of(operation, schedule)
    if t is None:
        t = torch.arange(scales.steps, dtype=torch.int64, device="cpu")
    checked_type(operation, "t", t, Tensor, "a torch.Tensor", "pass torch.tensor([t])")
    t = checked_timesteps(operation, t, scales)
    if t.is_floating_point():
        alpha, sigma = 1 - t.double(), t.double()
    else:
        alpha, sigma = scales.at(t)
    return (alpha / sigma) ** 2


def _of_target(weights: Tensor, snr: Tensor, prediction_type: object, operation: str) -> Tensor:
    """Turn weights of the error of ε into those of a prediction type."""
    target = parse_target(operation, prediction_type)
    if target == "epsilon":
        return weights
    if target == "sample":
        return weights * snr
    if target == "v_prediction":
        return weights / (1 + 1 / snr)
    return weights / (1 + snr**-0.5) ** 2


def min_snr_weights(snr: Tensor, prediction_type: str = "epsilon", gamma: float = 5.0) -> Tensor:
    """Min-SNR-γ (Hang et al. 2023, arXiv 2303.09556, section 3.4).

    min(S, γ)/S for ε, min(S, γ)/(S + 1) for v, min(S, γ) for x0.

    Args:
        snr: S, any shape and floating dtype, from `signal_to_noise_ratio`.
        prediction_type: as in `fastdiff.ops.noise_and_target`.
        gamma: γ, above 0.

    Returns:
        The weights, like `snr`.
    """
    checked_float("min_snr_weights", "gamma", gamma, 0.0, strict=True)
    if parse_target("min_snr_weights", prediction_type) == "sample":
        return snr.clamp(max=gamma)
    # γ/S is ∞ at S = 0 and 0 at S = ∞, where S/S would be NaN.
    return _of_target((gamma / snr).clamp(max=1.0), snr, prediction_type, "min_snr_weights")


def p2_weights(snr: Tensor, prediction_type: str = "epsilon", gamma: float = 1.0, k: float = 1.0) -> Tensor:
    """P2 (Choi et al. 2022, arXiv 2204.00227, section 3): 1/(k + S)^γ for ε.

    Args:
        snr, prediction_type: as in `min_snr_weights`.
        gamma: γ, at least 0.
        k: above 0.

    Returns:
        The weights, like `snr`.
    """
    checked_float("p2_weights", "gamma", gamma, 0.0)
    checked_float("p2_weights", "k", k, 0.0, strict=True)
    if parse_target("p2_weights", prediction_type) == "sample":
        # Not S/(k + S)^γ, which is ∞/∞ at S = ∞.
        return (k + snr) ** (1 - gamma) / (1 + k / snr)
    return _of_target((k + snr) ** -gamma, snr, prediction_type, "p2_weights")


def debiased_weights(snr: Tensor, prediction_type: str = "epsilon") -> Tensor:
    """Debiased estimation (Yu et al. 2023, arXiv 2310.08442): 1/√S for ε.

    Args:
        snr, prediction_type: as in `min_snr_weights`.

    Returns:
        The weights, like `snr`.
    """
    target = parse_target("debiased_weights", prediction_type)
    root = snr.sqrt()
    # Not √S/(S + 1), which is ∞/∞ at S = ∞.
    if target == "v_prediction":
        return 1 / (1 / root + root)
    if target == "flow_prediction":
        return 1 / (1 / root + 2 + root)
    return root if target == "sample" else 1 / root


def weight_table(
    schedule: Any,
    weighting: str,
    prediction_type: str = "epsilon",
    *,
    snr_gamma: float = 5.0,
    p2_gamma: float = 1.0,
    p2_k: float = 1.0,
) -> Tensor | None:
    """Return the weights of all timesteps under a weighting of `DiffusionConfig`.

    Args:
        schedule: as in `signal_to_noise_ratio`.
        weighting: ``min_snr``, ``p2``, ``debiased``, or ``uniform``.
        prediction_type: as in `fastdiff.ops.noise_and_target`.
        snr_gamma: γ of `min_snr_weights`.
        p2_gamma, p2_k: γ and k of `p2_weights`.

    Returns:
        float64 ``[T]`` on the CPU; None for uniform weights.

    Raises:
        ValueError: an unknown weighting, or a weight that is infinite or undefined, such as that of ε at a timestep
            without signal under ``debiased``.
    """
    operation = "weight_table"
    if weighting not in LOSS_WEIGHTINGS:
        raise unknown_name(operation, "weighting", weighting, LOSS_WEIGHTINGS)
    if weighting == "uniform":
        return None
    snr = signal_to_noise_ratio(schedule).cpu()
    if weighting == "min_snr":
        weights = min_snr_weights(snr, prediction_type, snr_gamma)
    elif weighting == "p2":
        weights = p2_weights(snr, prediction_type, p2_gamma, p2_k)
    else:
        weights = debiased_weights(snr, prediction_type)
    bad = ~weights.isfinite()
    if bool(bad.any()):
        at = int(bad.nonzero()[0])
        got = f"gives {float(weights[at])} at timestep {at}, where the signal-to-noise ratio is {float(snr[at]):g}"
        remedy = "use prediction_type='v_prediction' or weighting='min_snr'"
        raise ValueError(error_message(operation, "weighting", got, "finite weights", remedy))
    return weights
