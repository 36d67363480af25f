# SPDX-License-Identifier: MIT
"""Wrappers that make a denoiser, x0 of x0 + σ·ε, from a model that predicts ε, v, x0 or a flow.

A loop that finds one of these calls the model inside: the scale of the model's input and the arithmetic from its output
to x0 are then part of the step's row, and cost no pass of their own.  Any other caller gets x0 from the wrapper.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ..errors import error_message
from ..schedules.levels import Level
from ..schedules.sigmas import append_zero
from ..solvers.prediction import Prediction, PredictionType
from ..solvers.scaled_velocity import ScaledVelocity


@dataclass(frozen=True)
class Parametrization:
    """The input and the output of a model, as functions of the level.

    Attributes:
        prediction: the output.
        model_input: ``preserving`` where the model takes x/√(1 + σ²), ``flow`` where it takes x/(1 + σ), the sample of
            a straight path, ``same`` where it takes x itself.
        flow: samples are (1 − σ)·x0 + σ·ε, those of the loops for flow models; else x0 + σ·ε.
    """

    prediction: Prediction
    model_input: Literal["preserving", "flow", "same"] = "preserving"
    flow: bool = False

    def level(self, sigma: float) -> Level:
        """Return the level of the samples at σ."""
        return Level(sigma, 1.0 - sigma if self.flow else 1.0, sigma)

    def input_scale(self, sigma: float) -> float:
        """Return c_in."""
        if self.model_input == "same":
            return 1.0
        return 1.0 / (1.0 + sigma) if self.model_input == "flow" else 1.0 / math.hypot(1.0, sigma)


#: Timesteps that a denoiser keeps, one tuple for each sigmas that a loop visits.
_CACHED_TIMES = 64


class Denoiser(torch.nn.Module):
    """A model as a denoiser of x = x0 + σ·ε; the classes below say which model.

    ``denoiser(x, sigma, **kwargs)`` takes x ``[B, ...]`` and σ ``[B]`` and returns x0 like x.  The model is called as
    ``inner_model(c_in·x, t, **kwargs)`` with t ``[B]`` in the dtype of x, and returns a tensor like x.

    Attributes:
        inner_model: the model.
        parametrization: of its input and output.
    """

    parametrization: Parametrization

    def __init__(self, inner_model: Any) -> None:
        super().__init__()
        self.inner_model = inner_model
        self._times: dict[tuple[float, ...], list[float]] = {}

    def sigma_to_t(self, sigma: float) -> float:
        """Return the model's time argument at σ."""
        raise NotImplementedError

    def t_to_sigma(self, t: float) -> float:
        """Return σ at a time argument."""
        raise NotImplementedError

    def times(self, sigmas: tuple[float, ...]) -> list[float]:
        """Return the model's time argument at each σ; kept for the next loop."""
        found = self._times.get(sigmas)
        if found is None:
            if len(self._times) >= _CACHED_TIMES:
                self._times.clear()
            found = self._times[sigmas] = [self.sigma_to_t(sigma) for sigma in sigmas]
        return found

    def forward(self, x: Tensor, sigma: Tensor, **kwargs: Any) -> Tensor:
        sigmas = sigma.detach().reshape(-1).tolist()
        if len(sigmas) not in (1, x.shape[0]):
            raise ValueError(
                error_message(
                    "Denoiser", "sigma", f"has shape {list(sigma.shape)}", f"[{x.shape[0]}]", "give one σ a sample"
                )
            )
        scalars = [self.parametrization.prediction.at(self.parametrization.level(value)).scalars for value in sigmas]
        scales = [self.parametrization.input_scale(value) for value in sigmas]

        def column(values: Sequence[float]) -> Tensor:
            return torch.tensor(values, dtype=x.dtype, device=x.device).view(-1, *[1] * (x.dim() - 1))

        t = torch.tensor([self.sigma_to_t(value) for value in sigmas], dtype=x.dtype, device=x.device)
        output = self.inner_model(x * column(scales), t.expand(x.shape[0]), **kwargs)
        denoised: Tensor = column([p for p, _ in scalars]) * x + column([q for _, q in scalars]) * output
        return denoised


class _DiscreteDenoiser(Denoiser):
    """A model on the timesteps 0 … T − 1 of a training schedule.

    Args:
        model: ``model(x, t, **kwargs)``.
        alphas_cumprod: ᾱ, ``[T]``, decreasing, in (0, 1).
        quantize: round t to the nearest training timestep in log σ, as k-diffusion; False interpolates log σ.
    """

    def __init__(self, model: Any, alphas_cumprod: Tensor | Sequence[float], quantize: bool = False) -> None:
        super().__init__(model)
        alphas = torch.as_tensor(alphas_cumprod, dtype=torch.float64).detach().cpu()
        if alphas.dim() != 1 or not bool(((alphas > 0) & (alphas < 1)).all()) or bool((alphas.diff() >= 0).any()):
            raise ValueError(
                error_message(
                    type(self).__name__,
                    "alphas_cumprod",
                    f"has shape {list(alphas.shape)}, from {float(alphas.max()):g} to {float(alphas.min()):g}",
                    "[T] numbers between 0 and 1, decreasing",
                    "pass scheduler.alphas_cumprod of a schedule without zero terminal SNR",
                )
            )
        self.quantize = quantize
        #: σ of each training timestep, float64 ``[T]``.
        self.sigmas = ((1.0 - alphas) / alphas).sqrt()
        self._log_sigmas: list[float] = self.sigmas.log().tolist()

    @property
    def sigma_min(self) -> float:
        return float(self.sigmas[0])

    @property
    def sigma_max(self) -> float:
        return float(self.sigmas[-1])

    def get_sigmas(self, n: int | None = None) -> Tensor:
        """Return σ at n timesteps evenly spaced from T − 1 to 0, then 0; at all T where n is None."""
        if n is None:
            return append_zero(self.sigmas.flip(0))
        times = torch.linspace(len(self._log_sigmas) - 1, 0, n, dtype=torch.float64).tolist()
        return append_zero(torch.tensor([self.t_to_sigma(t) for t in times], dtype=torch.float64))

    def sigma_to_t(self, sigma: float) -> float:
        wanted = math.log(sigma) if sigma > 0.0 else -math.inf
        logs = self._log_sigmas
        high = min(max(bisect.bisect_left(logs, wanted), 1), len(logs) - 1)
        low = high - 1
        weight = min(max((wanted - logs[low]) / (logs[high] - logs[low]), 0.0), 1.0)
        if self.quantize:
            return float(low if wanted - logs[low] <= logs[high] - wanted else high)
        return low + weight

    def t_to_sigma(self, t: float) -> float:
        logs = self._log_sigmas
        low = min(max(int(t), 0), len(logs) - 1)
        high = min(low + 1, len(logs) - 1)
        return math.exp(logs[low] + (t - low) * (logs[high] - logs[low]))


class EpsilonDenoiser(_DiscreteDenoiser):
    """A model that predicts ε: k-diffusion's `DiscreteEpsDDPMDenoiser`."""

    parametrization = Parametrization(Prediction(PredictionType.EPSILON))


class VDenoiser(_DiscreteDenoiser):
    """A model that predicts v on a training schedule: k-diffusion's `DiscreteVDDPMDenoiser`."""

    parametrization = Parametrization(ScaledVelocity())


class SampleDenoiser(_DiscreteDenoiser):
    """A model that predicts x0."""

    parametrization = Parametrization(Prediction(PredictionType.SAMPLE))


class ContinuousVDenoiser(Denoiser):
    """A model that predicts v and takes the time t = 2/π·atan σ in [0, 1]: k-diffusion's `VDenoiser`."""

    parametrization = Parametrization(ScaledVelocity())

    def sigma_to_t(self, sigma: float) -> float:
        return math.atan(sigma) * 2.0 / math.pi

    def t_to_sigma(self, t: float) -> float:
        return math.tan(t * math.pi / 2.0)


class FlowDenoiser(Denoiser):
    """A model that predicts the velocity ε − x0 of the straight path (1 − t)·x0 + t·ε.

    The loop's level is σ = t/(1 − t), so that every method runs on a flow model; t = 1 has no finite σ.

    Args:
        model: ``model(x, t, **kwargs)``.
        num_train_timesteps: the model's time argument is t times this.
    """

    parametrization = Parametrization(Prediction(PredictionType.FLOW_PREDICTION), "flow")

    def __init__(self, model: Any, num_train_timesteps: float = 1000.0) -> None:
        super().__init__(model)
        self.num_train_timesteps = num_train_timesteps

    def sigma_to_t(self, sigma: float) -> float:
        return sigma / (1.0 + sigma) * self.num_train_timesteps

    def t_to_sigma(self, t: float) -> float:
        time = t / self.num_train_timesteps
        return time / (1.0 - time)


class FlowPathDenoiser(Denoiser):
    """A model that predicts the velocity ε − x0, for `sample_flow_euler` and `sample_flow_heun`.

    Their samples are (1 − σ)·x0 + σ·ε with σ the time from 1 to 0, which the model takes as they are.

    Args:
        model: ``model(x, t, **kwargs)``.
        num_train_timesteps: the model's time argument is σ times this.
    """

    parametrization = Parametrization(Prediction(PredictionType.FLOW_PREDICTION), "same", flow=True)

    def __init__(self, model: Any, num_train_timesteps: float = 1000.0) -> None:
        super().__init__(model)
        self.num_train_timesteps = num_train_timesteps

    def sigma_to_t(self, sigma: float) -> float:
        return sigma * self.num_train_timesteps

    def t_to_sigma(self, t: float) -> float:
        return t / self.num_train_timesteps
