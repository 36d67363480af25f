# SPDX-License-Identifier: MIT
"""The noise levels that a sampling loop visits: from a training schedule to what a solver reads.

A `Level` is one point of the path x = α·x0 + σ·ε with the model's time argument there.
`Levels` are n + 1 of them: the model is called at the first n, and the last is where the loop ends.
All of fastdiff keeps samples in the model's own coordinates (α·x0 + σ·ε), so no solver ever asks for its
model input to be rescaled; the k-diffusion family's x0 + σ̂·ε is the same thing divided by α.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ..errors import error_message


@dataclass(frozen=True)
class Level:
    """One noise level. α and σ are float64; `timestep` counts training steps and may be fractional."""

    timestep: float
    alpha: float
    sigma: float

    @property
    def half_log_snr(self) -> float:
        """λ = log(α/σ), from −inf (pure noise) to +inf (clean)."""
        if self.sigma == 0.0:
            return math.inf
        return math.log(self.alpha / self.sigma) if self.alpha > 0.0 else -math.inf

    @property
    def noise_ratio(self) -> float:
        """σ̂ = σ/α, the noise level of the variance-exploding form, from inf down to 0."""
        return self.sigma / self.alpha if self.alpha > 0.0 else math.inf


#: Finds the level of a given σ̂ = σ/α on the path, or of a given timestep.
Locate = Callable[[float], Level]


@dataclass(frozen=True)
class Levels:
    """n model calls' levels and the level where the loop ends, noise decreasing strictly.

    Args:
        points: the n + 1 levels.
        locate: finds the level of a σ̂ on their path.
        locate_timestep: finds the level of a timestep, where timesteps are a clock that runs down to 0 at the clean
            end; None where they are not.

    Raises:
        ValueError: there is no step, a level is not finite, or the noise does not fall from level to level.
    """

    points: tuple[Level, ...]
    locate: Locate
    locate_timestep: Locate | None = None

    def __post_init__(self) -> None:
        if len(self.points) < 2:
            raise ValueError(
                error_message(
                    "Levels", "points", f"has {len(self.points)} levels", "2 or more", "ask for at least one step"
                )
            )
        for i, point in enumerate(self.points):
            if not (math.isfinite(point.alpha) and math.isfinite(point.sigma) and point.alpha >= 0 <= point.sigma):
                raise ValueError(
                    error_message(
                        "Levels",
                        f"points[{i}]",
                        f"has alpha {point.alpha} and sigma {point.sigma}",
                        "finite values of 0 or more",
                        "check the noise schedule for NaN",
                    )
                )
        ratios = [point.noise_ratio for point in self.points]
        for i in range(1, len(ratios)):
            if not ratios[i] < ratios[i - 1]:
                raise ValueError(
                    error_message(
                        "Levels",
                        f"points[{i}]",
                        f"has the noise level {ratios[i]:.6g} after {ratios[i - 1]:.6g}",
                        "a smaller one than the level before it",
                        "give timesteps or sigmas in descending order without repeats",
                    )
                )

    def __len__(self) -> int:
        """The number of model calls, one less than the number of levels."""
        return len(self.points) - 1

    def __getitem__(self, index: int) -> Level:
        return self.points[index]

    def middle(self, t: Level, s: Level) -> Level:
        """Return the level halfway from t to s: halfway in the timestep, or in log σ̂ where timesteps are no clock."""
        if self.locate_timestep is not None:
            return self.locate_timestep(0.5 * (t.timestep + s.timestep))
        return self.locate(math.sqrt(t.noise_ratio * s.noise_ratio))

    def at_fraction(self, level: Level, fraction: float) -> Level:
        """Return the level at `fraction` of the time of `level`: of its timestep, or of σ̂ where timesteps are no clock.

        The clean level has time 0 and is returned itself.
        """
        if level.sigma == 0.0 or fraction == 1.0:
            return level
        if self.locate_timestep is not None:
            return self.locate_timestep(fraction * level.timestep)
        return self.locate(fraction * level.noise_ratio)

    @property
    def timesteps(self) -> list[float]:
        return [point.timestep for point in self.points[:-1]]

    @property
    def initial_scale(self) -> float:
        """The standard deviation of the first sample, for data of unit variance."""
        return math.hypot(self.points[0].alpha, self.points[0].sigma)


class VariancePreservingPath:
    """The path α² + σ² = 1 through the levels of a discrete training schedule.

    Between training timesteps log σ̂ is interpolated linearly in t, as k-diffusion and diffusers do.

    Args:
        alphas_cumprod: ᾱ, float64 ``[T]``, decreasing; the last may be 0 (zero terminal SNR).
    """

    def __init__(self, alphas_cumprod: torch.Tensor) -> None:
        self.alphas_cumprod: list[float] = alphas_cumprod.double().tolist()
        ratios = [math.sqrt((1.0 - a) / a) if a > 0.0 else math.inf for a in self.alphas_cumprod]
        self._log_ratios = [math.log(r) if r > 0.0 else -math.inf for r in ratios]

    def at_timestep(self, timestep: float) -> Level:
        """The level of a timestep in [0, T − 1], fractional ones interpolated."""
        last = len(self.alphas_cumprod) - 1
        if not 0.0 <= timestep <= last:
            raise ValueError(
                error_message(
                    "Levels", "timesteps", f"holds {timestep}", f"values from 0 to {last}", "stay on the schedule"
                )
            )
        low = min(int(timestep), last)
        weight = timestep - low
        if weight == 0.0:
            alpha_cumprod = self.alphas_cumprod[low]
            return Level(timestep, math.sqrt(alpha_cumprod), math.sqrt(1.0 - alpha_cumprod))
        # A zero-SNR end has no logarithm to interpolate: the level just before it is where the path ends.
        high = low + 1 if math.isfinite(self._log_ratios[low + 1]) else low
        log_ratio = (1.0 - weight) * self._log_ratios[low] + weight * self._log_ratios[high]
        return variance_preserving(math.exp(log_ratio), timestep)

    def at_ratio(self, ratio: float) -> Level:
        """The level of σ̂ = σ/α: exact in α and σ, its timestep interpolated and held inside the schedule."""
        if ratio <= 0.0:
            return Level(0.0, 1.0, 0.0)
        if math.isinf(ratio):
            return Level(float(len(self.alphas_cumprod) - 1), 0.0, 1.0)
        wanted = math.log(ratio)
        high = bisect.bisect_left(self._log_ratios, wanted)
        if high == 0:
            timestep = 0.0
        elif high == len(self._log_ratios) or math.isinf(self._log_ratios[high]):
            timestep = float(high - 1)
        else:
            low = self._log_ratios[high - 1]
            timestep = high - 1 + (wanted - low) / (self._log_ratios[high] - low)
        return variance_preserving(ratio, timestep)

    @property
    def ratio_range(self) -> tuple[float, float]:
        """The smallest and the largest finite σ̂ of the schedule."""
        finite = [r for r in self._log_ratios if math.isfinite(r)]
        return math.exp(finite[0]), math.exp(finite[-1])

    @property
    def lowest(self) -> Level:
        """The level of the first training timestep."""
        alpha_cumprod = self.alphas_cumprod[0]
        return Level(0.0, math.sqrt(alpha_cumprod), math.sqrt(1.0 - alpha_cumprod))

    def at_sigma(self, sigma: float) -> Level:
        """The level of a noise level as people name it on this path: σ̂ = σ/α."""
        return self.at_ratio(sigma)

    def sigma_of(self, level: Level) -> float:
        """The inverse of `at_sigma`."""
        return level.noise_ratio


class FlowPath:
    """The straight path α = 1 − t, σ = t of flow matching (arXiv 2209.03003); the time argument is t·T.

    Args:
        times: t of the training levels, float64 ``[T]``, ascending, the last one 1.
    """

    def __init__(self, times: torch.Tensor) -> None:
        self.times: list[float] = times.double().tolist()

    def at_timestep(self, timestep: float) -> Level:
        """The level of a timestep in [0, T]."""
        total = len(self.times)
        if not 0.0 <= timestep <= total:
            raise ValueError(
                error_message(
                    "Levels", "timesteps", f"holds {timestep}", f"values from 0 to {total}", "stay on the schedule"
                )
            )
        return flow_level(timestep / total, total)

    def at_ratio(self, ratio: float) -> Level:
        """The level of σ̂ = σ/α = t/(1 − t)."""
        return flow_level(1.0 if math.isinf(ratio) else ratio / (1.0 + ratio), len(self.times))

    @property
    def ratio_range(self) -> tuple[float, float]:
        """The smallest and the largest finite σ̂ of the training levels."""
        if len(self.times) < 2:
            raise ValueError(
                error_message(
                    "Levels", "num_train_timesteps", "is 1", "2 or more on a flow schedule", "raise num_train_timesteps"
                )
            )
        low, high = self.times[0], self.times[-2]
        return low / (1.0 - low), high / (1.0 - high)

    @property
    def lowest(self) -> Level:
        """The level of the first training timestep."""
        return flow_level(self.times[0], len(self.times))

    def at_sigma(self, sigma: float) -> Level:
        """The level of a noise level as people name it on this path: σ = t, 0 to 1."""
        if not 0.0 <= sigma <= 1.0:
            raise ValueError(
                error_message(
                    "Levels", "sigmas", f"holds {sigma}", "values from 0 to 1", "give the times t = σ of a flow"
                )
            )
        return flow_level(sigma, len(self.times))

    def sigma_of(self, level: Level) -> float:
        """The inverse of `at_sigma`."""
        return level.sigma


#: The path of a training schedule through its noise levels.
Path = VariancePreservingPath | FlowPath


def flow_level(time: float, num_train_timesteps: int) -> Level:
    """The level of a time t of flow matching."""
    return Level(time * num_train_timesteps, 1.0 - time, time)


def variance_preserving(ratio: float, timestep: float) -> Level:
    """The level with α² + σ² = 1 and σ/α = `ratio`."""
    alpha = 1.0 / math.hypot(1.0, ratio)
    return Level(timestep, alpha, ratio * alpha)


def levels_from_timesteps(
    alphas_cumprod: torch.Tensor, timesteps: Sequence[float], *, final_alpha_cumprod: float = 1.0
) -> Levels:
    """The levels of descending training timesteps, ending at ᾱ = `final_alpha_cumprod` (1: the clean sample).

    Args:
        alphas_cumprod: ᾱ of the training schedule, float64 ``[T]``.
        timesteps: n timesteps in [0, T − 1], descending.
        final_alpha_cumprod: 1, or ᾱ_0 as older DDIM configurations ask (`set_alpha_to_one=False`).
    """
    path = VariancePreservingPath(alphas_cumprod)
    end = Level(0.0, math.sqrt(final_alpha_cumprod), math.sqrt(1.0 - final_alpha_cumprod))
    return Levels((*(path.at_timestep(float(t)) for t in timesteps), end), path.at_ratio, path.at_timestep)


def levels_from_sigmas(alphas_cumprod: torch.Tensor, sigmas: Sequence[float], *, final_sigma: float = 0.0) -> Levels:
    """The levels of descending σ̂ = σ/α, each with the timestep of that level on the schedule."""
    path = VariancePreservingPath(alphas_cumprod)
    points = tuple(path.at_ratio(float(sigma)) for sigma in (*sigmas, final_sigma))
    return Levels(points, path.at_ratio, path.at_timestep)


def levels_from_half_log_snr(half_log_snr: Sequence[float]) -> Levels:
    """The variance-preserving levels of ascending λ = log(α/σ), for models whose time argument is λ itself."""

    def locate(ratio: float) -> Level:
        return variance_preserving(ratio, -math.log(ratio) if ratio > 0.0 else math.inf)

    return Levels(tuple(locate(math.exp(-value)) for value in half_log_snr), locate)


def levels_from_flow_times(times: Sequence[float], *, num_train_timesteps: int = 1000) -> Levels:
    """The levels of the straight path α = 1 − t, σ = t of flow matching, t descending in [0, 1].

    The model's time argument is ``t · num_train_timesteps``, as in diffusers' flow schedulers.
    """

    def locate(ratio: float) -> Level:
        return flow_level(1.0 if math.isinf(ratio) else ratio / (1.0 + ratio), num_train_timesteps)

    def locate_timestep(timestep: float) -> Level:
        return flow_level(timestep / num_train_timesteps, num_train_timesteps)

    points = tuple(flow_level(float(t), num_train_timesteps) for t in times)
    return Levels(points, locate, locate_timestep)


def with_edm_coordinates(levels: Levels, sigma_data: float) -> Levels:
    """Return the levels in the coordinates and the time of EDM networks (arXiv 2206.00364, table 1).

    A network is shown c_in·x̂ with c_in = 1/√(σ̂² + σ_data²), and c_noise = ¼·log σ̂ for its timestep: α is c_in and σ
    is σ̂·c_in.  The last level, where the loop ends, has α = 1: the end is a sample, not a network's input.

    Args:
        levels: levels of finite σ̂, in any coordinates.
        sigma_data: the standard deviation of the data.

    Raises:
        ValueError: the first level has no signal, so that its σ̂ is infinite.
    """
    if levels[0].alpha == 0.0:
        raise ValueError(
            error_message(
                "EDM", "levels[0]", "has no signal", "a finite noise level", "leave rescale_betas_zero_snr at False"
            )
        )

    def locate(ratio: float) -> Level:
        if ratio == 0.0:
            return Level(0.0, 1.0, 0.0)
        alpha = 1.0 / math.hypot(ratio, sigma_data)
        return Level(0.25 * math.log(ratio), alpha, ratio * alpha)

    *visited, end = (level.noise_ratio for level in levels.points)
    return Levels((*(locate(ratio) for ratio in visited), Level(0.0, 1.0, end)), locate)


def with_intermediate_levels(levels: Levels, fractions: Sequence[float]) -> Levels:
    """Insert, into each step from t to s, the levels at λ_t + r·(λ_s − λ_t) for each r of `fractions`.

    This is the grid of the singlestep DPM-Solvers with fixed r (arXiv 2206.00927, algorithms 1 and 2: r = 1/2
    for order 2, r = 1/3 and 2/3 for order 3).  A step whose end has no noise or whose start has no signal has no
    finite λ to divide and is left whole.
    """
    points = [levels[0]]
    for start, end in zip(levels.points, levels.points[1:], strict=False):
        span = end.half_log_snr - start.half_log_snr
        if math.isfinite(span):
            points += [levels.locate(math.exp(-(start.half_log_snr + r * span))) for r in fractions]
        points.append(end)
    return Levels(tuple(points), levels.locate, levels.locate_timestep)
