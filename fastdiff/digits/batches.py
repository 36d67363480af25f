# SPDX-License-Identifier: MIT
"""Digits by image ids: the packaged model as the function that `fastdiff.sharding` calls for each batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..ops import randn
from ..samplers import BaseSampler, create_sampler
from ..sampling.loop import SamplingResult
from ..schedules import create_noise_scheduler
from .unet import IMAGE_SHAPE, NULL_CLASS, DigitUNet


class DigitBatches:
    """Draw digits of given classes; the model is loaded by the first draw, so that pickling this stays cheap.

    Args:
        classes: labels, each for a block of consecutive images; the first blocks have one more where `n` does not
            divide.
        n: number of images of the job.
        sampling: fields of `fastdiff.SamplingConfig`.
        guidance_scale: of classifier-free guidance; 1 for none.
        device: of model and noise.
        backend: forces one, as in `fastdiff.ops.step`.
        threads: number of CPU threads of a draw; None for torch's own.  Sums of a convolution may depend on it.

    Raises:
        TypeError, ValueError: the fields do not fit.
    """

    def __init__(
        self,
        classes: Sequence[int],
        n: int,
        sampling: Mapping[str, Any],
        *,
        guidance_scale: float = 1.0,
        device: str = "cpu",
        backend: str | None = None,
        threads: int | None = None,
    ) -> None:
        self.classes, self.n = list(classes), n
        self.device, self.backend, self.threads = device, backend, threads
        self._fields = {"method": "dpm_solver", **sampling, "guidance_scale": guidance_scale}
        self._loaded: dict[str, Any] = {}
        _ = self.sampler  # refuses fields that do not fit

    @property
    def sampler(self) -> BaseSampler:
        """The compiled sampler."""
        if "sampler" not in self._loaded:
            scheduler = create_noise_scheduler("cosine", timestep_spacing="trailing")
            self._loaded["sampler"] = create_sampler(scheduler, **self._fields, prediction_type="v_prediction")
        sampler: BaseSampler = self._loaded["sampler"]
        return sampler

    @property
    def model(self) -> DigitUNet:
        """The packaged model on the device."""
        from . import load_digit_unet

        if "model" not in self._loaded:
            self._loaded["model"] = load_digit_unet(device=self.device)
        model: DigitUNet = self._loaded["model"]
        return model

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_loaded": {}}

    def label(self, image: int) -> int:
        """Return the class of an image id."""
        share, longer = divmod(self.n, len(self.classes))
        long = longer * (share + 1)  # images in the blocks that have one more
        block = image // (share + 1) if image < long else longer + (image - long) // share
        return self.classes[block]

    def sample(self, ids: Sequence[int], seeds: Sequence[int], *, progress: bool = False) -> SamplingResult:
        """Return the result of one loop over the images of some ids."""
        labels = torch.tensor([self.label(image) for image in ids], device=self.device)
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads or before)
        try:
            return self.sampler.sample(
                self.model,
                randn((len(ids), *IMAGE_SHAPE), seeds, device=self.device),
                labels,
                torch.full_like(labels, NULL_CLASS),
                seeds=seeds,
                progress=progress,
                backend=self.backend,
            )
        finally:
            torch.set_num_threads(before)

    def __call__(self, ids: Sequence[int], seeds: Sequence[int]) -> Tensor:
        """Return the images of some ids, float32 ``[len(ids), 1, 8, 8]``.

        Raises:
            KeyboardInterrupt: Ctrl-C ended the loop early.
        """
        result = self.sample(ids, seeds)
        if not result.complete:
            raise KeyboardInterrupt
        return result.samples
