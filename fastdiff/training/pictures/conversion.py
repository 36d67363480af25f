# SPDX-License-Identifier: MIT
"""Pictures of Pillow from samples, and samples from pictures."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...errors import checked_type, error_message, require

if TYPE_CHECKING:
    from PIL.Image import Image

#: Modes of Pillow by number of channels: grey, grey and alpha, colours, colours and alpha.
MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}


def to_picture(sample: Tensor) -> Image:
    """Return a sample as a picture of Pillow; values outside of [−1, 1] are clamped.

    Args:
        sample: ``[C, H, W]`` with C of 1 to 4, in [−1, 1].

    Raises:
        ImportError: Pillow is missing.
        ValueError: it is no image.
    """
    pillow = require("PIL.Image", "cli", "to_picture")
    if sample.dim() != 3 or sample.shape[0] not in MODES:
        got, remedy = f"has shape {list(sample.shape)}", "decode latents to images first"
        raise ValueError(error_message("to_picture", "sample", got, "[1 to 4, H, W]", remedy))
    pixels = ((sample.detach().float().cpu().clamp(-1.0, 1.0) + 1.0) * 127.5).round().to(torch.uint8)
    channels, height, width = pixels.shape
    # Bytes rather than numpy: torch alone is what fastdiff may count on.
    data = bytes(pixels.permute(1, 2, 0).contiguous().flatten().tolist())
    picture: Image = pillow.frombytes(MODES[channels], (width, height), data)
    return picture


def from_picture(picture: Image, channels: int) -> Tensor:
    """Return a picture as float32 ``[channels, H, W]`` in [−1, 1], converted to the mode of so many channels.

    Raises:
        ValueError: there is no mode of so many channels.
    """
    if channels not in MODES:
        got, remedy = f"has {channels} channels", "edit its samples by fastdiff.editing.image_to_image"
        raise ValueError(error_message("from_picture", "the model", got, "1 to 4, those of pictures", remedy))
    converted = picture.convert(MODES[channels])
    pixels = torch.frombuffer(bytearray(converted.tobytes()), dtype=torch.uint8)
    planes = pixels.reshape(converted.height, converted.width, channels).permute(2, 0, 1)
    return planes.to(torch.float32) / 127.5 - 1.0


def checked_picture(operation: str, image: Any) -> Image:
    """Return a picture of Pillow.

    Raises:
        ImportError: Pillow is missing.
        TypeError: it is something else.
    """
    pillow = require("PIL.Image", "cli", operation)
    remedy = "open it with PIL.Image.open, or make it with torchvision or Pillow"
    checked_type(operation, "image", image, pillow.Image, "a PIL.Image.Image", remedy)
    picture: Image = image
    return picture
