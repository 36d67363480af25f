# SPDX-License-Identifier: MIT
"""k-diffusion's Brownian noise sampler with torchsde's numbers, drawn by the extension where it can."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import error_message, require
from ..noise.brownian_tree import Tree, is_supported, why_by_torchsde


class BrownianTreeNoiseSampler:
    """The noise sampler of k-diffusion's name: normalized increments of torchsde's Brownian tree.

    With one seed for the batch, or with the seeds of a list, it gives the numbers of k-diffusion's class to rounding.
    A sample's increments depend on its seed, its shape and the range; those of `fastdiff.noise.BrownianPath` do not
    depend on the range, and need no torchsde.

    Args:
        x: samples, whose shape, dtype and device the noise has.
        sigma_min, sigma_max: the range of the levels.
        seed: an int for the batch, or a list of one int a sample; None draws one.
        transform: from a level, a tensor ``[]``, to a time.

    Raises:
        ImportError: torchsde is not installed.
        ValueError: the number of seeds is not the number of samples.
    """

    def __init__(
        self,
        x: Tensor,
        sigma_min: float | Tensor,
        sigma_max: float | Tensor,
        seed: int | Sequence[int] | None = None,
        transform: Callable[[Tensor], Tensor] = lambda level: level,
    ) -> None:
        torchsde = require("torchsde", "test", "BrownianTreeNoiseSampler")
        self.transform = transform
        start, end = sorted((transform(torch.as_tensor(sigma_min)), transform(torch.as_tensor(sigma_max))), key=float)
        self._decreases = float(transform(torch.as_tensor(sigma_min))) > float(transform(torch.as_tensor(sigma_max)))
        self._batched = isinstance(seed, Sequence)
        if seed is None:
            seed = int(torch.randint(0, 2**63 - 1, []))
        seeds = list(seed) if isinstance(seed, Sequence) else [seed]
        if self._batched and len(seeds) != x.shape[0]:
            raise ValueError(
                error_message(
                    "BrownianTreeNoiseSampler", "seed", f"has {len(seeds)}", f"{x.shape[0]}, one a sample", "add seeds"
                )
            )
        like = torch.zeros_like(x[0] if self._batched else x)
        self._trees = [torchsde.BrownianTree(start, like, end, entropy=one) for one in seeds]
        self._like = like
        intervals = [tree._interval for tree in self._trees]
        fast = all(is_supported(interval) for interval in intervals) and not why_by_torchsde()
        self._fast = [Tree(interval) for interval in intervals] if fast else None

    def __call__(self, sigma: float | Tensor, sigma_next: float | Tensor) -> Tensor:
        """Return (W(t1) − W(t0))/√|t1 − t0|, like x, with the signs of k-diffusion's class."""
        t0, t1 = self.transform(torch.as_tensor(sigma)), self.transform(torch.as_tensor(sigma_next))
        sign = (-1.0 if self._decreases else 1.0) * (1.0 if t0 < t1 else -1.0)
        before, after = sorted((t0, t1), key=float)
        deviation = math.sqrt(float((t1 - t0).abs()))
        parts: list[Any] = []
        for index, tree in enumerate(self._trees):
            out = torch.empty_like(self._like)
            fast = None if self._fast is None else self._fast[index]
            if fast is None or not fast.increment(float(before), float(after), sign / deviation, out):
                out = tree(before, after) * (sign / deviation)
            parts.append(out)
        return torch.stack(parts) if self._batched else parts[0]
