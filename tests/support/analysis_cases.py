# SPDX-License-Identifier: MIT
"""Small workloads with an exact model, for the tests of comparison, report and recommendation."""

from __future__ import annotations

import torch

from fastdiff import create_noise_scheduler, randn
from fastdiff.analysis import GaussianMixture, Workload

MIXTURE = GaussianMixture.ring(4)


def points_workload(count: int = 16, timesteps: int = 40) -> Workload:
    """Return points of a ring of Gaussians on a short schedule."""
    scheduler = create_noise_scheduler(
        "linear", num_train_timesteps=timesteps, beta_end=0.3, timestep_spacing="trailing"
    )
    seeds = list(range(count))
    return Workload(
        MIXTURE.model(scheduler), scheduler, randn((count, 2), seeds), seeds=torch.tensor(seeds), name="ring"
    )


def images_workload(count: int = 8) -> Workload:
    """Return images of 6 by 6 pixels whose model is an affine function, with an encoder and real images."""
    scheduler = create_noise_scheduler("linear", num_train_timesteps=40, beta_end=0.3, timestep_spacing="trailing")
    return Workload(
        lambda x, t: 0.9 * x,
        scheduler,
        randn((count, 1, 6, 6), list(range(count))),
        name="<b>grey & small</b>",
        real=torch.randn(12, 1, 6, 6),
        encoder=lambda images: images.flatten(1)[:, :4],
        classifier=lambda images: images.flatten(1)[:, :3],
    )
