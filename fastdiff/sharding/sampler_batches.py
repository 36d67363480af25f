# SPDX-License-Identifier: MIT
"""A model and a sampler as the function of image ids that sampling jobs call for each batch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..ops import randn
from ..samplers import BaseSampler
from ..sampling.result import SamplingResult


class SamplerBatches(ABC):
    """Draw images by ids.  The model is loaded by the first draw and is not pickled.

    Args:
        device: of model and noise.
        backend: forces one, as in `fastdiff.ops.step`.
        threads: number of CPU threads of a draw; None for torch's own.  Sums of a convolution may depend on it.

    Attributes:
        shape: of an image, ``(C, H, W)``.
    """

    shape: tuple[int, int, int]

    def __init__(self, *, device: str = "cpu", backend: str | None = None, threads: int | None = None) -> None:
        self.device, self.backend, self.threads = device, backend, threads
        self._loaded: dict[str, Any] = {}

    @abstractmethod
    def make_sampler(self) -> BaseSampler:
        """Return the compiled sampler."""

    @abstractmethod
    def load_model(self) -> Any:
        """Return the model on the device, in evaluation mode."""

    @abstractmethod
    def conditions(self, ids: Sequence[int]) -> tuple[Tensor | None, Tensor | None]:
        """Return the conditions of the images of some ids, and those of the unconditional calls."""

    @property
    def sampler(self) -> BaseSampler:
        """The compiled sampler."""
        if "sampler" not in self._loaded:
            self._loaded["sampler"] = self.make_sampler()
        sampler: BaseSampler = self._loaded["sampler"]
        return sampler

    @property
    def model(self) -> Any:
        """The model on the device."""
        if "model" not in self._loaded:
            self._loaded["model"] = self.load_model()
        return self._loaded["model"]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_loaded": {}}

    def sample(self, ids: Sequence[int], seeds: Sequence[int], *, progress: bool = False) -> SamplingResult:
        """Return the result of one loop over the images of some ids."""
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads or before)
        try:
            condition, unconditional = self.conditions(ids)
            return self.sampler.sample(
                self.model,
                randn((len(ids), *self.shape), seeds, device=self.device) * self.sampler.init_noise_sigma,
                condition,
                unconditional,
                seeds=seeds,
                progress=progress,
                backend=self.backend,
            )
        finally:
            torch.set_num_threads(before)

    def __call__(self, ids: Sequence[int], seeds: Sequence[int]) -> Tensor:
        """Return the images of some ids, float32 ``[len(ids), C, H, W]``.

        Raises:
            KeyboardInterrupt: Ctrl-C ended the loop early.
        """
        result = self.sample(ids, seeds)
        if not result.complete:
            raise KeyboardInterrupt
        return result.samples
