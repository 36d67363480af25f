# SPDX-License-Identifier: MIT
"""Pictures of a text-to-image pipeline of diffusers, with its schedulers patched."""

from __future__ import annotations

import inspect
import warnings
from typing import TYPE_CHECKING, Any

import torch

from ...diffusers import PatchReport, patch
from ...errors import error_message, require
from .memory_options import MemoryOptions
from .request import PictureRequest

if TYPE_CHECKING:
    from PIL.Image import Image

#: Arguments that would change what a pipeline returns.
_RESERVED = ("output_type", "return_dict", "num_images_per_prompt", "generator")


class DiffusersPictures:
    """A pipeline of diffusers that makes one picture a call.

    Args:
        operation: for messages.
        pipe: the pipeline; its schedulers are patched in place, and `fastdiff.unpatch` undoes it.

    Attributes:
        patched: the report of `fastdiff.patch`.

    Raises:
        ValueError: the pipeline takes no prompt.

    Warns:
        UserWarning: a scheduler was left as it is, with the reason.
    """

    def __init__(self, operation: str, pipe: Any) -> None:
        self.operation, self.pipe = operation, pipe
        if "prompt" not in inspect.signature(pipe.__call__).parameters:
            got = f"is a {type(pipe).__name__}, which takes no prompt"
            remedy = "call it directly after fastdiff.patch(pipe)"
            raise ValueError(error_message(operation, "pipeline", got, "a text-to-image pipeline", remedy))
        self.memory = MemoryOptions(operation, pipe.components, pipe)
        self._image_to_image: Any = None
        self.patched: PatchReport = patch(pipe)
        left = [part for part in self.patched.left if part.reason != "fused already"]
        if left:
            got = "; ".join(f"keeps {part}" for part in left)
            remedy = "choose a scheduler of docs/diffusers.md for fused steps"
            warnings.warn(
                error_message(operation, "the pipeline", got, "schedulers with fused steps", remedy), stacklevel=4
            )

    def generate(self, request: PictureRequest) -> Image:
        """Return a new picture.

        Raises:
            ValueError: the pipeline does not take an argument.
        """
        return self._call(self.pipe, request, {"width": request.width, "height": request.height})

    def vary(self, request: PictureRequest, image: Image) -> Image:
        """Return a variation of a picture, of its size where the pipeline lets it be chosen.

        Raises:
            ValueError: diffusers has no image-to-image pipeline for this one, or it does not take an argument.
        """
        pipe = self._varying(request.operation)
        named = inspect.signature(pipe.__call__).parameters
        size = {name: getattr(image, name) for name in ("width", "height") if name in named}
        return self._call(pipe, request, {"image": image.convert("RGB"), "strength": request.strength, **size})

    def to(self, device: torch.device | str) -> None:
        """Move the pipeline."""
        self.pipe.to(device)

    def _varying(self, operation: str) -> Any:
        """Return diffusers' image-to-image pipeline of the same parts, made once."""
        if self._image_to_image is None:
            library = require("diffusers", "diffusers", operation)
            try:
                made = library.AutoPipelineForImage2Image.from_pipe(self.pipe)
            except (ValueError, KeyError, TypeError) as error:
                got = f"is a {type(self.pipe).__name__}, for which diffusers makes no image-to-image pipeline ({error})"
                remedy = "pass a pipeline of a family that has one, such as Stable Diffusion"
                raise ValueError(
                    error_message(operation, "pipeline", got, "one that AutoPipelineForImage2Image knows", remedy)
                ) from error
            made.set_progress_bar_config(**getattr(self.pipe, "_progress_bar_config", {}))
            self._image_to_image = made
        return self._image_to_image

    def _call(self, pipe: Any, request: PictureRequest, own: dict[str, Any]) -> Image:
        operation = request.operation
        for name in _RESERVED:
            if name in request.options:
                remedy = "pass seed= for noise, and call pipeline.pipe for anything else"
                raise ValueError(error_message(operation, name, "is given", "one picture of Pillow a call", remedy))
        given = {
            "prompt": request.prompt,
            "negative_prompt": request.negative_prompt,
            "num_inference_steps": request.num_inference_steps,
            "guidance_scale": request.guidance_scale,
            **own,
        }
        arguments = {name: value for name, value in given.items() if value is not None} | dict(request.options)
        if request.seed is not None:
            arguments["generator"] = torch.Generator("cpu").manual_seed(request.seed)
        # Pipelines with **kwargs ignore what they do not know.
        named = inspect.signature(pipe.__call__).parameters
        for name in arguments:
            if name not in named:
                got, expected = f"is given to a {type(pipe).__name__}", "an argument that it takes"
                raise ValueError(error_message(operation, name, got, expected, "leave it out"))
        picture: Image = pipe(**arguments, output_type="pil").images[0]
        return picture
