# SPDX-License-Identifier: MIT
"""Training objectives: a loss a sample from a batch and a model."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

from torch import Tensor

from ...device_copy import to_device
from ...ops import add_noise, diffusion_loss
from ..config import DiffusionConfig
from ..data.batches import TrainingBatch
from .timestep_draws import draw_timesteps
from .variational_bound import vlb_loss
from .weights import weight_table


class Predict(Protocol):
    """The trained model, under autocast and distributed wrappers."""

    def __call__(self, sample: Tensor, timestep: Tensor, condition: Tensor | None = None) -> Tensor:
        """Return the output ``[B, C, ...]`` for noisy samples at timesteps ``[B]``."""


class LossTerms(NamedTuple):
    """Losses ``[B]`` of samples, and the timesteps ``[B]`` that they belong to."""

    losses: Tensor
    timesteps: Tensor


class Objective(Protocol):
    """A training objective.  All that it draws follows from ``batch.seeds``, so that runs can be resumed to the bit."""

    def __call__(self, predict: Predict, batch: TrainingBatch) -> LossTerms:
        """Return the losses of a batch."""


class DenoisingObjective:
    """The loss of denoising at drawn timesteps (arXiv 2006.11239, eq. 14), in the configuration's prediction type.

    The noise is drawn from the seeds in the pass that adds it, and again in the pass of the loss, so neither it nor the
    target is ever stored.  Where the model learns its variance, the variational bound is added with the weight of the
    configuration (arXiv 2102.09672, eq. 16).

    Args:
        config: a settled configuration: prediction type, loss, weighting, distribution of timesteps.
        schedule: the noise schedule.
    """

    def __init__(self, config: DiffusionConfig, schedule: Any) -> None:
        self._config, self._schedule = config, schedule
        self._weights = weight_table(
            schedule,
            config.loss_weighting,
            config.prediction_type,
            snr_gamma=5.0 if config.snr_gamma is None else config.snr_gamma,
            p2_gamma=config.p2_gamma,
            p2_k=config.p2_k,
        )

    def __call__(self, predict: Predict, batch: TrainingBatch) -> LossTerms:
        """Return the losses of a batch."""
        config = self._config
        t = draw_timesteps(
            len(batch.images),
            config.num_train_timesteps,
            sampling=config.timestep_sampling,
            logit_mean=config.logit_mean,
            logit_std=config.logit_std,
            shift=config.timestep_shift,
            seeds=batch.seeds,
        )
        if self._weights is not None and self._weights.device != t.device:
            self._weights = to_device(self._weights, t.device)
        noisy = add_noise(batch.images, t, self._schedule, seeds=batch.seeds)
        output = predict(noisy, t, batch.condition)
        losses = diffusion_loss(
            output,
            batch.images,
            t,
            self._schedule,
            config.prediction_type,
            seeds=batch.seeds,
            loss=config.loss_type,
            huber_c=config.huber_c,
            weights=None if self._weights is None else self._weights[t],
            reduction="none",
        )
        if config.learned_variance and config.vlb_weight:
            bound = vlb_loss(output, batch.images, noisy, t, self._schedule, config.prediction_type, reduction="none")
            losses = losses + config.vlb_weight * bound
        return LossTerms(losses, t)
