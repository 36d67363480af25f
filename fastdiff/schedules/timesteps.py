# SPDX-License-Identifier: MIT
"""The training timesteps, or the noise levels, that a sampler visits.

Two families, both computed on the CPU and both descending, from pure noise to the clean end:

- :func:`timestep_schedule` picks integers among the ``num_train_timesteps`` that a model was trained on;
- :func:`sigma_schedule` picks noise levels σ in the variance-exploding sense, σ = √((1 − ᾱ)/ᾱ).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..errors import checked_float, checked_integer, error_message, require, unknown_name

TIMESTEP_SPACINGS: tuple[str, ...] = ("leading", "linspace", "trailing", "cosine")
FLOW_SPACINGS: tuple[str, ...] = ("linspace", "trailing")
SIGMA_SPACINGS: tuple[str, ...] = ("karras", "exponential", "beta", "lu")

_COSINE_OFFSET = 0.008


def timestep_schedule(
    spacing: str, num_inference_steps: int, num_train_timesteps: int, steps_offset: int = 0
) -> Tensor:
    """Choose ``n = num_inference_steps`` of the ``T = num_train_timesteps`` training timesteps.

    The first three are those of Lin et al. 2023 (arXiv 2305.08891, table 2), with the rounding of diffusers'
    ``DDIMScheduler``, so that both visit the same timesteps:

    - ``"leading"``: ``i·(T // n) + steps_offset``. Never reaches T − 1 for 1 < n < T unless the offset takes it there.
    - ``"linspace"``: n evenly spaced numbers from 0 to T − 1, rounded; for n = 1 that is 0.
    - ``"trailing"``: ``round(T − i·T/n) − 1``. Always starts at T − 1.
    - ``"cosine"``: the integers nearest to ``(T − 1)·cos²(π/2·(i/(n − 1) + s)/(1 + s))`` with s = .008, the ᾱ of
      Nichol & Dhariwal 2021 (arXiv 2102.09672, eq. 17) used as a clock: dense at both ends, sparse in the middle.
      The formula falls a little short of T − 1 at i = 0 because s > 0, so both ends are pinned, to T − 1 and to 0
      (n = 1 gives T − 1). Where several numbers round to one timestep, those near T − 1 move down and those near 0
      move up, each to the nearest free timestep, so that the result is strictly descending for every 1 ≤ n ≤ T;
      for n = T it is every timestep.

    Args:
        spacing: one of :data:`TIMESTEP_SPACINGS`.
        num_inference_steps: how many timesteps to choose, 1 ≤ n ≤ T.
        num_train_timesteps: how many there are.
        steps_offset: added to the ``"leading"`` timesteps; as in diffusers, the other spacings have no use for it.

    Returns:
        int64 ``[n]`` on the CPU, strictly descending, within ``[0, T − 1]``.

    Raises:
        TypeError: a count is not an integer.
        ValueError: the spacing is unknown, a count is out of range, or the offset leads past T − 1.
    """
    operation = "timestep_schedule"
    if spacing not in TIMESTEP_SPACINGS:
        raise unknown_name(operation, "spacing", spacing, TIMESTEP_SPACINGS)
    total = checked_integer(operation, "num_train_timesteps", num_train_timesteps, 1)
    n = checked_integer(operation, "num_inference_steps", num_inference_steps, 1)
    offset = checked_integer(operation, "steps_offset", steps_offset, 0)
    if n > total:
        raise ValueError(
            error_message(
                operation,
                "num_inference_steps",
                f"is {n}",
                f"at most num_train_timesteps, {total}",
                "take fewer steps or use a sigma schedule",
            )
        )
    index = torch.arange(n, dtype=torch.float64, device="cpu")
    if spacing == "leading":
        stride = total // n
        first = (n - 1) * stride + offset
        if first > total - 1:
            raise ValueError(
                error_message(
                    operation,
                    "steps_offset",
                    f"is {offset}, which makes the first timestep {first}",
                    f"no timestep past {total - 1}",
                    f"lower steps_offset to {offset - (first - total + 1)} or less, or use spacing 'trailing'",
                )
            )
        return torch.arange(n - 1, -1, -1, dtype=torch.int64, device="cpu") * stride + offset
    if spacing == "linspace":
        # index · step rather than torch.linspace, which counts the upper half back from the end: the last bit
        # decides which way a tie rounds, and it should fall as it does in diffusers.
        values = index * ((total - 1) / max(n - 1, 1))
        return values.round().to(torch.int64).flip(0)
    if spacing == "trailing":
        # The stride as numpy.arange takes it, second value minus first: again the ties fall as in diffusers.
        stride_back = (total - total / n) - total
        return (index * stride_back + total).round().to(torch.int64) - 1
    if n == 1:
        return torch.tensor([total - 1], dtype=torch.int64, device="cpu")
    phase = (index / (n - 1) + _COSINE_OFFSET) / (1 + _COSINE_OFFSET)
    nearest = ((total - 1) * torch.cos(phase * (math.pi / 2)) ** 2).round().to(torch.int64)
    nearest[0], nearest[-1] = total - 1, 0
    # t strictly descends exactly where t_i + i does not ascend. Its bounds, n − 1 and T − 1, are the room that the
    # other timesteps need below and above; inside them the running minimum takes out what rounding put in.
    position = torch.arange(n, dtype=torch.int64, device="cpu")
    return (nearest + position).clamp(n - 1, total - 1).cummin(0).values - position


def sigma_schedule(
    spacing: str,
    num_inference_steps: int,
    sigma_min: float,
    sigma_max: float,
    *,
    rho: float = 7.0,
    alpha: float = 0.6,
    beta: float = 0.6,
) -> Tensor:
    """Choose ``num_inference_steps`` noise levels between two ends.

    - ``"karras"``: evenly spaced in σ^(1/ρ), Karras et al. 2022 (arXiv 2206.00364, eq. 5).
    - ``"exponential"``: evenly spaced in log σ.
    - ``"beta"``: σ_min + (σ_max − σ_min)·F⁻¹(1 − i/(n − 1)), F⁻¹ the quantile function of the Beta(alpha, beta)
      distribution, Lee et al. 2024 (arXiv 2407.12173). Needs scipy.
    - ``"lu"``: evenly spaced in λ = log(α/σ), Lu et al. 2022 (arXiv 2206.00927). With σ in the
      variance-exploding sense λ is −log σ, so these are the numbers of ``"exponential"``; both names are in use.

    Args:
        spacing: one of :data:`SIGMA_SPACINGS`.
        num_inference_steps: how many levels, at least 1; a single one is ``sigma_max``.
        sigma_min: the lowest level, above 0.
        sigma_max: the highest level; above ``sigma_min`` unless there is one level only.
        rho: the exponent of ``"karras"``, above 0; the other spacings have no use for it.
        alpha: first shape parameter of ``"beta"``, above 0.
        beta: second shape parameter of ``"beta"``, above 0.

    Returns:
        float64 ``[n]`` on the CPU, strictly descending from exactly ``sigma_max`` to exactly ``sigma_min``.

    Raises:
        TypeError: an argument is not a number.
        ValueError: the spacing is unknown, a number is NaN, infinite or out of range, or the levels lie too close
            together for float64 to tell them apart.
        ImportError: ``"beta"`` without scipy.
    """
    operation = "sigma_schedule"
    if spacing not in SIGMA_SPACINGS:
        raise unknown_name(operation, "spacing", spacing, SIGMA_SPACINGS)
    n = checked_integer(operation, "num_inference_steps", num_inference_steps, 1)
    low = checked_float(operation, "sigma_min", sigma_min, 0.0, strict=True)
    high = checked_float(operation, "sigma_max", sigma_max, 0.0, strict=True)
    exponent = checked_float(operation, "rho", rho, 0.0, strict=True)
    shape_a = checked_float(operation, "alpha", alpha, 0.0, strict=True)
    shape_b = checked_float(operation, "beta", beta, 0.0, strict=True)
    if n == 1:
        return torch.tensor([high], dtype=torch.float64, device="cpu")
    if low >= high:
        raise ValueError(
            error_message(
                operation,
                "sigma_min",
                f"is {low!r}",
                f"less than sigma_max, {high!r}",
                "swap the two or widen the range",
            )
        )
    sigmas: Tensor
    ramp = torch.linspace(0.0, 1.0, n, dtype=torch.float64, device="cpu")
    if spacing == "karras":
        root_low, root_high = low ** (1 / exponent), high ** (1 / exponent)
        sigmas = (root_high + ramp * (root_low - root_high)) ** exponent
    elif spacing == "beta":
        stats = require("scipy.stats", "spacings", "sigma_schedule with spacing 'beta'")
        quantiles: list[float] = stats.beta.ppf((1 - ramp).tolist(), shape_a, shape_b).tolist()
        sigmas = low + torch.tensor(quantiles, dtype=torch.float64, device="cpu") * (high - low)
    else:
        sigmas = torch.exp(math.log(high) + ramp * (math.log(low) - math.log(high)))
    # Powers and logarithms miss the ends by an ulp or so; the caller's numbers are meant.
    sigmas[0], sigmas[-1] = high, low
    if not bool((sigmas[1:] < sigmas[:-1]).all()):
        raise ValueError(
            error_message(
                operation,
                "num_inference_steps",
                f"is {n}, too many for levels from {high!r} to {low!r} with spacing {spacing!r}",
                "levels that differ in float64",
                "take fewer steps, widen the range or use milder rho, alpha and beta",
            )
        )
    return sigmas
