# SPDX-License-Identifier: MIT
"""Pictures of a model of this library's training, with its text encoder."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ...editing import image_to_image
from ...errors import error_message
from ...guidance import GuidedModel
from ...ops import randn
from ...philox import as_seeds
from ...row_layout import compute_dtype
from ...samplers import BaseSampler
from ...sampling.model_mode import evaluating
from ...solvers import SamplingMethod
from ..model.diffusion_model import AdvancedUNet, DiffusionModel
from ..model.sampling import takes_variance
from ..model.text_encoder import TextEncoder, encode_prompts
from .conversion import from_picture, to_picture
from .memory_options import MemoryOptions
from .request import PictureRequest

if TYPE_CHECKING:
    from PIL.Image import Image


class ModelPictures:
    """A `DiffusionModel` that makes one picture a call; its samples are the pictures.

    Args:
        operation: for messages.
        model: the model.
        text_encoder: None for a model without.
        method: a name of `fastdiff.SamplingMethod`; the configuration's where None.

    Raises:
        ValueError: the method is unknown.
    """

    def __init__(
        self,
        operation: str,
        model: DiffusionModel,
        text_encoder: TextEncoder | None,
        method: str | None,
    ) -> None:
        self.model, self.text_encoder, self.method = model, text_encoder, method
        inner = model.unet.unet if isinstance(model.unet, AdvancedUNet) else model.unet
        self.memory = MemoryOptions(operation, {"unet": inner})
        if method is not None:
            SamplingMethod.parse(method)

    def sampler(self, num_inference_steps: int | None) -> BaseSampler:
        """Return a sampler over the model's schedule."""
        return self.model.scheduler.sampler(self.method, num_inference_steps)

    @torch.no_grad()
    def generate(self, request: PictureRequest) -> Image:
        """Return a new picture, of the configuration's size where none is asked for.

        Raises:
            ValueError: the size or a prompt does not fit the model.
        """
        self._check_options(request)
        config, place = self.model.config, next(self.model.parameters())
        height, width = request.height or config.image_size, request.width or config.image_size
        seeds = self._seeds(request, place.device)
        sampler = self.sampler(request.num_inference_steps)
        with self._evaluating():
            guided = self._guided(request, place, sampler)
            samples = sampler.sample(
                guided.model,
                randn((1, config.in_channels, height, width), seeds, dtype=compute_dtype(place.dtype))
                * sampler.init_noise_sigma,
                guided.prompt_embeds,
                guided.negative_prompt_embeds,
                guidance_scale=guided.guidance_scale,
                seeds=seeds,
                model_dtype=guided.model_dtype,
            ).samples
        return to_picture(samples[0])

    @torch.no_grad()
    def vary(self, request: PictureRequest, image: Image) -> Image:
        """Return a variation of a picture by SDEdit (arXiv 2108.01073), of the picture's size.

        Raises:
            ValueError: the picture or a prompt does not fit the model.
        """
        self._check_options(request)
        place = next(self.model.parameters())
        clean = from_picture(image, self.model.config.in_channels)[None].to(place.device, compute_dtype(place.dtype))
        seeds = self._seeds(request, place.device)
        sampler = self.sampler(request.num_inference_steps)
        strength = 1.0 if request.strength is None else request.strength
        with self._evaluating():
            guided = self._guided(request, place, sampler)
            samples = image_to_image(sampler, guided, clean, strength=strength, seeds=seeds)
        return to_picture(samples[0])

    def to(self, device: torch.device | str) -> None:
        """Move the model, and the text encoder if it is a module."""
        self.model.to(device)
        if isinstance(self.text_encoder, nn.Module):
            self.text_encoder.to(device)

    def _guided(self, request: PictureRequest, place: Tensor, sampler: BaseSampler) -> GuidedModel:
        """Return the model with the conditions of the prompts."""
        conditioned: Tensor | None = None
        unconditioned: Tensor | None = None
        scale = 1.0
        if self.text_encoder is not None:
            scale = self.model.config.guidance_scale if request.guidance_scale is None else request.guidance_scale
            conditioned = encode_prompts(self.text_encoder, [request.prompt or ""], place)
            if scale != 1.0:
                unconditioned = encode_prompts(self.text_encoder, [request.negative_prompt or ""], place)
        else:
            for name in ("prompt", "negative_prompt"):
                if getattr(request, name):
                    got, remedy = "is given to a model without a text encoder", "pass text_encoder=, or leave it out"
                    raise ValueError(error_message(request.operation, name, got, "a model with prompts", remedy))
        dtype = compute_dtype(place.dtype)
        return GuidedModel(
            self.model.for_sampler(sampler),
            conditioned,
            unconditioned,
            guidance_scale=scale,
            channels=2 if takes_variance(sampler) else 1,
            model_dtype=None if place.dtype == dtype else place.dtype,
        )

    def _evaluating(self) -> contextlib.ExitStack:
        """Return a block in which model and text encoder are in evaluation mode."""
        block = contextlib.ExitStack()
        block.enter_context(evaluating(self.model))
        block.enter_context(evaluating(self.text_encoder))
        return block

    @staticmethod
    def _check_options(request: PictureRequest) -> None:
        for name in request.options:
            got, expected = "is given for a model of fastdiff", "an argument of generate_image"
            raise ValueError(error_message(request.operation, name, got, expected, "leave it out"))

    @staticmethod
    def _seeds(request: PictureRequest, device: torch.device) -> Tensor:
        """Return the seed ``[1]``; from torch's generator where none is asked for."""
        seed = int(torch.randint(2**62, ())) if request.seed is None else request.seed
        return as_seeds([seed], 1, device)
