# SPDX-License-Identifier: MIT
"""A small classifier of 8x8 digits, whose last hidden layer is a feature space for metrics of generated digits.

Fréchet distance, precision and recall compare features of real and of generated images; the inception-style score reads
the class probabilities.  ``python -m fastdiff.digits.train_encoder`` trained the packaged weights.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..errors import error_message, require
from .unet import IMAGE_SHAPE, NUM_CLASSES

ENCODER_PATH = Path(__file__).with_name("encoder.safetensors")
FEATURES = 32


class DigitEncoder(nn.Module):
    """Convolutional classifier of digits; calling it gives features, `classify` gives logits."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(IMAGE_SHAPE[0], 16, 3, padding=1)
        self.conv2 = nn.Conv2d(16, 32, 3, padding=1, stride=2)
        self.conv3 = nn.Conv2d(32, 32, 3, padding=1)
        self.features = nn.Linear(32 * 4 * 4, FEATURES)
        self.head = nn.Linear(FEATURES, NUM_CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """Return the features of images.

        Args:
            images: ``[B, 1, 8, 8]`` in [−1, 1], any floating dtype; values outside are clamped, as in a picture.

        Returns:
            ``[B, 32]`` float32.

        Raises:
            ValueError: the images have another shape or dtype.
        """
        if images.ndim != 4 or tuple(images.shape[1:]) != IMAGE_SHAPE or not images.is_floating_point():
            got = f"has shape {list(images.shape)} and dtype {images.dtype}"
            raise ValueError(
                error_message("DigitEncoder", "images", got, "a floating [B, 1, 8, 8]", "pass images in [-1, 1]")
            )
        h = functional.silu(self.conv1(images.float().clamp(-1.0, 1.0)))
        h = functional.silu(self.conv3(functional.silu(self.conv2(h))))
        out: Tensor = functional.silu(self.features(h.flatten(1)))
        return out

    def classify(self, images: Tensor) -> Tensor:
        """Return the logits of the ten classes, ``[B, 10]`` float32, for images as in `forward`."""
        logits: Tensor = self.head(self(images))
        return logits


def load_digit_encoder(path: str | Path | None = None, device: str | torch.device = "cpu") -> DigitEncoder:
    """Load a trained encoder in evaluation mode, without gradients, float32.

    Args:
        path: a safetensors file of ``fastdiff.digits.train_encoder``; None takes the packaged one.
        device: the device of the encoder.

    Raises:
        FileNotFoundError: there is no such file.
        ImportError: safetensors is missing.
    """
    file = ENCODER_PATH if path is None else Path(path)
    if not file.is_file():
        got = f"is {str(file)!r}, which does not exist"
        remedy = "train one with: python -m fastdiff.digits.train_encoder --out DIRECTORY"
        raise FileNotFoundError(error_message("load_digit_encoder", "path", got, "a safetensors file", remedy))
    safetensors = require("safetensors.torch", "training", "load_digit_encoder")
    encoder = DigitEncoder()
    encoder.load_state_dict(safetensors.load_file(file))
    return encoder.to(device).eval().requires_grad_(False)
