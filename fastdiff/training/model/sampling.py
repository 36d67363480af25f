# SPDX-License-Identifier: MIT
"""How the model of a configuration is sampled: the sampler, and the part of the model's output that it takes."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ...row_layout import Variance
from ...samplers import BaseSampler, create_sampler
from ...schedules import BaseNoiseScheduler
from ...solvers import SamplingMethod
from ..config import DiffusionConfig
from .conditioning import output_tensor


def configured_sampler(
    config: DiffusionConfig,
    schedule: BaseNoiseScheduler,
    method: str | SamplingMethod | None = None,
    num_inference_steps: int | None = None,
    **fields: Any,
) -> BaseSampler:
    """Return a sampler with the sampling fields of a settled configuration.

    DDIM has the configuration's eta.  DDPM has the learned variance where the model has one.

    Args:
        config: the configuration.
        schedule: of the training.
        method: a name of `fastdiff.SamplingMethod`; the configuration's where None.
        num_inference_steps: the configuration's where None.
        fields: other fields of `fastdiff.SamplingConfig`; they replace the configuration's.

    Raises:
        TypeError, ValueError: as `fastdiff.create_sampler`.
    """
    own = {
        "num_inference_steps": config.num_inference_steps if num_inference_steps is None else num_inference_steps,
        "prediction_type": config.prediction_type,
        "guidance_scale": config.guidance_scale,
    }
    chosen = SamplingMethod.parse(config.sampling_method if method is None else method)
    if chosen is SamplingMethod.DDIM:
        own["eta"] = config.eta
    elif chosen is SamplingMethod.DDPM and config.learned_variance:
        own["variance_type"] = "learned_range"
    return create_sampler(schedule, chosen, **{**own, **fields})


def model_for_sampler(model: nn.Module, config: DiffusionConfig, sampler: BaseSampler) -> nn.Module:
    """Return a model whose output is what a sampler takes: with a learned variance only where the sampler reads it.

    Args:
        model: called with ``(sample, timestep)`` or ``(sample, timestep, condition)``.
        config: settled, of the model.
        sampler: as `configured_sampler` returns it.
    """
    return model if takes_variance(sampler) else without_variance(model, config)


def without_variance(model: nn.Module, config: DiffusionConfig) -> nn.Module:
    """Return a model whose output is the prediction alone: the model itself where it has no learned variance."""
    return _Prediction(model) if config.learned_variance else model


def takes_variance(sampler: BaseSampler) -> bool:
    """Return True where a sampler reads a learned variance from the second half of the model's channels."""
    return sampler.table.variance is not Variance.FIXED


class _Prediction(nn.Module):
    """The prediction of a model with a learned variance."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, sample: Tensor, timestep: Tensor, *condition: Tensor) -> Tensor:
        """Return the first half of the model's output."""
        return output_tensor(self.model(sample, timestep, *condition)).chunk(2, dim=1)[0]
