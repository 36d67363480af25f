# SPDX-License-Identifier: MIT
"""Random changes of images as a function of the samples' seeds."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from ...errors import checked_float, error_message
from ...philox import Purpose
from ..seeded_uniforms import seeded_uniforms


@dataclass(frozen=True)
class Jitter:
    """Turn, scale and shift a share of the images by a little, as another hand might write them.

    Cubic interpolation; what lies beyond the border is −1.  Called with images ``[B, C, H, W]`` and seeds ``[B]``.

    Args:
        share: of the images that are changed, 0 to 1.
        degrees, scale, pixels: the largest turn, relative change of size and shift.
    """

    share: float = 0.5
    degrees: float = 7.0
    scale: float = 0.06
    pixels: float = 0.4

    def __post_init__(self) -> None:
        for name in ("share", "degrees", "scale", "pixels"):
            checked_float("Jitter", name, getattr(self, name), 0.0)
        if self.share > 1:
            got, remedy = f"is {self.share}", "pass share in that range"
            raise ValueError(error_message("Jitter", "share", got, "0 to 1", remedy))

    def __call__(self, images: Tensor, seeds: Tensor) -> Tensor:
        """Return changed images, like ``images``."""
        draws = seeded_uniforms(seeds, Purpose.JITTER, 6).to(images.dtype)
        turn = (draws[:, 0] * 2 - 1) * math.radians(self.degrees)
        scale = 1 + (draws[:, 1:3] * 2 - 1) * self.scale
        height, width = images.shape[-2:]
        x, y = (draws[:, 3:5] * 2 - 1).unbind(1)
        x, y = x * (self.pixels * 2 / width), y * (self.pixels * 2 / height)
        # affine_grid counts both axes from −1 to 1, which are other numbers of pixels where H and W differ.
        right, up = turn.sin() * (height / width), turn.sin() * (width / height)
        across = torch.stack([turn.cos() * scale[:, 0], -right * scale[:, 0], x], dim=1)
        down = torch.stack([up * scale[:, 1], turn.cos() * scale[:, 1], y], dim=1)
        grid = functional.affine_grid(torch.stack([across, down], dim=1), list(images.shape), align_corners=False)
        moved = functional.grid_sample(images + 1, grid, mode="bicubic", align_corners=False) - 1
        chosen = (draws[:, 5] < self.share).view(-1, 1, 1, 1)
        return torch.where(chosen, moved.clamp(-1, 1), images)
