# SPDX-License-Identifier: MIT
"""Frequency-decoupled guidance: a scale for each band of spatial frequencies, by FFT."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..errors import checked_float, error_message
from ..row_layout import compute_dtype
from .method import Guidance, Place
from .scalars import Scalar
from .vectors import Vector


def band_filters(shape: tuple[int, ...], bands: int, device: torch.device | None = None) -> Tensor:
    """Return the filters that split a signal into bands of an octave each, the highest first.

    Band l of L holds the frequencies with 2^−(l+2) < |f| ≤ 2^−(l+1) in cycles a sample, |f| being the largest of the
    axes; the last holds all below.  The filters are 0 and 1 and add up to 1.

    Args:
        shape: the last dimensions of the signal.
        bands: L, 1 or more.
        device: of the filters.

    Returns:
        float64 ``[L, *shape[:-1], shape[-1] // 2 + 1]``, for the frequencies of `torch.fft.rfftn`.
    """
    frequency = torch.zeros((), dtype=torch.float64, device=device)
    for axis, size in enumerate(shape):
        last = axis == len(shape) - 1
        along = (torch.fft.rfftfreq if last else torch.fft.fftfreq)(size, dtype=torch.float64, device=device).abs()
        frequency = torch.maximum(frequency, along.reshape(-1, *[1] * (len(shape) - 1 - axis)))
    edges = [math.inf, *(2.0 ** -(band + 2) for band in range(bands - 1)), -1.0]
    return torch.stack([((frequency <= high) & (frequency > low)).double() for high, low in itertools.pairwise(edges)])


@functools.lru_cache(maxsize=32)
def _filter(shape: tuple[int, ...], scales: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the weight of each frequency of the difference."""
    filters = band_filters(shape, len(scales), device)
    weights = torch.tensor(scales, dtype=torch.float64, device=device)
    with torch.inference_mode(False):
        found: Tensor = torch.tensordot(weights, filters, dims=1).to(dtype)
        return found


@dataclass(frozen=True, eq=False)
class FrequencyDecoupledGuidance(Guidance):
    """Frequency-decoupled guidance, FDG (arXiv 2506.19713, algorithm 1): m = u + Σ_l g_l·B_l(d∥·η_l + d⊥), d = c − u.

    B_l takes band l of the spatial frequencies, highest first, by FFT (`band_filters`).  The guided output is no
    weighted sum of c and u: it is computed here in two transforms (three with `parallel_weights`), and the step is the
    pass after it.

    Args:
        scales: g_l, one a band.
        parallel_weights: η_l, one a band, of the part of band l of d along band l of c; None for 1.
        axes: the number of trailing dimensions that are space.
        start, stop, noise_ratios: as in `Guidance`.  `scale` and `rescale` have no use here and keep their defaults.
    """

    scales: tuple[float, ...] = (10.0, 5.0)
    parallel_weights: tuple[float, ...] | None = None
    axes: int = 2

    is_affine: ClassVar[bool] = False
    neutral_scale: ClassVar[float | None] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        operation = type(self).__name__
        object.__setattr__(self, "scales", tuple(checked_float(operation, "scales", g, -math.inf) for g in self.scales))
        if not self.scales or (self.parallel_weights is not None and len(self.parallel_weights) != len(self.scales)):
            got = f"has {len(self.scales)} numbers" if not self.scales else f"differs from {self.parallel_weights}"
            remedy = "pass one scale, and one parallel weight, for each band"
            raise ValueError(error_message(operation, "scales", got, "a number for each band", remedy))
        if self.rescale != 0.0:
            raise ValueError(error_message(operation, "rescale", f"is {self.rescale}", "0", "lower the scales instead"))

    def combination(self, branches: Mapping[str, Vector], scale: Scalar, place: Place) -> Vector:
        """Refuse: the guided output has no weights."""
        raise TypeError(
            error_message(type(self).__name__, "combination", "is asked for", "a call of output", "use output(c, u)")
        )

    def output(self, cond: Tensor, uncond: Tensor) -> Tensor:
        """Return the guided output.

        Args:
            cond, uncond: c and u, ``[B, ..., H, W]`` with `axes` dimensions of space.

        Returns:
            m, like `cond`.
        """
        dtype = compute_dtype(cond.dtype)
        c, u = cond.to(dtype), uncond.to(dtype)
        space = tuple(cond.shape[-self.axes :])
        dims = tuple(range(-self.axes, 0))
        difference = torch.fft.rfftn(c - u, dim=dims)
        if self.parallel_weights is None:
            update = difference * _filter(space, self.scales, dtype, cond.device)
        else:
            update = self._decoupled(difference, torch.fft.rfftn(c, dim=dims), space, dtype)
        guided: Tensor = u + torch.fft.irfftn(update, s=space, dim=dims)
        return guided.to(cond.dtype)

    def _decoupled(self, difference: Tensor, cond: Tensor, space: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return Σ_l g_l·B_l(d⊥ + η_l·d∥) in frequencies."""
        assert self.parallel_weights is not None
        filters = band_filters(space, len(self.scales), cond.device).to(dtype)
        # A real signal's spectrum holds each frequency of the last axis twice, but 0 and, of an even size, the last.
        twice = torch.full((cond.shape[-1],), 2.0, dtype=dtype, device=cond.device)
        twice[0] = 1.0
        if space[-1] % 2 == 0:
            twice[-1] = 1.0
        found = torch.zeros_like(difference)
        over = tuple(range(1, cond.dim()))
        for scale, eta, band in zip(self.scales, self.parallel_weights, filters, strict=True):
            d, c = difference * band, cond * band
            along = (d * c.conj()).real.mul(twice).sum(over, keepdim=True)
            length = (c * c.conj()).real.mul(twice).sum(over, keepdim=True)
            share = torch.where(length == 0.0, 0.0, along / length)
            found += scale * (d + (eta - 1.0) * share * c)
        return found
