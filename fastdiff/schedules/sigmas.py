# SPDX-License-Identifier: MIT
"""Noise levels for own loops: n + 1 descending sigmas that end at 0, under the names of k-diffusion and ComfyUI.

Each function computes in float64 on the CPU and returns ``[n + 1]`` in `dtype` on `device`.  σ is the level of
x0 + σ·ε; the schedules from linear_quadratic on, with σ from 1 to 0, are those of flow models, whose σ is the time of
(1 − σ)·x0 + σ·ε.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import checked_float, checked_integer, error_message, require, unknown_name
from .timesteps import sigma_schedule

#: Published schedules of 10 steps, from the most noise down (Align Your Steps, arXiv 2404.14507, and its project page).
ALIGN_YOUR_STEPS: dict[str, tuple[float, ...]] = {
    "sd1": (
        14.6146412293, 6.4745760956, 3.8636745985, 2.6946151520, 1.8841921177, 1.3943805092, 0.9642583904, 0.6523686016,
        0.3977456272, 0.1515232662, 0.0291671582,
    ),
    "sdxl": (
        14.6146412293, 6.3184485287, 3.7681790315, 2.1811480769, 1.3405244945, 0.8620721141, 0.5550693289, 0.3798540708,
        0.2332364134, 0.1114188177, 0.0291671582,
    ),
    "svd": (700.0, 54.5, 15.886, 7.977, 4.248, 1.789, 0.981, 0.403, 0.173, 0.034, 0.002),
}  # fmt: skip

Device = torch.device | str


def append_zero(sigmas: Tensor) -> Tensor:
    """Return the levels ``[n]`` with a 0 at the end, ``[n + 1]``."""
    return torch.cat([sigmas, sigmas.new_zeros(1)])


def get_sigmas_karras(
    n: int,
    sigma_min: float,
    sigma_max: float,
    rho: float = 7.0,
    device: Device = "cpu",
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Return levels evenly spaced in σ^(1/ρ), then 0 (arXiv 2206.00364, eq. 5)."""
    return append_zero(sigma_schedule("karras", n, sigma_min, sigma_max, rho=rho)).to(device, dtype)


def get_sigmas_exponential(
    n: int, sigma_min: float, sigma_max: float, device: Device = "cpu", dtype: torch.dtype = torch.float64
) -> Tensor:
    """Return levels evenly spaced in log σ, then 0."""
    return append_zero(sigma_schedule("exponential", n, sigma_min, sigma_max)).to(device, dtype)


def get_sigmas_lu(
    n: int, sigma_min: float, sigma_max: float, device: Device = "cpu", dtype: torch.dtype = torch.float64
) -> Tensor:
    """Return levels evenly spaced in λ = −log σ, then 0 (arXiv 2206.00927): those of `get_sigmas_exponential`."""
    return append_zero(sigma_schedule("lu", n, sigma_min, sigma_max)).to(device, dtype)


def get_sigmas_polyexponential(
    n: int,
    sigma_min: float,
    sigma_max: float,
    rho: float = 1.0,
    device: Device = "cpu",
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Return levels whose log σ falls from log σ_max to log σ_min as (1 − i/(n − 1))^ρ, then 0 (k-diffusion)."""
    low, high = _range("get_sigmas_polyexponential", n, sigma_min, sigma_max)
    power = checked_float("get_sigmas_polyexponential", "rho", rho, 0.0, strict=True)
    ramp = torch.linspace(1.0, 0.0, n, dtype=torch.float64) ** power
    sigmas = torch.exp(ramp * (math.log(high) - math.log(low)) + math.log(low))
    return _finished("get_sigmas_polyexponential", append_zero(sigmas), device, dtype)


def get_sigmas_vp(
    n: int,
    beta_d: float = 19.9,
    beta_min: float = 0.1,
    eps_s: float = 1e-3,
    device: Device = "cpu",
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Return σ(t) = √(e^(β_d·t²/2 + β_min·t) − 1) at n times from 1 to ε_s, then 0 (arXiv 2011.13456, appendix C)."""
    checked_integer("get_sigmas_vp", "n", n, 1)
    t = torch.linspace(1.0, checked_float("get_sigmas_vp", "eps_s", eps_s, 0.0, strict=True), n, dtype=torch.float64)
    sigmas = torch.sqrt(torch.expm1(0.5 * beta_d * t**2 + beta_min * t))
    return _finished("get_sigmas_vp", append_zero(sigmas), device, dtype)


def get_sigmas_laplace(
    n: int,
    sigma_min: float,
    sigma_max: float,
    mu: float = 0.0,
    beta: float = 0.5,
    device: Device = "cpu",
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Return quantiles of a Laplace distribution of log σ, held in [σ_min, σ_max], then 0 (arXiv 2407.03297).

    ``log σ = μ − β·sign(½ − x)·log(1 − 2·|½ − x| + 1e-5)`` at n even x from 0 to 1.
    """
    low, high = _range("get_sigmas_laplace", n, sigma_min, sigma_max)
    x = torch.linspace(0.0, 1.0, n, dtype=torch.float64)
    log_sigmas = mu - beta * torch.sign(0.5 - x) * torch.log(1.0 - 2.0 * (0.5 - x).abs() + 1e-5)
    return _finished("get_sigmas_laplace", append_zero(log_sigmas.exp().clamp(low, high)), device, dtype)


def get_sigmas_kl_optimal(
    n: int, sigma_min: float, sigma_max: float, device: Device = "cpu", dtype: torch.dtype = torch.float64
) -> Tensor:
    """Return levels evenly spaced in atan σ, then 0 (Align Your Steps, arXiv 2404.14507, theorem 3.1)."""
    low, high = _range("get_sigmas_kl_optimal", n, sigma_min, sigma_max)
    sigmas = torch.linspace(math.atan(high), math.atan(low), n, dtype=torch.float64).tan()
    return _finished("get_sigmas_kl_optimal", append_zero(sigmas), device, dtype)


def get_sigmas_normal(
    n: int, training_sigmas: Tensor | Sequence[float], device: Device = "cpu", dtype: torch.dtype = torch.float64
) -> Tensor:
    """Return σ at n timesteps evenly spaced from T − 1 to 0, log σ interpolated, then 0.

    Args:
        n: the number of steps.
        training_sigmas: σ of the timesteps 0 … T − 1, ``[T]``, ascending, such as `EpsilonDenoiser.sigmas`.
        device, dtype: of the result.
    """
    table = _training("get_sigmas_normal", n, training_sigmas)
    times = torch.linspace(len(table) - 1, 0.0, n, dtype=torch.float64)
    return _finished("get_sigmas_normal", append_zero(_at_times(table, times)), device, dtype)


def get_sigmas_sgm_uniform(
    n: int, training_sigmas: Tensor | Sequence[float], device: Device = "cpu", dtype: torch.dtype = torch.float64
) -> Tensor:
    """Return σ at the first n of n + 1 timesteps evenly spaced from T − 1 to 0, then 0.

    Args:
        n, training_sigmas, device, dtype: as in `get_sigmas_normal`.
    """
    table = _training("get_sigmas_sgm_uniform", n, training_sigmas)
    times = torch.linspace(len(table) - 1, 0.0, n + 1, dtype=torch.float64)[:-1]
    return _finished("get_sigmas_sgm_uniform", append_zero(_at_times(table, times)), device, dtype)


def get_sigmas_simple(
    n: int, training_sigmas: Tensor | Sequence[float], device: Device = "cpu", dtype: torch.dtype = torch.float64
) -> Tensor:
    """Return σ of the training timesteps T − 1 − ⌊i·T/n⌋, then 0.

    Args:
        n, training_sigmas, device, dtype: as in `get_sigmas_normal`.
    """
    table = _training("get_sigmas_simple", n, training_sigmas)
    picked = [len(table) - 1 - int(i * (len(table) / n)) for i in range(n)]
    return _finished("get_sigmas_simple", append_zero(table[picked]), device, dtype)


def get_sigmas_ddim_uniform(
    n: int, training_sigmas: Tensor | Sequence[float], device: Device = "cpu", dtype: torch.dtype = torch.float64
) -> Tensor:
    """Return σ of the training timesteps 1, 1 + ⌊T/n⌋, 1 + 2·⌊T/n⌋ …, descending, then 0.

    Where n does not divide T there may be more than n steps.

    Args:
        n, training_sigmas, device, dtype: as in `get_sigmas_normal`.
    """
    table = _training("get_sigmas_ddim_uniform", n, training_sigmas)
    sigmas = table[1 :: max(len(table) // n, 1)].flip(0)
    return _finished("get_sigmas_ddim_uniform", append_zero(sigmas), device, dtype)


def get_sigmas_beta(
    n: int,
    training_sigmas: Tensor | Sequence[float],
    alpha: float = 0.6,
    beta: float = 0.6,
    device: Device = "cpu",
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Return σ at n quantiles of the Beta distribution over the training timesteps, then 0 (arXiv 2407.12173).

    Timesteps are rounded, and one that repeats is left out, so that there may be fewer than n steps.

    Args:
        n, training_sigmas, device, dtype: as in `get_sigmas_normal`.
        alpha, beta: of the distribution.

    Raises:
        ImportError: scipy is not installed.
    """
    table = _training("get_sigmas_beta", n, training_sigmas)
    stats = require("scipy.stats", "spacings", "get_sigmas_beta")
    quantiles = stats.beta.ppf([1.0 - i / n for i in range(n)], alpha, beta)
    times = list(dict.fromkeys(round(float(q) * (len(table) - 1)) for q in quantiles))
    return _finished("get_sigmas_beta", append_zero(table[times]), device, dtype)


def get_sigmas_align_your_steps(
    n: int, model: str = "sd1", device: Device = "cpu", dtype: torch.dtype = torch.float64
) -> Tensor:
    """Return a published schedule of Align Your Steps (arXiv 2404.14507), interpolated in log σ, its last level 0.

    Args:
        n: the number of steps; 10 gives the table itself.
        model: ``sd1``, ``sdxl`` or ``svd``.
        device, dtype: of the result.
    """
    if model not in ALIGN_YOUR_STEPS:
        raise unknown_name("get_sigmas_align_your_steps", "model", model, ALIGN_YOUR_STEPS)
    checked_integer("get_sigmas_align_your_steps", "n", n, 1)
    published = torch.tensor(ALIGN_YOUR_STEPS[model], dtype=torch.float64)
    sigmas = _at_times(published, torch.linspace(0.0, len(published) - 1, n + 1, dtype=torch.float64))
    sigmas[-1] = 0.0
    return _finished("get_sigmas_align_your_steps", sigmas, device, dtype)


def get_sigmas_linear_quadratic(
    n: int,
    sigma_max: float = 1.0,
    threshold_noise: float = 0.025,
    linear_steps: int | None = None,
    device: Device = "cpu",
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Return levels that fall linearly by `threshold_noise`, then quadratically to 0 (Mochi's schedule).

    The quadratic part joins the linear one with the same slope.

    Args:
        n: the number of steps.
        sigma_max: the first level.
        threshold_noise: the fall of the linear part, as a part of `sigma_max`.
        linear_steps: steps of the linear part; half of n where None.
        device, dtype: of the result.
    """
    checked_integer("get_sigmas_linear_quadratic", "n", n, 1)
    linear = (
        n // 2
        if linear_steps is None
        else checked_integer("get_sigmas_linear_quadratic", "linear_steps", linear_steps, 1)
    )
    if n == 1:
        return torch.tensor([sigma_max, 0.0], dtype=dtype, device=device)
    slope = threshold_noise / linear
    # fall(k) of k steps past the join: threshold + slope·k + bend·k², with fall = 1 at the end.
    rest = n - linear
    bend = (1.0 - threshold_noise - slope * rest) / rest**2
    falls = [slope * i for i in range(linear)]
    falls += [threshold_noise + slope * k + bend * k * k for k in range(rest)]
    sigmas = torch.tensor([*(1.0 - fall for fall in falls), 0.0], dtype=torch.float64) * sigma_max
    return _finished("get_sigmas_linear_quadratic", sigmas, device, dtype)


def get_sigmas_bong_tangent(
    n: int,
    sigma_max: float = 1.0,
    pivot_1: float = 0.6,
    pivot_2: float = 0.6,
    slope_1: float = 0.2,
    slope_2: float = 0.2,
    device: Device = "cpu",
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Return two arctangent curves, from σ_max to half of it and from there to 0 (RES4LYF's ``bong_tangent``).

    Args:
        n: the number of steps.
        sigma_max: the first level.
        pivot_1, pivot_2: the steepest point of each curve, as a part of all steps; their mean is where they join.
        slope_1, slope_2: the steepness of each for 40 steps.
        device, dtype: of the result.
    """
    checked_integer("get_sigmas_bong_tangent", "n", n, 1)
    total = n + 2
    join = int((total * pivot_1 + total * pivot_2) / 2)

    def curve(count: int, slope: float, pivot: int, start: float, end: float) -> list[float]:
        heights = [math.atan(-slope * 40.0 / total * (i - pivot)) for i in range(count)]
        span = heights[0] - heights[-1]
        return [end + (start - end) * (height - heights[-1]) / span for height in heights]

    upper = curve(join, slope_1, int(total * pivot_1), sigma_max, 0.5 * sigma_max) if join > 1 else [sigma_max] * join
    lower = curve(total - join, slope_2, int(total * pivot_2) - join, 0.5 * sigma_max, 0.0)
    sigmas = torch.tensor([*upper[:-1], *lower], dtype=torch.float64)
    return _finished("get_sigmas_bong_tangent", sigmas, device, dtype)


def get_sigmas_logit_normal(
    n: int, mean: float = 0.0, std: float = 1.0, device: Device = "cpu", dtype: torch.dtype = torch.float64
) -> Tensor:
    """Return n + 1 even quantiles of a logit-normal distribution, from 1 to 0 (arXiv 2403.03206, eq. 19).

    Args:
        n: the number of steps.
        mean, std: of logit σ; std above 0.
        device, dtype: of the result.
    """
    checked_integer("get_sigmas_logit_normal", "n", n, 1)
    checked_float("get_sigmas_logit_normal", "std", std, 0.0, strict=True)
    quantiles = torch.linspace(1.0, 0.0, n + 1, dtype=torch.float64)
    sigmas = torch.sigmoid(mean + std * torch.special.ndtri(quantiles))
    return _finished("get_sigmas_logit_normal", sigmas, device, dtype)


def get_sigmas_flow(
    n: int,
    shift: float = 1.0,
    mu: float | None = None,
    device: Device = "cpu",
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Return n + 1 even times from 1 to 0, shifted by `flow_shift`, or by `flow_shift_dynamic` where `mu` is given."""
    checked_integer("get_sigmas_flow", "n", n, 1)
    times = torch.linspace(1.0, 0.0, n + 1, dtype=torch.float64)
    shifted = flow_shift(times, shift) if mu is None else flow_shift_dynamic(times, mu)
    return _finished("get_sigmas_flow", shifted, device, dtype)


def flow_shift(sigmas: Tensor, shift: float) -> Tensor:
    """Return ``shift·σ/(1 + (shift − 1)·σ)``, more steps at high noise for a shift above 1 (2403.03206, eq. 23)."""
    checked_float("flow_shift", "shift", shift, 0.0, strict=True)
    return shift * sigmas / (1.0 + (shift - 1.0) * sigmas)


def flow_shift_dynamic(sigmas: Tensor, mu: float, power: float = 1.0) -> Tensor:
    """Return ``e^μ/(e^μ + (1/σ − 1)^power)``: Flux's shift, equal to `flow_shift` by e^μ where `power` is 1."""
    checked_float("flow_shift_dynamic", "mu", mu, -math.inf)
    return math.exp(mu) / (math.exp(mu) + (1.0 / sigmas - 1.0) ** power)


def flow_mu(
    tokens: int,
    base_tokens: int = 256,
    max_tokens: int = 4096,
    base_shift: float = 0.5,
    max_shift: float = 1.15,
) -> float:
    """Return Flux's μ for an image of `tokens` latent patches, linear between (256, 0.5) and (4096, 1.15).

    An image of 1024×1024 pixels has (1024/16)² = 4096 patches.
    """
    slope = (max_shift - base_shift) / (max_tokens - base_tokens)
    return base_shift + slope * (tokens - base_tokens)


def _range(operation: str, n: int, sigma_min: float, sigma_max: float) -> tuple[float, float]:
    """Check a number of steps and a range of levels."""
    checked_integer(operation, "n", n, 1)
    low = checked_float(operation, "sigma_min", sigma_min, 0.0, strict=True)
    return low, checked_float(operation, "sigma_max", sigma_max, low, strict=n > 1)


def _training(operation: str, n: int, training_sigmas: Tensor | Sequence[float]) -> Tensor:
    """Return the training levels in float64 on the CPU."""
    table = torch.as_tensor(training_sigmas, dtype=torch.float64).detach().cpu()
    checked_integer(operation, "n", n, 1)
    if table.dim() != 1 or len(table) < 2 or not bool(table[0] > 0.0) or bool((table.diff() <= 0.0).any()):
        raise ValueError(
            error_message(
                operation,
                "training_sigmas",
                f"has shape {list(table.shape)} and is not ascending from above 0",
                "[T] ascending levels",
                "pass sqrt((1 - alphas_cumprod) / alphas_cumprod)",
            )
        )
    if n > len(table):
        raise ValueError(
            error_message(operation, "n", f"is {n}", f"at most the {len(table)} training levels", "take fewer steps")
        )
    return table


def _at_times(table: Tensor, times: Tensor) -> Tensor:
    """Interpolate the logarithm of a table linearly at fractional indices."""
    low = times.floor().long().clamp(0, len(table) - 2)
    logs = table.log()
    return torch.lerp(logs[low], logs[low + 1], times - low).exp()


def _finished(operation: str, sigmas: Tensor, device: Device, dtype: torch.dtype) -> Tensor:
    """Check that levels descend, and convert them."""
    if bool((sigmas.diff() >= 0.0).any()) or not bool(torch.isfinite(sigmas).all()):
        raise ValueError(
            error_message(
                operation,
                "n",
                f"gives levels that do not descend: {[round(value, 6) for value in sigmas.tolist()[:8]]} …",
                "levels that differ",
                "take fewer steps or other options",
            )
        )
    return sigmas.to(device, dtype)
