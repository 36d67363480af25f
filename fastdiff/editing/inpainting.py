# SPDX-License-Identifier: MIT
"""Image-to-image and inpainting: a loop that starts in the middle, with known parts blended in at every level."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..guidance import GuidedModel, Model
from ..noise.generators import Generators
from ..row_layout import compute_dtype
from ..samplers import BaseSampler
from ..sampling.blend_target import BlendTarget
from ..sampling.stepper import Stepper
from .masks import blend_rows, blended, expand_mask
from .process import Process, guided, noise_for, noised, walk


@torch.no_grad()
def image_to_image(
    process: Process | BaseSampler,
    model: Model | GuidedModel,
    image: Tensor,
    *,
    strength: float = 0.8,
    noise: Tensor | None = None,
    seeds: int | Sequence[int] | Tensor | None = None,
    generator: Generators = None,
    backend: str | None = None,
) -> Tensor:
    """Noise images to a level in the middle of the loop and sample from there (SDEdit, arXiv 2108.01073).

    Args:
        process: a sampler, or the levels, solver and prediction of a loop.
        model: a callable ``(x, t)``, or a `fastdiff.guidance.GuidedModel` with conditions and guidance.
        image: x0 in the model's range, ``[B, ...]``; not written to.
        strength: the part of the loop that is run, 0 (none) to 1 (all); ``int(strength·n)`` of n steps.
        noise: the start's noise, like `image`; drawn where None.
        seeds: a seed for each sample, of the start's noise and of the steps'.
        generator: one, or one a sample, in place of seeds.
        backend: forces one, as in `fastdiff.ops.step`.

    Returns:
        The edited images, like `image`.

    Raises:
        TypeError, ValueError: an argument does not fit.
    """
    process = Process.of(process)
    first = process.first_level(strength)
    noise, keys = noise_for(image, noise, seeds, generator)
    if first == len(process.levels):
        return image.clone()
    stepper = Stepper(process.table(first), seeds=keys, backend=backend)
    start = noised(image, noise, process.levels[first], backend=backend)
    return walk(stepper, guided(model), start, generator=generator)


@torch.no_grad()
def inpaint(
    process: Process | BaseSampler,
    model: Model | GuidedModel,
    image: Tensor,
    mask: Tensor,
    *,
    strength: float = 1.0,
    noise: Tensor | None = None,
    seeds: int | Sequence[int] | Tensor | None = None,
    generator: Generators = None,
    backend: str | None = None,
) -> Tensor:
    """Paint a part of images anew; at each level the rest is the known image, noised to it (arXiv 2011.13456, sec. 5).

    The blend is part of the step's own pass where the solver has room for it (all but those that keep two outputs or
    read three history slots), and else a second pass.  Where a hard mask keeps the image, the result has its bits.

    Args:
        process, model, image, noise, seeds, generator, backend: as in `image_to_image`.
        mask: 1 where the image is painted, 0 where it is kept, numbers in between for a soft edge; bool, or floating
            point, like `image` or broadcast to it, such as ``[B, 1, H, W]``.
        strength: as in `image_to_image`; below 1 the painted part begins as the noised image.

    Raises:
        TypeError, ValueError: an argument does not fit.
    """
    process = Process.of(process)
    first = process.first_level(strength)
    keep = 1 - expand_mask(mask, image)
    noise, keys = noise_for(image, noise, seeds, generator)
    if first == len(process.levels):
        return image.clone()
    table = process.table(first)
    weights = process.reached(table)
    target = BlendTarget(image, noise, weights)
    start = noised(image, noise, process.levels[first], backend=backend)
    if target.free_slots(table) is not None:
        stepper = Stepper(table, seeds=keys, target=target, backend=backend)
        return walk(stepper, guided(model), start, mask=keep, generator=generator)
    rows = blend_rows(weights, compute_dtype(image.dtype, noise.dtype), image.device)

    def second_pass(index: int, sample: Tensor) -> Tensor:
        return blended(sample, image, noise, keep, rows, index, sample, backend)

    stepper = Stepper(table, seeds=keys, backend=backend)
    return walk(stepper, guided(model), start, generator=generator, after_step=second_pass)
