# SPDX-License-Identifier: MIT
"""Noise schedules as pure functions: the β_t of each kind, and the way from ᾱ_t back to β_t.

Every function returns float64 ``[num_train_timesteps]`` on the CPU, whatever torch's default device and dtype are.
β_t is the variance that step t of the forward process adds, α_t = 1 − β_t, and ᾱ_t = Π_{s ≤ t} α_s.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import error_message

MAX_BETA = 0.999
KARRAS_SIGMA_MIN, KARRAS_SIGMA_MAX, KARRAS_RHO = 0.002, 80.0, 7.0


def _line(start: float, end: float, count: int) -> Tensor:
    return torch.linspace(start, end, count, dtype=torch.float64, device="cpu")


def linear(num_train_timesteps: int, beta_start: float, beta_end: float) -> Tensor:
    """A line from ``beta_start`` to ``beta_end``: Ho et al. 2020 (arXiv 2006.11239, section 4)."""
    return _line(beta_start, beta_end, num_train_timesteps)


def scaled_linear(num_train_timesteps: int, beta_start: float, beta_end: float) -> Tensor:
    """The squares of a line from √beta_start to √beta_end: latent diffusion, and ``scaled_linear`` of diffusers.

    The schedule known as ``quadratic`` is the same formula under another name.
    """
    return _line(math.sqrt(beta_start), math.sqrt(beta_end), num_train_timesteps) ** 2


def linear_rescaled(num_train_timesteps: int, beta_start: float, beta_end: float) -> Tensor:
    """A line whose ends are multiplied by 1000/T, so that ᾱ_{T−1} hardly depends on T.

    From the code of Nichol & Dhariwal 2021 (arXiv 2102.09672); some call this one "scaled linear".

    Raises:
        ValueError: so few timesteps that the last β would reach 1.
    """
    scale = 1000 / num_train_timesteps
    if beta_end * scale >= 1:
        raise ValueError(
            error_message(
                "linear_rescaled",
                "num_train_timesteps",
                f"is {num_train_timesteps}, which makes the last beta {beta_end * scale:g}",
                "every beta below 1",
                f"use {math.floor(1000 * beta_end) + 1} timesteps or more, or a smaller beta_end",
            )
        )
    return linear(num_train_timesteps, beta_start * scale, beta_end * scale)


def sigmoid(num_train_timesteps: int, beta_start: float, beta_end: float) -> Tensor:
    """``beta_start + (beta_end − beta_start)·sigmoid(x)``, x on a line from −6 to 6: GeoDiff (arXiv 2203.02923)."""
    return beta_start + (beta_end - beta_start) * torch.sigmoid(_line(-6.0, 6.0, num_train_timesteps))


def exponential(num_train_timesteps: int, beta_start: float, beta_end: float) -> Tensor:
    """A line in log β from ``beta_start`` to ``beta_end``.

    Not the ``"exp"`` transform of diffusers, which sets ᾱ(u) = e^(−12u).
    """
    return torch.exp(_line(math.log(beta_start), math.log(beta_end), num_train_timesteps))


def _from_alpha_bar(num_train_timesteps: int, alpha_bar: Callable[[Tensor], Tensor]) -> Tensor:
    """β_i = min(1 − ᾱ((i + 1)/T)/ᾱ(i/T), .999), for ᾱ given as a function of u in [0, 1]."""
    u = torch.arange(num_train_timesteps + 1, dtype=torch.float64, device="cpu") / num_train_timesteps
    values = alpha_bar(u)
    return (1 - values[1:] / values[:-1]).clamp(0.0, MAX_BETA)


def cosine(num_train_timesteps: int) -> Tensor:
    """ᾱ(u) = cos²(π/2·(u + s)/(1 + s)), s = .008, β at most .999: arXiv 2102.09672, eq. 17."""
    return _from_alpha_bar(num_train_timesteps, lambda u: torch.cos((u + 0.008) / 1.008 * (math.pi / 2)) ** 2)


def laplace(num_train_timesteps: int) -> Tensor:
    """λ(u) = −½·sign(½ − u)·log(1 − 2|½ − u| + 1e-6), Hang et al. 2024 (arXiv 2407.03297), β at most .999.

    As in diffusers, SNR = e^λ and ᾱ(u) = √(SNR/(1 + SNR)): the root of what SNR means elsewhere, kept so that
    models trained there find their schedule here. The first β is taken relative to ᾱ(0) < 1.
    """

    def alpha_bar(u: Tensor) -> Tensor:
        distance = 0.5 - u
        # copysign, not sign: at u = ½ the formula takes the sign of +0.
        side = torch.copysign(torch.ones_like(u), distance)
        return torch.sigmoid(-0.5 * side * torch.log(1 - 2 * distance.abs() + 1e-6)).sqrt()

    return _from_alpha_bar(num_train_timesteps, alpha_bar)


def karras_alphas_cumprod(num_train_timesteps: int) -> Tensor:
    """ᾱ = 1/(1 + σ²) for σ evenly spaced in σ^(1/7) from .002 up to 80: arXiv 2206.00364, eq. 5 and table 1."""
    low, high = KARRAS_SIGMA_MIN ** (1 / KARRAS_RHO), KARRAS_SIGMA_MAX ** (1 / KARRAS_RHO)
    return 1 / (1 + _line(low, high, num_train_timesteps) ** (2 * KARRAS_RHO))


def betas_from_alphas_cumprod(alphas_cumprod: Tensor) -> Tensor:
    """β_0 = 1 − ᾱ_0 and β_t = 1 − ᾱ_t/ᾱ_{t−1}; β_t = 1 once ᾱ_{t−1} is 0.

    Args:
        alphas_cumprod: float64 ``[T]``, not ascending, within [0, 1].
    """
    before = torch.cat([torch.ones_like(alphas_cumprod[:1]), alphas_cumprod[:-1]])
    # 0/0 after the signal is gone is NaN: any α would do there, and 0 says that the signal stays gone.
    return (1 - alphas_cumprod / before).nan_to_num(nan=1.0)


def rescale_zero_terminal_snr(alphas_cumprod: Tensor) -> Tensor:
    """Shift and scale √ᾱ so that the last timestep carries no signal and the first keeps what it has.

    Lin et al. 2023 (arXiv 2305.08891, algorithm 1), on ᾱ rather than on β: √ᾱ'_t = √ᾱ_0·(√ᾱ_t − √ᾱ_{T−1}) /
    (√ᾱ_0 − √ᾱ_{T−1}). The ends hold exactly: ᾱ'_{T−1} = 0 and ᾱ'_0 = ᾱ_0.

    Args:
        alphas_cumprod: ``[T]``, any real dtype, not ascending, within [0, 1], T ≥ 2.

    Returns:
        float64 ``[T]`` on the device of ``alphas_cumprod``.

    Raises:
        TypeError: not a real floating-point tensor.
        ValueError: another shape, values out of range or ascending, or as much signal at the end as at the start.
    """
    operation, argument = "rescale_zero_terminal_snr", "alphas_cumprod"
    check_floating(operation, argument, alphas_cumprod)
    if alphas_cumprod.dim() != 1 or alphas_cumprod.numel() < 2:
        got = f"has shape {list(alphas_cumprod.shape)}"
        raise ValueError(
            error_message(operation, argument, got, "[T] with T of at least 2", "pass one value per timestep")
        )
    check_alphas_cumprod(operation, argument, alphas_cumprod)
    roots = alphas_cumprod.to(torch.float64).sqrt()
    first, last = roots[0], roots[-1]
    if bool(first == last):
        raise ValueError(
            error_message(
                operation,
                argument,
                "is the same at both ends",
                "a schedule that loses signal",
                "use more timesteps or larger betas, or leave out rescale_betas_zero_snr",
            )
        )
    rescaled = ((roots - last) * (first / (first - last))) ** 2
    # Rounding would move the first value by an ulp, and with it values that equal it.
    start = alphas_cumprod[0].to(torch.float64)
    return torch.cat([start.reshape(1), torch.minimum(rescaled[1:], start)])


def check_floating(operation: str, argument: str, value: object) -> None:
    """Refuse what is not a tensor of real floating-point numbers.

    Raises:
        TypeError: naming the type or dtype it has.
    """
    if not isinstance(value, Tensor) or not value.is_floating_point():
        got = f"has dtype {value.dtype}" if isinstance(value, Tensor) else f"has type {type(value).__name__}"
        remedy = f"convert {argument} to a float tensor"
        raise TypeError(error_message(operation, argument, got, "a floating-point tensor", remedy))


def check_alphas_cumprod(operation: str, argument: str, values: Tensor) -> None:
    """Refuse values outside [0, 1], NaN, and any that are above the one before.

    Raises:
        ValueError: naming the first offender.
    """
    outside = ~((values >= 0) & (values <= 1))
    if bool(outside.any()):
        at = int(outside.nonzero()[0])
        raise ValueError(
            error_message(
                operation,
                f"{argument}[{at}]",
                f"is {float(values[at])!r}",
                "values in [0, 1]",
                "pass the running product of 1 − beta",
            )
        )
    rising = values[1:] > values[:-1]
    if bool(rising.any()):
        at = int(rising.nonzero()[0]) + 1
        raise ValueError(
            error_message(
                operation,
                f"{argument}[{at}]",
                f"is {float(values[at])!r}, above the value before",
                "values that never rise with the timestep",
                "order them from clean to noisy",
            )
        )
