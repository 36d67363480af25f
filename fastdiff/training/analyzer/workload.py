# SPDX-License-Identifier: MIT
"""A model of this library's training as a workload of `fastdiff.analysis`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...analysis.workload import Workload
from ...errors import checked_integer, error_message
from ...ops import randn
from ...philox import spawn_seeds
from ...row_layout import compute_dtype
from ..model.diffusion_model import AdvancedUNet, DiffusionModel
from ..model.sampling import without_variance


def model_workload(
    model: Any,
    batch_size: int = 4,
    *,
    seed: int = 0,
    prompt_embeds: Tensor | None = None,
    negative_prompt_embeds: Tensor | None = None,
    operation: str = "model_workload",
) -> Workload:
    """Return a model with its schedule, and noise from seeds: the same for models of one configuration.

    Args:
        model: a `DiffusionModel` or an `AdvancedUNet`.
        batch_size: B.
        seed: of the noise.
        prompt_embeds, negative_prompt_embeds: conditions ``[B, ...]``; guidance, of the configuration's scale, applies
            where both are given.
        operation: for messages.

    Raises:
        TypeError: the model is another one.
        ValueError: `batch_size` is below 1.
    """
    if isinstance(model, AdvancedUNet):
        model = DiffusionModel(model.config, model)
    if not isinstance(model, DiffusionModel):
        got, remedy = f"is a {type(model).__name__}", "pass a fastdiff.analysis.Workload of the model"
        raise TypeError(error_message(operation, "model", got, "a DiffusionModel or an AdvancedUNet", remedy))
    config, place = model.config, next(model.parameters())
    seeds = spawn_seeds(seed, checked_integer(operation, "batch_size", batch_size, 1))
    dtype = compute_dtype(place.dtype)
    shape = (batch_size, config.in_channels, config.image_size, config.image_size)
    guided = prompt_embeds is not None and negative_prompt_embeds is not None
    return Workload(
        model=without_variance(model, config),
        scheduler=model.scheduler.schedule,
        latents=randn(shape, seeds, dtype=dtype, device=place.device),
        prompt_embeds=prompt_embeds,
        negative_prompt_embeds=negative_prompt_embeds,
        fields={
            "prediction_type": config.prediction_type,
            "guidance_scale": config.guidance_scale if guided else 1.0,
        },
        seeds=torch.tensor(seeds, device=place.device),
        name=type(model).__name__,
        model_dtype=None if place.dtype == dtype else place.dtype,
    )
