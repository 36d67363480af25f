# SPDX-License-Identifier: MIT
"""Samples as a picture: one grid, written with Pillow."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from .errors import require, sentence

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
        ValueError: the samples are not images, or there are none.
        ImportError: Pillow is missing.
    """
    image_module = require("PIL.Image", "cli", "save_grid")
    if samples.dim() != 4 or samples.shape[1] not in (1, 3) or samples.shape[0] == 0 or columns < 1:
        raise ValueError(
            sentence(
                "save_grid",
                "samples",
                f"has shape {list(samples.shape)} for {columns} columns",
                "[N, 1 or 3, H, W] with N of 1 or more, in 1 column or more",
                "decode latents to images first",
            )
        )
    pixels = ((samples.detach().float().cpu().clamp(-1.0, 1.0) + 1.0) * 127.5).round().to(torch.uint8)
    pixels = pixels.repeat_interleave(scale, dim=2).repeat_interleave(scale, dim=3)
    count, channels, height, width = pixels.shape
    rows = -(-count // columns)
    grid = torch.full(
        (channels, rows * (height + GAP) + GAP, columns * (width + GAP) + GAP), GAP_VALUE, dtype=torch.uint8
    )
    for i, image in enumerate(pixels):
        top, left = GAP + (i // columns) * (height + GAP), GAP + (i % columns) * (width + GAP)
        grid[:, top : top + height, left : left + width] = image
    mode, data = ("L", grid[0]) if channels == 1 else ("RGB", grid.permute(1, 2, 0))
    size = (grid.shape[2], grid.shape[1])
    # Bytes rather than numpy: torch alone is what fastdiff may count on.
    image_module.frombytes(mode, size, bytes(data.contiguous().flatten().tolist())).save(str(path))
