# SPDX-License-Identifier: MIT
"""Digits by image ids: a class-conditional model as the function that `fastdiff.sharding` calls for each batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..samplers import BaseSampler, create_sampler
from ..schedules import NoiseSchedulerConfig, create_noise_scheduler
from ..sharding.sampler_batches import SamplerBatches
from .unet import IMAGE_SHAPE, NULL_CLASS


class DigitBatches(SamplerBatches):
    """Draw digits of given classes; the model is loaded by the first draw, so that pickling this stays cheap.

    Args:
        classes: labels, each for a block of consecutive images; the first blocks have one more where `n` does not
            divide.
        n: number of images of the job.
        sampling: fields of `fastdiff.SamplingConfig`.
        guidance_scale: of classifier-free guidance; 1 for none.
        load: returns the model on a device, ready for sampling, and can be pickled; None for the packaged model.
        schedule: that the model was trained on; None for the packaged model's.
        device, backend, threads: see `SamplerBatches`.

    Raises:
        TypeError, ValueError: the fields do not fit.
    """

    shape = IMAGE_SHAPE

    def __init__(
        self,
        classes: Sequence[int],
        n: int,
        sampling: Mapping[str, Any],
        *,
        guidance_scale: float = 1.0,
        load: Callable[[str], nn.Module] | None = None,
        schedule: NoiseSchedulerConfig | None = None,
        device: str = "cpu",
        backend: str | None = None,
        threads: int | None = None,
    ) -> None:
        super().__init__(device=device, backend=backend, threads=threads)
        self.classes, self.n = list(classes), n
        self._load, self._schedule = load, schedule
        usual = {"method": "dpm_solver", "prediction_type": "v_prediction"}
        self._fields = {**usual, **sampling, "guidance_scale": guidance_scale}
        _ = self.sampler  # refuses fields that do not fit

    def make_sampler(self) -> BaseSampler:
        """Return the sampler on the model's schedule."""
        schedule = self._schedule or NoiseSchedulerConfig(schedule_type="cosine", timestep_spacing="trailing")
        return create_sampler(create_noise_scheduler(schedule), **self._fields)

    def load_model(self) -> nn.Module:
        """Return the model on the device."""
        from . import load_digit_unet

        return load_digit_unet(device=self.device) if self._load is None else self._load(self.device)

    def conditions(self, ids: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return the labels of some images, and as many of no class; int64 ``[len(ids)]``."""
        labels = torch.tensor([self.label(image) for image in ids], device=self.device)
        return labels, torch.full_like(labels, NULL_CLASS)

    def label(self, image: int) -> int:
        """Return the class of an image id."""
        share, longer = divmod(self.n, len(self.classes))
        long = longer * (share + 1)  # images in the blocks that have one more
        block = image // (share + 1) if image < long else longer + (image - long) // share
        return self.classes[block]
