# SPDX-License-Identifier: MIT
"""The demo model of fastdiff: a small class-conditional diffusion model of 8x8 handwritten digits.

``unet`` holds the network and the loader of the packaged weights; ``data`` the digits and the measures of generated
ones (these need scikit-learn); ``train`` the script that produced ``weights.safetensors`` and ``figures.json``, the
figures it was measured at. It is small enough to sample on a CPU in seconds, and real enough to compare samplers on.
"""

from __future__ import annotations

from .unet import (
    IMAGE_SHAPE,
    NULL_CLASS,
    NUM_CLASSES,
    WEIGHTS_PATH,
    DigitUNet,
    load_digit_unet,
)

__all__ = ["IMAGE_SHAPE", "NULL_CLASS", "NUM_CLASSES", "WEIGHTS_PATH", "DigitUNet", "load_digit_unet"]
