# SPDX-License-Identifier: MIT
"""The packaged digit model as a workload of `fastdiff.analysis`."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..analysis.workload import Workload
from ..ops import randn
from ..philox import spawn_seeds
from ..schedules import create_noise_scheduler
from .encoder import load_digit_encoder
from .unet import IMAGE_SHAPE, NULL_CLASS, NUM_CLASSES, load_digit_unet


def digits_workload(
    count: int = 50,
    *,
    classes: Sequence[int] = tuple(range(NUM_CLASSES)),
    guidance_scale: float = 1.0,
    seed: int = 0,
    features: bool = True,
    device: str | torch.device = "cpu",
) -> Workload:
    """Return the digit model with its cosine schedule, noise from seeds, and labels in turn.

    Args:
        count: images.
        classes: labels, shared out among the images in blocks.
        guidance_scale: of classifier-free guidance; 1 for none.
        seed: of the noise.
        features: with the packaged encoder and the real training digits (scikit-learn) for the metrics of features.
        device: of model and noise.

    Raises:
        ImportError: safetensors is missing, or scikit-learn with `features`.
    """
    seeds = spawn_seeds(seed, count)
    labels = torch.tensor([classes[i * len(classes) // count] for i in range(count)], device=device)
    encoder = real = None
    if features:
        from .data import load_digits, to_images

        encoder, real = load_digit_encoder(), to_images(load_digits().train_pixels)
    return Workload(
        model=load_digit_unet(device=device),
        scheduler=create_noise_scheduler("cosine", timestep_spacing="trailing"),
        latents=randn((count, *IMAGE_SHAPE), seeds, device=device),
        prompt_embeds=labels,
        negative_prompt_embeds=torch.full_like(labels, NULL_CLASS),
        fields={"prediction_type": "v_prediction", "guidance_scale": guidance_scale},
        seeds=torch.tensor(seeds, device=device),
        name="the packaged digits",
        real=real,
        encoder=encoder,
        classifier=None if encoder is None else encoder.classify,
    )
