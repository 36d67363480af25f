# SPDX-License-Identifier: MIT
"""Pictures from prompts: a pipeline of diffusers with fused steps, or a model of this library's training."""

from __future__ import annotations

import copy
import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ...errors import error_message, require
from ..config import DiffusionConfig
from ..model.diffusion_model import AdvancedUNet, DiffusionModel
from ..model.from_checkpoint import load_trained_model
from ..model.text_encoder import SmallTextEncoder, TextEncoder
from .conversion import checked_picture
from .diffusers_pictures import DiffusersPictures
from .model_pictures import ModelPictures
from .request import PictureRequest

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["AdvancedDiffusionPipeline"]

_NAME = "AdvancedDiffusionPipeline"


class AdvancedDiffusionPipeline:
    """Makes pictures from prompts, and variations of pictures.

    Args:
        source: one of these:

            - a text-to-image pipeline of diffusers, whose schedulers get fused steps in place (`fastdiff.patch`);
            - the folder of one, as its ``save_pretrained`` writes it; weights are read from safetensors files alone;
            - a `DiffusionModel` or an `AdvancedUNet`, whose samples are the pictures;
            - a trainer, whose averaged weights are copied; or the folder of a checkpoint, of several, or of a run of
              ``fastdiff train``;
            - a `DiffusionConfig`: a model **with random weights**, to try a configuration out.  A warning says so.
        text_encoder: for a model of fastdiff, a callable from a list of prompts to the model's condition ``[B, ...]``;
            the empty prompt is the null condition.  A trainer, a checkpoint and a configuration with
            `use_spatial_transformer` bring a `SmallTextEncoder`.
        config: for a pipeline of diffusers, `num_inference_steps`, `guidance_scale` and the memory options; without it
            the pipeline's own defaults apply.  A model has its own.
        method: for a model of fastdiff, a name of `fastdiff.SamplingMethod`; the configuration's where None.
        device: moves everything there; None leaves it where it is.

    Attributes:
        pipe: the pipeline of diffusers, or None.
        model: the `DiffusionModel`, or None.
        config: the settled configuration, or None.

    Raises:
        ImportError: diffusers, transformers, or xFormers where it is asked for, is missing.
        FileNotFoundError, ValueError: the folder, a memory option or another argument does not fit.
        TypeError: the source is none of these.

    Warns:
        UserWarning: the weights are random; or a scheduler of the pipeline has no fused class.
    """

    def __init__(
        self,
        source: Any,
        *,
        text_encoder: TextEncoder | None = None,
        config: DiffusionConfig | None = None,
        method: str | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        self.pipe: Any = None
        self.model: DiffusionModel | None = None
        if isinstance(source, (str, os.PathLike)) and (Path(source) / "model_index.json").is_file():
            loader = require("diffusers", "diffusers", _NAME).DiffusionPipeline
            source = loader.from_pretrained(str(source), local_files_only=True, use_safetensors=True)
        found = _trained_model(source, text_encoder)
        self._pictures: DiffusersPictures | ModelPictures
        if found is not None:
            if config is not None:
                raise _refused("config", "is given beside a model, which has its own", "None", "leave it out")
            self.model, encoder = found
            self.config: DiffusionConfig | None = self.model.config
            self._pictures = ModelPictures(_NAME, self.model, encoder, method)
        else:
            for name, value, remedy in (
                ("text_encoder", text_encoder, "set pipe.text_encoder instead"),
                ("method", method, "set pipe.scheduler instead"),
            ):
                if value is not None:
                    raise _refused(name, "is given beside a pipeline of diffusers", "None", remedy)
            self.pipe = _checked_pipeline(source)
            self.config = None if config is None else config.validate()
            self._pictures = DiffusersPictures(_NAME, self.pipe)
        options = [] if self.config is None else self._pictures.memory.of_config(self.config)
        if device is not None:
            self._pictures.to(device)
        for turn_on in options:
            turn_on()

    def generate_image(
        self,
        prompt: str | None = None,
        negative_prompt: str | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        width: int | None = None,
        height: int | None = None,
        *,
        seed: int | None = None,
        **options: Any,
    ) -> Image:
        """Make a picture.

        Args:
            prompt: what to show; None for a model without prompts, or a pipeline that is given `prompt_embeds`.
            negative_prompt: the condition that guidance moves away from; None for the null condition.
            num_inference_steps, guidance_scale: the configuration's where None, else the pipeline's defaults.
            width, height: in pixels; the size that the model was trained at where None.
            seed: of all noise: the same seed gives the same picture.  None takes torch's generator.
            options: further arguments of the pipeline of diffusers, such as ``prompt_embeds``.

        Returns:
            a picture of Pillow: RGB from a pipeline; from a model L, LA, RGB or RGBA by its channels.

        Raises:
            TypeError, ValueError: an argument does not fit the model or the pipeline.
        """
        request = PictureRequest(
            f"{_NAME}.generate_image",
            prompt,
            negative_prompt,
            self._default("num_inference_steps", num_inference_steps),
            self._default("guidance_scale", guidance_scale),
            width,
            height,
            seed,
            options=options,
        )
        return self._pictures.generate(request)

    def generate_variations(
        self,
        image: Image,
        prompt: str | None = None,
        strength: float = 0.8,
        negative_prompt: str | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        *,
        seed: int | None = None,
        **options: Any,
    ) -> Image:
        """Make a variation of a picture: noise it to a level in the middle of the loop and sample from there.

        Args:
            image: a picture of Pillow, converted to the model's channels.
            prompt, negative_prompt, num_inference_steps, guidance_scale, seed, options: as in `generate_image`.
            strength: the part of the loop that is run, above 0 and up to 1; ``int(strength·n)`` of n steps.

        Returns:
            a picture of the size of `image`; a pipeline may round it to what its VAE takes.

        Raises:
            TypeError, ValueError: an argument does not fit, or there is no image-to-image pipeline of this kind.
        """
        operation = f"{_NAME}.generate_variations"
        request = PictureRequest(
            operation,
            prompt,
            negative_prompt,
            self._default("num_inference_steps", num_inference_steps),
            self._default("guidance_scale", guidance_scale),
            seed=seed,
            strength=strength,
            options=options,
        )
        return self._pictures.vary(request, checked_picture(operation, image))

    def to(self, device: torch.device | str) -> AdvancedDiffusionPipeline:
        """Move everything to a device and return the pipeline."""
        self._pictures.to(device)
        return self

    def enable_attention_slicing(self, slice_size: int | str | None = "auto") -> None:
        """Compute attention in slices: less memory, slower than `enable_memory_efficient_attention`.

        Args:
            slice_size: as diffusers takes it: ``"auto"`` for two slices, ``"max"`` for one at a time, a number, or
                None to turn slicing off.

        Raises:
            ValueError: no part of the pipeline slices its attention.
        """
        self._pictures.memory.attention_slicing(slice_size)()

    def enable_vae_slicing(self) -> None:
        """Let the VAE take one image at a time.

        Raises:
            ValueError: there is no VAE, or it cannot.
        """
        self._pictures.memory.vae_slicing()()

    def enable_memory_efficient_attention(self) -> None:
        """Compute attention by torch's scaled_dot_product_attention, diffusers' default.

        Raises:
            ValueError: no part of the pipeline lets its attention be chosen.
        """
        self._pictures.memory.memory_efficient_attention()()

    def enable_xformers(self) -> None:
        """Compute attention by xFormers.

        Raises:
            ImportError: xFormers is missing.
            ValueError: there is no CUDA device.
        """
        self._pictures.memory.xformers()()

    def enable_cpu_offload(self, *, sequential: bool = False) -> None:
        """Keep the models of a pipeline on the CPU while they are not used.

        Args:
            sequential: move single layers instead of whole models: less memory, and much slower.

        Raises:
            ImportError: accelerate is missing.
            ValueError: there is no accelerator, or no pipeline of diffusers.
        """
        self._pictures.memory.cpu_offload(sequential=sequential)()

    def _default(self, name: str, value: Any) -> Any:
        return value if value is not None or self.config is None else getattr(self.config, name)


def _trained_model(source: Any, text_encoder: TextEncoder | None) -> tuple[DiffusionModel, TextEncoder | None] | None:
    """Return the model of a source and its text encoder; None where the source is no model of fastdiff."""
    if isinstance(source, DiffusionConfig):
        model = DiffusionModel(source)
        got, remedy = "is a configuration alone, so the weights are random", "pass a trained model to see pictures"
        warnings.warn(error_message(_NAME, "source", got, "a trained model for pictures", remedy), stacklevel=3)
        if text_encoder is None and model.config.use_spatial_transformer:
            text_encoder = SmallTextEncoder(model.config.context_dim)
        return model, text_encoder
    if isinstance(source, DiffusionModel):
        return source, text_encoder
    if isinstance(source, AdvancedUNet):
        return DiffusionModel(source.config, source), text_encoder
    if hasattr(source, "averaged_weights"):
        return _of_trainer(source, text_encoder)
    if isinstance(source, (str, os.PathLike)):
        return _of_checkpoint(Path(source), text_encoder)
    return None


def _of_trainer(trainer: Any, text_encoder: TextEncoder | None) -> tuple[DiffusionModel, TextEncoder | None]:
    """Return copies of a trainer's averaged model and text encoder."""
    with trainer.averaged_weights() as modules:
        network, encoder = (None if part is None else _copy(part) for part in (modules.model, modules.text_encoder))
    model = DiffusionModel(trainer.config, network)
    model.scheduler.schedule = trainer.schedule
    return model, text_encoder or encoder or trainer.conditioning.text_encoder


def _copy(module: nn.Module) -> nn.Module:
    """Return a copy of a module without gradients."""
    return copy.deepcopy(module).requires_grad_(False)


def _of_checkpoint(folder: Path, text_encoder: TextEncoder | None) -> tuple[DiffusionModel, TextEncoder | None]:
    """Return the model of a trainer's checkpoint, with averaged weights where there are any.

    Raises:
        FileNotFoundError, ValueError: it is no whole checkpoint of a trainer with an `AdvancedUNet`.
    """
    found = load_trained_model(folder, text_encoder, operation=_NAME, argument="source")
    if not isinstance(found.network, AdvancedUNet):
        got, remedy = (
            f"is {str(folder)!r}, a model of digits by labels",
            "draw its digits with fastdiff sample --weights",
        )
        raise _refused("source", got, "a checkpoint of an AdvancedUNet", remedy)
    return DiffusionModel(found.config, found.network), found.text_encoder


def _checked_pipeline(source: Any) -> Any:
    """Return a pipeline of diffusers.

    Raises:
        TypeError: it is something else.
    """
    kind = require("diffusers", "diffusers", _NAME).DiffusionPipeline
    if not isinstance(source, kind):
        expected = "a pipeline of diffusers, a folder, a DiffusionModel, a trainer or a DiffusionConfig"
        message = error_message(_NAME, "source", f"is a {type(source).__name__}", expected, "pass one of these")
        raise TypeError(message)
    return source


def _refused(argument: str, got: str, expected: str, remedy: str) -> ValueError:
    return ValueError(error_message(_NAME, argument, got, expected, remedy))
