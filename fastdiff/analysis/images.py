# SPDX-License-Identifier: MIT
"""Samples as a picture: one grid, encoded with Pillow and written whole."""

from __future__ import annotations

import ctypes
import io
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..errors import error_message, require
from ..files import check_writable, write_whole

#: Grey between the tiles of a grid, and how wide it is in pixels of the picture.
GAP, GAP_VALUE = 2, 96


def save_grid(samples: Tensor, path: str | Path, *, columns: int, scale: int = 1) -> None:
    """Write images as a grid, row by row.

    Args:
        samples: ``[N, 1, H, W]`` (grey) or ``[N, 3, H, W]``, in [−1, 1]; values outside are clamped.
        path: of the picture; its ending chooses the format.
        columns: images a row.
        scale: pixels of the picture a pixel of an image.

    Raises:
        ValueError: the samples are not images, or there are none; Pillow cannot write such a picture.
        OSError: the file cannot be written.  One that was there is as it was.
        ImportError: Pillow is missing.
    """
    picture = _grid(samples, columns, scale, "save_grid")
    pillow = _pillow("save_grid")
    write_whole(path, _encoded(pillow, picture, path, "save_grid", "path"), operation="save_grid", argument="path")


def grid_bytes(samples: Tensor, *, columns: int, scale: int = 1) -> bytes:
    """Return the grid of `save_grid` as the bytes of a PNG file; arguments and errors as there."""
    buffer = io.BytesIO()
    _grid(samples, columns, scale, "grid_bytes").save(buffer, format="PNG")
    return buffer.getvalue()


def image_bytes(image: Tensor) -> bytes:
    """Return an image as the bytes of a PNG file.

    Args:
        image: ``[1, H, W]`` (grey) or ``[3, H, W]``, in [−1, 1]; values outside are clamped.

    Raises:
        ValueError: it is no image.
        ImportError: Pillow is missing.
    """
    pillow = _pillow("image_bytes")
    if image.dim() != 3 or image.shape[0] not in (1, 3) or image.numel() == 0:
        got, expected = f"has shape {list(image.shape)}", "[1 or 3, H, W]"
        raise ValueError(error_message("image_bytes", "image", got, expected, "decode latents to images first"))
    buffer = io.BytesIO()
    _picture(pillow, _pixels(image)).save(buffer, format="PNG")
    return buffer.getvalue()


def _pixels(samples: Tensor) -> Tensor:
    """Return samples in [−1, 1] as uint8 on the CPU."""
    return ((samples.detach().float().cpu().clamp(-1.0, 1.0) + 1.0) * 127.5).round().to(torch.uint8)


def _picture(pillow: ModuleType, pixels: Tensor) -> Any:
    """Return uint8 pixels on the CPU, ``[1 or 3, H, W]``, as a picture of Pillow."""
    mode, data = ("L", pixels[0]) if len(pixels) == 1 else ("RGB", pixels.permute(1, 2, 0))
    data = data.contiguous()
    # The bytes of the tensor without numpy: torch alone is what fastdiff may count on.
    return pillow.frombytes(mode, (pixels.shape[2], pixels.shape[1]), ctypes.string_at(data.data_ptr(), data.numel()))


def _grid(samples: Tensor, columns: int, scale: int, operation: str) -> Any:
    """Return a grid of images as a picture of Pillow."""
    pillow = _pillow(operation)
    if samples.dim() != 4 or samples.shape[1] not in (1, 3) or samples.shape[0] == 0 or columns < 1:
        raise ValueError(
            error_message(
                operation,
                "samples",
                f"has shape {list(samples.shape)} for {columns} columns",
                "[N, 1 or 3, H, W] with N of 1 or more, in 1 column or more",
                "decode latents to images first",
            )
        )
    pixels = _pixels(samples)
    pixels = pixels.repeat_interleave(scale, dim=2).repeat_interleave(scale, dim=3)
    count, channels, height, width = pixels.shape
    rows = -(-count // columns)
    grid = torch.full(
        (channels, rows * (height + GAP) + GAP, columns * (width + GAP) + GAP), GAP_VALUE, dtype=torch.uint8
    )
    for i, image in enumerate(pixels):
        top, left = GAP + (i // columns) * (height + GAP), GAP + (i % columns) * (width + GAP)
        grid[:, top : top + height, left : left + width] = image
    return _picture(pillow, grid)


def check_grid_path(
    path: str | Path, shape: tuple[int, int, int, int], *, columns: int, scale: int, operation: str, argument: str
) -> None:
    """Refuse a path that `save_grid` could not write a grid to, before there are samples.

    Args:
        path: of the picture.
        shape: of the samples, ``[N, 1 or 3, H, W]``.
        columns, scale: as in `save_grid`.
        operation, argument: who asks for it and how the path was named, for messages.

    Raises:
        ValueError: its folder is missing or read-only, or Pillow cannot write such a picture.
        ImportError: Pillow is missing.
    """
    pillow = _pillow(operation)
    count, channels, height, width = shape
    rows = -(-count // columns)
    size = (columns * (width * scale + GAP) + GAP, rows * (height * scale + GAP) + GAP)
    # Trying is what finds a codec that Pillow was built without, and a picture too wide for its format.
    _encoded(pillow, pillow.new("L" if channels == 1 else "RGB", size), path, operation, argument)
    check_writable(path, operation=operation, argument=argument)


def _pillow(operation: str) -> ModuleType:
    pillow = require("PIL.Image", "cli", operation)
    pillow.init()
    return pillow


def _encoded(pillow: ModuleType, picture: Any, path: str | Path, operation: str, argument: str) -> bytes:
    """Return a picture's file, in the format that the path's ending chooses."""
    name = pillow.registered_extensions().get(Path(path).suffix.lower())
    buffer = io.BytesIO()
    try:
        if name not in pillow.SAVE:
            raise ValueError("Pillow writes no format of this ending")
        picture.save(buffer, format=name)
    except (ValueError, OSError, KeyError) as error:
        size = f"a picture of {picture.size[0]} by {picture.size[1]} pixels"
        raise ValueError(
            error_message(
                operation,
                argument,
                f"is {str(path)!r}, which cannot hold {size} ({error})",
                "an ending such as .png, .jpg or .webp",
                "choose .png, which holds any grid",
            )
        ) from error
    return buffer.getvalue()
