# SPDX-License-Identifier: MIT
"""The noise schedule of flow matching: the straight path x = (1 − t)·x0 + t·ε, with shifted times."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..errors import checked_float, error_message
from . import betas as formulas
from .base import BaseNoiseScheduler
from .config import NoiseScheduleType
from .levels import FlowPath, Path
from .timesteps import timestep_schedule


class FlowNoiseScheduler(BaseNoiseScheduler):
    """``flow``: α = 1 − t and σ = t, rectified flow (arXiv 2209.03003), for models with ``flow_prediction`` ε − x0.

    Training level k has t = (k + 1)/T before the shift; the last is pure noise. The model's time argument is t·T, as in
    diffusers' flow schedulers. A loop of n steps visits t = 1 − i/n with ``trailing`` spacing, and n times from 1 to
    1/T with ``linspace``; both end at the clean sample. Does not use beta_start, beta_end and steps_offset.

    The shift (``shift``, or e^μ for ``shift_mu``) moves all times towards the noise: t' = s·t/(1 + (s − 1)·t).

    Attributes:
        times: t of the training levels after the shift, float64 ``[T]`` on the CPU, ascending.
        betas, alphas, alphas_cumprod: of the variance-preserving process with the same signal-to-noise ratios,
            ᾱ = α²/(α² + σ²), as are the arrays that follow from them.
    """

    schedule_types = (NoiseScheduleType.FLOW,)
    usual_spacing = "trailing"

    @property
    def shift(self) -> float:
        """The shift in force."""
        mu = self.config.shift_mu
        return self.config.shift if mu is None else math.exp(mu)

    def _betas(self) -> Tensor:
        return formulas.betas_from_alphas_cumprod(self._alphas_cumprod())

    def _alphas_cumprod(self) -> Tensor:
        total = self.num_train_timesteps
        self.times = self._shifted(torch.arange(1, total + 1, dtype=torch.float64, device="cpu") / total)
        signal = (1 - self.times) ** 2
        return signal / (signal + self.times**2)

    def _forward_scales(self) -> Tensor:
        return torch.stack([1 - self.times, self.times])

    def _shifted(self, times: Tensor) -> Tensor:
        return self.shift * times / (1 - times + self.shift * times)  # exactly 1 at 1

    @property
    def path(self) -> Path:
        """The path of this schedule through its noise levels, for the solvers."""
        return FlowPath(self.times)

    def inference_timesteps(self, num_inference_steps: int) -> list[float]:
        """Return the model's time arguments t·T of a loop of so many steps, descending.

        Raises:
            TypeError, ValueError: the number is no integer from 1 to T.
        """
        total = self.num_train_timesteps
        n = len(timestep_schedule("linspace", num_inference_steps, total))  # for its checks
        index = torch.arange(n, dtype=torch.float64, device="cpu")
        if self.config.timestep_spacing == "trailing":
            times = 1 - index / n
        else:
            times = 1 - index * ((1 - 1 / total) / max(n - 1, 1))
        chosen: list[float] = (self._shifted(times) * total).tolist()
        return chosen

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor | int) -> Tensor:
        """The target of flow_prediction, ε − x0, at any timestep (arXiv 2209.03003, eq. 1, towards the noise).

        Args:
            sample: x0 ``[B, …]``; it, ``noise``, ``timesteps``, the result and the errors are as in :meth:`add_noise`.
            noise: ε, like ``sample``.
            timesteps: int, 0-d, ``[B]`` or ``[1]``.
        """
        scale, _ = self._scales_at("get_velocity", "sample", sample, noise, timesteps)
        return (noise.to(scale.dtype) - sample.to(scale.dtype)).to(sample.dtype)


def flow_mu(
    image_seq_len: int,
    base_seq_len: int = 256,
    max_seq_len: int = 4096,
    base_shift: float = 0.5,
    max_shift: float = 1.15,
) -> float:
    """Return μ of the dynamic shift for a number of image tokens, on the line through two given points.

    The defaults are those of the FLUX.1 models: μ = 0.5 at 256 tokens and 1.15 at 4096. Beyond them the line goes on.

    Raises:
        TypeError, ValueError: a number is not finite, or both points have one length.
    """
    low = checked_float("flow_mu", "base_seq_len", base_seq_len, 1.0)
    high = checked_float("flow_mu", "max_seq_len", max_seq_len, 1.0)
    if low == high:
        raise ValueError(
            error_message(
                "flow_mu", "max_seq_len", f"is {max_seq_len} like base_seq_len", "another length", "give two points"
            )
        )
    tokens = checked_float("flow_mu", "image_seq_len", image_seq_len, 1.0)
    slope = (max_shift - base_shift) / (high - low)
    return base_shift + slope * (tokens - low)
