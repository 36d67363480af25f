# SPDX-License-Identifier: MIT
"""Noise schedules by kind: how much signal is left at each training timestep.

The formulas are in :mod:`fastdiff.schedules.betas`; what all kinds share is in :mod:`fastdiff.schedules.base`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import error_message
from . import betas as formulas
from .base import BaseNoiseScheduler, configure
from .betas import rescale_zero_terminal_snr
from .config import NoiseSchedulerConfig, NoiseScheduleType
from .flow import FlowNoiseScheduler

__all__ = [
    "BaseNoiseScheduler",
    "CosineNoiseScheduler",
    "CustomNoiseScheduler",
    "ExponentialNoiseScheduler",
    "FlowNoiseScheduler",
    "KarrasNoiseScheduler",
    "LaplaceNoiseScheduler",
    "LinearNoiseScheduler",
    "LinearRescaledNoiseScheduler",
    "NoiseScheduleType",
    "NoiseSchedulerConfig",
    "QuadraticNoiseScheduler",
    "ScaledLinearNoiseScheduler",
    "SigmoidNoiseScheduler",
    "create_noise_scheduler",
    "rescale_zero_terminal_snr",
]


class LinearNoiseScheduler(BaseNoiseScheduler):
    """``linear``: :func:`fastdiff.schedules.betas.linear`."""

    schedule_types = (NoiseScheduleType.LINEAR,)

    def _betas(self) -> Tensor:
        return formulas.linear(self.config.num_train_timesteps, self.config.beta_start, self.config.beta_end)


class ScaledLinearNoiseScheduler(BaseNoiseScheduler):
    """``scaled_linear`` as diffusers means it: :func:`fastdiff.schedules.betas.scaled_linear`."""

    schedule_types = (NoiseScheduleType.SCALED_LINEAR,)

    def _betas(self) -> Tensor:
        return formulas.scaled_linear(self.config.num_train_timesteps, self.config.beta_start, self.config.beta_end)


class LinearRescaledNoiseScheduler(BaseNoiseScheduler):
    """``linear_rescaled``, ends multiplied by 1000/T: :func:`fastdiff.schedules.betas.linear_rescaled`."""

    schedule_types = (NoiseScheduleType.LINEAR_RESCALED,)

    def _betas(self) -> Tensor:
        return formulas.linear_rescaled(self.config.num_train_timesteps, self.config.beta_start, self.config.beta_end)


class CosineNoiseScheduler(BaseNoiseScheduler):
    """``cosine``, or ``squaredcos_cap_v2``: :func:`fastdiff.schedules.betas.cosine`.

    Does not use beta_start and beta_end.
    """

    schedule_types = (NoiseScheduleType.COSINE,)

    def _betas(self) -> Tensor:
        return formulas.cosine(self.config.num_train_timesteps)


class QuadraticNoiseScheduler(BaseNoiseScheduler):
    """``quadratic``, the same formula as ``scaled_linear``: :func:`fastdiff.schedules.betas.scaled_linear`."""

    schedule_types = (NoiseScheduleType.QUADRATIC,)

    def _betas(self) -> Tensor:
        return formulas.scaled_linear(self.config.num_train_timesteps, self.config.beta_start, self.config.beta_end)


class SigmoidNoiseScheduler(BaseNoiseScheduler):
    """``sigmoid``: :func:`fastdiff.schedules.betas.sigmoid`."""

    schedule_types = (NoiseScheduleType.SIGMOID,)

    def _betas(self) -> Tensor:
        return formulas.sigmoid(self.config.num_train_timesteps, self.config.beta_start, self.config.beta_end)


class ExponentialNoiseScheduler(BaseNoiseScheduler):
    """``exponential``, a line in log β: :func:`fastdiff.schedules.betas.exponential`."""

    schedule_types = (NoiseScheduleType.EXPONENTIAL,)

    def _betas(self) -> Tensor:
        return formulas.exponential(self.config.num_train_timesteps, self.config.beta_start, self.config.beta_end)


class LaplaceNoiseScheduler(BaseNoiseScheduler):
    """``laplace``: :func:`fastdiff.schedules.betas.laplace`. Does not use beta_start and beta_end."""

    schedule_types = (NoiseScheduleType.LAPLACE,)

    def _betas(self) -> Tensor:
        return formulas.laplace(self.config.num_train_timesteps)


class KarrasNoiseScheduler(BaseNoiseScheduler):
    """``karras``: :func:`fastdiff.schedules.betas.karras_alphas_cumprod`. Does not use beta_start and beta_end."""

    schedule_types = (NoiseScheduleType.KARRAS,)

    def _betas(self) -> Tensor:
        return formulas.betas_from_alphas_cumprod(self._alphas_cumprod())

    def _alphas_cumprod(self) -> Tensor:
        return formulas.karras_alphas_cumprod(self.config.num_train_timesteps)


class CustomNoiseScheduler(BaseNoiseScheduler):
    """The caller's own ``custom_betas`` or ``custom_alphas_cumprod``, whichever of the two is given."""

    schedule_types = (NoiseScheduleType.CUSTOM_BETAS, NoiseScheduleType.CUSTOM_ALPHAS_CUMPROD)

    def _betas(self) -> Tensor:
        if self.schedule_type is NoiseScheduleType.CUSTOM_BETAS:
            return torch.tensor(self.config.custom_betas, dtype=torch.float64, device="cpu")
        return formulas.betas_from_alphas_cumprod(self._alphas_cumprod())

    def _alphas_cumprod(self) -> Tensor:
        if self.schedule_type is NoiseScheduleType.CUSTOM_BETAS:
            return super()._alphas_cumprod()
        # The given values: the product of the betas would round each of them.
        return torch.tensor(self.config.custom_alphas_cumprod, dtype=torch.float64, device="cpu")


_SCHEDULERS: dict[NoiseScheduleType, type[BaseNoiseScheduler]] = {
    kind: scheduler
    for scheduler in (
        LinearNoiseScheduler,
        ScaledLinearNoiseScheduler,
        LinearRescaledNoiseScheduler,
        CosineNoiseScheduler,
        QuadraticNoiseScheduler,
        SigmoidNoiseScheduler,
        ExponentialNoiseScheduler,
        LaplaceNoiseScheduler,
        KarrasNoiseScheduler,
        CustomNoiseScheduler,
        FlowNoiseScheduler,
    )
    for kind in scheduler.schedule_types
}


def create_noise_scheduler(
    type: str | NoiseScheduleType | NoiseSchedulerConfig, **config_fields: Any
) -> BaseNoiseScheduler:
    """Make the scheduler of a kind.

    Args:
        type: a :class:`NoiseScheduleType` or its name, ``"custom"`` for whichever custom field is given, or a whole
            :class:`NoiseSchedulerConfig`.
        config_fields: fields of the configuration; they replace those of a given configuration.

    Raises:
        TypeError: a field has the wrong type.
        ValueError: the kind or a field is unknown, the kind is given twice, or a value is out of range.
    """
    operation = "create_noise_scheduler"
    if isinstance(type, NoiseSchedulerConfig):
        config = configure(operation, type, config_fields)
    else:
        if "schedule_type" in config_fields:
            got, remedy = f"is given beside type {type!r}", "leave schedule_type out"
            raise ValueError(error_message(operation, "schedule_type", got, "one name", remedy))
        config = configure(operation, None, {**config_fields, "schedule_type": type})
    return _SCHEDULERS[NoiseScheduleType.parse(config.schedule_type)](config)
