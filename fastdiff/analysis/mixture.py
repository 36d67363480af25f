# SPDX-License-Identifier: MIT
"""A mixture of Gaussians, whose score is known exactly: a model without training, for pictures and measured orders."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import error_message
from ..schedules import BaseNoiseScheduler
from ..schedules.levels import Level, VariancePreservingPath


@dataclass(frozen=True)
class GaussianMixture:
    """Isotropic Gaussians in D dimensions.

    Args:
        means: ``[K][D]``.
        stds: ``[K]``, above 0.
        weights: ``[K]``, above 0; divided by their sum.

    Raises:
        ValueError: the lengths differ, or a number is out of range.
    """

    means: Sequence[Sequence[float]]
    stds: Sequence[float]
    weights: Sequence[float]

    def __post_init__(self) -> None:
        sizes = {len(mean) for mean in self.means}
        if len(sizes) != 1 or sizes == {0} or not len(self.means) == len(self.stds) == len(self.weights):
            got = (
                f"has {len(self.means)} of sizes {sorted(sizes)} for {len(self.stds)} stds, {len(self.weights)} weights"
            )
            expected, remedy = "one mean of one size for each std and weight", "pass lists of one length"
            raise ValueError(error_message("GaussianMixture", "means", got, expected, remedy))
        for name in ("stds", "weights"):
            if not all(0.0 < value < math.inf for value in getattr(self, name)):
                got, remedy = f"is {list(getattr(self, name))}", "leave out what has no weight"
                raise ValueError(error_message("GaussianMixture", name, got, "finite numbers above 0", remedy))

    @staticmethod
    def ring(count: int = 8, radius: float = 1.2, std: float = 0.1) -> GaussianMixture:
        """Return `count` equal Gaussians on a circle in two dimensions."""
        angles = [2 * math.pi * i / count for i in range(count)]
        means = [(radius * math.cos(angle), radius * math.sin(angle)) for angle in angles]
        return GaussianMixture(means, [std] * count, [1.0] * count)

    def sample(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw points of the data, float32 ``[count, D]`` on the CPU."""
        weights = torch.tensor(self.weights, dtype=torch.float64)
        chosen = torch.multinomial(weights, count, replacement=True, generator=generator)
        noise = torch.randn(count, len(self.means[0]), generator=generator)
        return torch.tensor(self.means)[chosen] + torch.tensor(self.stds)[chosen, None] * noise

    def epsilon(self, x: Tensor, level: Level) -> Tensor:
        """Return ε = −σ·∇log p(x) at a level α, σ, exactly but for rounding.

        Args:
            x: ``[B, D]``, floating.
            level: the noise level of x.

        Returns:
            ``[B, D]`` in the dtype of x, computed in float64.
        """
        exact = {"dtype": torch.float64, "device": x.device}
        means, stds = torch.tensor(self.means, **exact), torch.tensor(self.stds, **exact)  # type: ignore[arg-type]
        variance = (level.alpha * stds) ** 2 + level.sigma**2
        apart = x.double()[:, None, :] - level.alpha * means
        logs = torch.tensor(self.weights, **exact).log() - 0.5 * apart.square().sum(2) / variance  # type: ignore[arg-type]
        share = (logs - 0.5 * means.shape[1] * variance.log()).softmax(1)
        return (level.sigma * (share / variance)[..., None] * apart).sum(1).to(x.dtype)

    def model(self, scheduler: BaseNoiseScheduler) -> Callable[[Tensor, Tensor], Tensor]:
        """Return the exact noise prediction ``(x, t) -> ε`` on a noise schedule; t is one timestep for all samples."""
        path = VariancePreservingPath(scheduler.alphas_cumprod)

        def predict(x: Tensor, t: Tensor) -> Tensor:
            return self.epsilon(x, path.at_timestep(float(t.flatten()[0])))

        return predict
