# SPDX-License-Identifier: MIT
"""Grids of samples during training, from latents that are the same each time."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...analysis.images import save_grid
from ...ops import randn
from ...philox import spawn_seeds
from ..model.sampling import configured_sampler, model_for_sampler
from .checks import check_schedule_of_grids

if TYPE_CHECKING:
    from .trainer import Trainer


def write_sample_grid(trainer: Trainer, path: Path) -> None:
    """Sample images with the averaged weights and write them as a PNG grid; only the main process does.

    Raises:
        OSError: the file cannot be written.
        ValueError: samples are no images of 1 or 3 channels, or the schedule is not of fastdiff.
    """
    if not trainer.accelerator.is_main_process:
        return
    samples = draw_samples(trainer, trainer.options.sample_count)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_grid(samples, path, columns=math.ceil(math.sqrt(len(samples))), scale=max(1, 32 // samples.shape[-1]))


def draw_samples(trainer: Trainer, count: int) -> Tensor:
    """Return samples ``[count, C, H, W]`` of the averaged weights, by the configuration's method and steps."""
    config, options = trainer.config, trainer.options
    check_schedule_of_grids(trainer.schedule)
    condition = null = None
    conditioning = trainer.conditioning
    if conditioning.null_label is not None and options.sample_labels:
        labels = torch.tensor([options.sample_labels[i % len(options.sample_labels)] for i in range(count)])
        condition = labels.to(trainer.device)
        null = torch.full_like(condition, conditioning.null_label)
    elif conditioning.always:
        prompts = options.sample_prompts or ("",)
        condition = conditioning.encode([prompts[i % len(prompts)] for i in range(count)], "train")
        null = conditioning.encode([""] * count, "train")
    scale = config.guidance_scale if condition is not None else 1.0
    sampler = configured_sampler(config, trainer.schedule, guidance_scale=scale)
    seeds = spawn_seeds(config.seed % 2**32, count)
    shape = (count, config.in_channels, *trainer.sample_shape)
    with trainer.averaged_weights() as modules, torch.no_grad(), trainer.autocast():
        latents = randn(shape, seeds, dtype=modules.data_dtype, device=trainer.device)
        model = model_for_sampler(modules, config, sampler)
        return sampler.sample(model, latents, condition, null, seeds=seeds, progress=False, keep_mode=True).samples
