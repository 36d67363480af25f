# SPDX-License-Identifier: MIT
"""A small class-conditional U-Net for 8x8 grey images, called the way diffusers calls its U-Nets.

Two resolutions, 8x8 and 4x4, with residual blocks steered by time and class, and self-attention on the 16 places of the
4x4 level. The layout follows Ho, Jain and Abbeel, "Denoising Diffusion Probabilistic Models" (2020); scale-and-shift
conditioning follows Dhariwal and Nichol, "Diffusion Models Beat GANs on Image Synthesis" (2021).
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..errors import error_message, require

NUM_CLASSES = 10
NULL_CLASS = 10
IMAGE_SHAPE = (1, 8, 8)
WEIGHTS_PATH = Path(__file__).with_name("weights.safetensors")

_NORM_GROUPS = 8


def timestep_features(t: Tensor, width: int) -> Tensor:
    """Sines and cosines of ``t`` at ``width / 2`` frequencies from 1 down to 1/10000.

    Args:
        t: ``[B]``, any real dtype; fractions are kept, so samplers may stop between two training timesteps.
        width: an even number.

    Returns:
        ``[B, width]`` float32.
    """
    half = width // 2
    exponents = torch.arange(half, device=t.device, dtype=torch.float32) / half
    angles = t.to(torch.float32)[:, None] * torch.exp(-math.log(10000.0) * exponents)
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with a scale and a shift from the embedding between them."""

    def __init__(self, channels_in: int, channels_out: int, embedding: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(_NORM_GROUPS, channels_in)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.steer = nn.Linear(embedding, 2 * channels_out)
        self.norm2 = nn.GroupNorm(_NORM_GROUPS, channels_out)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1)
        self.bypass = nn.Conv2d(channels_in, channels_out, 1) if channels_in != channels_out else nn.Identity()
        # A block that starts as the identity lets the first, warm-up steps train the input and output layers.
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """``x [B, channels_in, H, W]`` and ``embedding [B, E]`` to ``[B, channels_out, H, W]``."""
        scale, shift = self.steer(embedding)[:, :, None, None].chunk(2, dim=1)
        h = self.conv1(functional.silu(self.norm1(x)))
        h = self.norm2(h) * (1 + scale) + shift
        h = self.conv2(self.dropout(functional.silu(h)))
        out: Tensor = self.bypass(x) + h
        return out


class SelfAttention(nn.Module):
    """Self-attention among all places of a feature map (Vaswani et al., 2017), added to its input."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.GroupNorm(_NORM_GROUPS, channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)
        nn.init.zeros_(self.out.weight)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, H, W]`` to ``[B, C, H, W]``."""
        batch, channels, height, width = x.shape
        qkv = self.qkv(self.norm(x)).view(batch, 3, self.heads, channels // self.heads, height * width)
        query, key, value = qkv.transpose(-1, -2).unbind(1)
        mixed = functional.scaled_dot_product_attention(query, key, value)
        out: Tensor = x + self.out(mixed.transpose(-1, -2).reshape(batch, channels, height, width))
        return out


class DigitUNet(nn.Module):
    """Predicts the velocity ``v`` of a noisy 8x8 digit (Salimans and Ho, 2022), given its timestep and its class.

    Args:
        base: channels of the 8x8 level, a multiple of 8.
        deep: channels of the 4x4 level, a multiple of 32 (8 norm groups, 4 attention heads).
        embedding: width of the embedding of time and class.
        dropout: share of features dropped inside each residual block while training.
    """

    def __init__(self, base: int = 32, deep: int = 64, embedding: int = 128, dropout: float = 0.1) -> None:
        super().__init__()
        self.embedding = embedding
        self.time = nn.Sequential(nn.Linear(embedding, embedding), nn.SiLU(), nn.Linear(embedding, embedding))
        self.label = nn.Embedding(NUM_CLASSES + 1, embedding)
        self.enter = nn.Conv2d(IMAGE_SHAPE[0], base, 3, padding=1)
        self.down1 = ResidualBlock(base, base, embedding, dropout)
        self.shrink = nn.Conv2d(base, deep, 2, stride=2)
        self.deep1 = ResidualBlock(deep, deep, embedding, dropout)
        self.attention = SelfAttention(deep, heads=4)
        self.deep2 = ResidualBlock(deep, deep, embedding, dropout)
        self.deep3 = ResidualBlock(deep, deep, embedding, dropout)
        self.grow = nn.ConvTranspose2d(deep, base, 2, stride=2)
        self.up1 = ResidualBlock(2 * base, base, embedding, dropout)
        self.up2 = ResidualBlock(2 * base, base, embedding, dropout)
        self.norm = nn.GroupNorm(_NORM_GROUPS, base)
        self.leave = nn.Conv2d(base, IMAGE_SHAPE[0], 3, padding=1)
        nn.init.zeros_(self.leave.weight)

    def forward(self, x: Tensor, t: Tensor, encoder_hidden_states: Tensor | None = None) -> Tensor:
        """Predict the velocity.

        Args:
            x: ``[B, 1, 8, 8]``, any floating dtype; computed in the dtype of the weights.
            t: timestep ``[]`` or ``[B]`` in 0..999, integer or floating, fractions allowed.
            encoder_hidden_states: class labels ``[B]`` int64, 0..9, or 10 for no class; None means no class for all.

        Returns:
            ``[B, 1, 8, 8]`` in the dtype of ``x``.

        Raises:
            ValueError: a shape, dtype or label is not as above. Labels are read only on the CPU, since reading them on
                an accelerator would make every call wait for the device.
        """
        labels = encoder_hidden_states
        if labels is None:
            labels = torch.full((x.shape[0],), NULL_CLASS, dtype=torch.int64, device=x.device)
        _check_inputs(x, t, labels)
        dtype = self.enter.weight.dtype
        time = self.time(timestep_features(t.to(x.device).expand(x.shape[0]), self.embedding).to(dtype))
        steer = functional.silu(time + self.label(labels))

        first = self.enter(x.to(dtype))
        second = self.down1(first, steer)
        h = self.deep1(self.shrink(second), steer)
        h = self.deep2(self.attention(h), steer)
        h = self.grow(self.deep3(h, steer))
        h = self.up1(torch.cat([h, second], dim=1), steer)
        h = self.up2(torch.cat([h, first], dim=1), steer)
        out: Tensor = self.leave(functional.silu(self.norm(h)))
        return out.to(x.dtype)


def _check_inputs(x: Tensor, t: Tensor, labels: Tensor) -> None:
    if x.ndim != 4 or tuple(x.shape[1:]) != IMAGE_SHAPE or not x.is_floating_point():
        got = f"has shape {list(x.shape)} and dtype {x.dtype}"
        raise ValueError(error_message("DigitUNet", "x", got, "a floating [B, 1, 8, 8]", "pass images in [-1, 1]"))
    if t.ndim > 1 or (t.ndim == 1 and t.shape[0] not in (1, x.shape[0])):
        got = f"has shape {list(t.shape)}"
        expected = f"[] or [{x.shape[0]}]"
        raise ValueError(error_message("DigitUNet", "t", got, expected, "pass one timestep, or one for each image"))
    remedy = f"pass class labels 0..{NUM_CLASSES - 1}, or {NULL_CLASS} for no class"
    if tuple(labels.shape) != (x.shape[0],) or labels.dtype != torch.int64:
        got = f"has shape {list(labels.shape)} and dtype {labels.dtype}"
        raise ValueError(
            error_message("DigitUNet", "encoder_hidden_states", got, f"[{x.shape[0]}] torch.int64", remedy)
        )
    if labels.device.type == "cpu" and labels.numel() > 0:
        low, high = (int(bound) for bound in torch.aminmax(labels))
        if low < 0 or high > NULL_CLASS:
            got = f"holds {low if low < 0 else high}"
            raise ValueError(error_message("DigitUNet", "encoder_hidden_states", got, f"0..{NULL_CLASS}", remedy))


def load_digit_unet(path: str | Path | None = None, device: str | torch.device = "cpu") -> DigitUNet:
    """Load trained weights, ready for sampling: evaluation mode, no gradients, float32.

    Args:
        path: a safetensors file written by ``fastdiff.digits.train``; None takes the one of the package.
        device: where the model is to live.

    Raises:
        FileNotFoundError: there is no such file.
    """
    file = WEIGHTS_PATH if path is None else Path(path)
    if not file.is_file():
        got = f"is {str(file)!r}, which does not exist"
        remedy = "train one with: python -m fastdiff.digits.train --out DIRECTORY"
        raise FileNotFoundError(error_message("load_digit_unet", "path", got, "a safetensors file", remedy))
    safetensors = require("safetensors.torch", "training", "load_digit_unet")
    model = DigitUNet()
    model.load_state_dict(safetensors.load_file(file))
    return model.to(device).eval().requires_grad_(False)
