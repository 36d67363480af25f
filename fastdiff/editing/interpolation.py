# SPDX-License-Identifier: MIT
"""Interpolation between noises that keeps them noise: their norm stays, and with it their variance."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import ops
from ..errors import checked_type, error_message
from ..philox import Purpose
from ..row_layout import compute_dtype

#: Samples closer than this in angle (radians), or this close to opposite, are mixed linearly: sin ω has no digits left.
_SMALL_ANGLE = 1e-4


def slerp(first: Tensor, second: Tensor, weight: float | Tensor) -> Tensor:
    """Interpolate spherically, sample by sample: (sin((1 − w)·ω)·a + sin(w·ω)·b)/sin ω, ω the angle between a and b.

    A straight mean of two noises has a lower variance than either; this one has their own (Shoemake 1985;
    arXiv 1609.04468).  The angle and the weights are computed in float64, the sum in the samples' compute dtype.

    Args:
        first, second: a and b, ``[B, ...]``, alike in shape, dtype and device, no sample of zeros.
        weight: w, a number, or ``[B]``: 0 is a and 1 is b.

    Returns:
        Like `first`.

    Raises:
        TypeError, ValueError: the tensors or the weight do not fit.
    """
    remedy = "draw both alike, with fastdiff.randn"
    for name, tensor in (("first", first), ("second", second)):
        checked_type("slerp", name, tensor, Tensor, "a floating-point tensor [B, ...]", remedy)
    if first.shape != second.shape or first.dtype != second.dtype or first.device != second.device:
        got = f"is {list(second.shape)} of {second.dtype} on {second.device}"
        expected = f"{list(first.shape)} of {first.dtype} on {first.device} like first"
        raise ValueError(error_message("slerp", "second", got, expected, remedy))
    if first.dim() == 0 or not first.is_floating_point():
        got = f"has dtype {first.dtype} and {first.dim()} dimensions"
        raise TypeError(error_message("slerp", "first", got, "a floating-point tensor [B, ...]", remedy))
    w = torch.as_tensor(weight, dtype=torch.float64, device=first.device)
    if w.dim() > 1 or (w.dim() == 1 and len(w) != len(first)):
        got, expected = f"has shape {list(w.shape)}", f"a number, or [{len(first)}]"
        raise ValueError(error_message("slerp", "weight", got, expected, "give one weight a sample"))
    a, b = first.flatten(1).double(), second.flatten(1).double()
    cosine = (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))
    angle = torch.arccos(cosine.clamp(-1.0, 1.0))
    sine = angle.sin()
    straight = sine < _SMALL_ANGLE
    of_a = torch.where(straight, 1.0 - w, ((1.0 - w) * angle).sin() / sine)
    of_b = torch.where(straight, w.expand_as(angle), (w * angle).sin() / sine)
    shape = (-1, *[1] * (first.dim() - 1))
    compute = compute_dtype(first.dtype)
    mixed = of_a.to(compute).reshape(shape) * first.to(compute) + of_b.to(compute).reshape(shape) * second.to(compute)
    return mixed.to(first.dtype)


def interpolate_seeds(
    shape: Sequence[int],
    first: int,
    second: int,
    weights: Sequence[float] | Tensor,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Return latents on the way from one seed's to another's.

    Args:
        shape: of one sample, without the batch.
        first, second: seeds, 0 to 2⁶⁴ − 1.
        weights: K numbers, 0 for the latents of `first` and 1 for those of `second`, to the bit.

    Returns:
        ``[K, *shape]``: sample k is the `slerp` of ``fastdiff.randn((1, *shape), first)`` and of `second`'s.

    Raises:
        TypeError, ValueError: an argument does not fit.
    """
    values = torch.as_tensor(weights, dtype=torch.float64)
    if values.dim() != 1 or len(values) == 0:
        got = f"has shape {list(values.shape)}"
        raise ValueError(
            error_message("interpolate_seeds", "weights", got, "a list of numbers", "pass torch.linspace(0, 1, 8)")
        )
    ends = [
        ops.randn((1, *shape), [seed], purpose=Purpose.LATENTS, dtype=dtype, device=device).expand(len(values), *shape)
        for seed in (first, second)
    ]
    latents = slerp(ends[0], ends[1], values.to(device))
    for value, end in ((0.0, ends[0]), (1.0, ends[1])):
        exact = (values == value).to(device).reshape(-1, *[1] * len(shape))
        latents = torch.where(exact, end, latents)
    return latents
