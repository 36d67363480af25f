# SPDX-License-Identifier: MIT
"""The 50-step sampler, and the comparison of schedules and of numbers of steps from the same noise."""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..analysis.film_strip import visualize_trajectory
from ..errors import error_message
from ..guidance.guided_model import Model
from .ddpm import SCHEDULES, DDPMSampler
from .models import is_noise_scheduler

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class FastSampler(DDPMSampler):
    """`DDPMSampler` with a noise scheduler and 50 steps; a call returns the images and their trajectory."""

    def __init__(self, noise_scheduler: Any, num_inference_steps: int = 50) -> None:
        super().__init__(noise_scheduler, num_inference_steps)

    def __call__(self, model: Model, batch_size: int = 1, *args: Any, **options: Any) -> tuple[Tensor, list[Tensor]]:
        """Draw images; arguments as `DDPMSampler.__call__`, return_trajectory being True."""
        found: tuple[Tensor, list[Tensor]] = super().__call__(
            model, batch_size, *args, **{**options, "return_trajectory": True}
        )
        return found


class SamplingComparison:
    """Samples with several settings, each from the same noise.

    Args:
        noise_scheduler: as in `DDPMSampler`.
        batch_size: images a setting.
        seed: of the noise.

    Raises:
        TypeError: it is no noise scheduler.
    """

    def __init__(self, noise_scheduler: Any, *, batch_size: int = 4, seed: int = 0) -> None:
        if not is_noise_scheduler(noise_scheduler):
            got, remedy = f"is a {type(noise_scheduler).__name__}", "pass the model to compare_schedules"
            expected = "an object with alphas_cumprod and add_noise"
            raise TypeError(error_message("SamplingComparison", "noise_scheduler", got, expected, remedy))
        self.sampler = DDPMSampler(noise_scheduler, 1)  # each run sets its own timesteps
        self.batch_size, self.seed = batch_size, seed

    def _draw(self, model: Model, **options: Any) -> Any:
        generator = torch.Generator().manual_seed(self.seed)
        return self.sampler(model, self.batch_size, generator=generator, **options)

    def compare_schedules(
        self, model: Model, num_steps: int = 50, device: torch.device | str | None = None, **options: Any
    ) -> dict[str, dict[str, Any]]:
        """Sample with each timestep schedule.

        Args:
            model, device, options: of `DDPMSampler.__call__`.
            num_steps: steps of each.

        Returns:
            By the schedule's name a dict: ``samples``, float32 ``[B, ...]``, and ``trajectory``, from the noise to the
            samples, on the CPU.
        """
        found = {}
        for schedule in SCHEDULES:
            samples, trajectory = self._draw(
                model,
                device=device,
                num_inference_steps=num_steps,
                schedule=schedule,
                return_trajectory=True,
                **options,
            )
            found[schedule] = {"samples": samples, "trajectory": trajectory}
        return found

    def compare_step_counts(
        self,
        model: Model,
        steps_list: Sequence[int] = (10, 50, 100, 1000),
        device: torch.device | str | None = None,
        schedule: str = "linear",
        **options: Any,
    ) -> dict[int, dict[str, Any]]:
        """Sample with each number of steps.

        Args:
            model, device, options: as in `compare_schedules`.
            steps_list: the numbers, each 1 to T.
            schedule: of all.

        Returns:
            By the number of steps a dict: ``samples``, float32 ``[B, ...]``, and ``seconds``, the time of the loop.
        """
        found = {}
        for steps in steps_list:
            start = perf_counter()
            samples = self._draw(model, device=device, num_inference_steps=steps, schedule=schedule, **options)
            samples.sum().item()  # waits for a GPU
            found[steps] = {"samples": samples, "seconds": perf_counter() - start}
        return found

    @staticmethod
    def visualize_trajectory(trajectory: Sequence[Tensor], title: str = "Denoising Process") -> Figure:
        """Draw a trajectory as a film strip: `fastdiff.analysis.film_strip.visualize_trajectory`."""
        return visualize_trajectory(trajectory, title)
