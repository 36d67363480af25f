# SPDX-License-Identifier: MIT
"""Flow matching on points in the plane, in a training loop of one's own: a spiral from noise.

    python examples/train_toy_2d.py               # half a minute; writes toy_2d.png

The loop has two operations of fastdiff: `ops.add_noise` before the model and `ops.diffusion_loss` behind it.  Noise is
drawn from seeds inside of both, so it is never stored.  Needs torch; matplotlib for the picture.
"""

from __future__ import annotations

import argparse
import math

import torch
from torch import Tensor, nn

import fastdiff
from fastdiff import ops
from fastdiff.noise import sample_seeds
from fastdiff.training import draw_timesteps


def spiral(count: int, generator: torch.Generator) -> Tensor:
    """Return points ``[count, 2]`` of a spiral with two turns, of variance about 1, with a little noise across."""
    angle = 4 * math.pi * torch.rand(count, generator=generator).sqrt()
    line = torch.stack([angle * angle.cos(), angle * angle.sin()], dim=1) / (4 * math.pi) * 2
    return line + 0.02 * torch.randn(count, 2, generator=generator)


class PointModel(nn.Module):
    """Predict the flow's velocity of points ``[B, 2]`` at timesteps ``[B]``."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(3 + 24, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(),
            nn.Linear(width, 2),
        )  # fmt: skip

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        place = torch.cat([x, t.to(x.dtype).expand(len(x))[:, None] / 1000], dim=1)
        waves = (place[:, :, None] * torch.arange(1, 5, device=x.device) * (math.pi / 2)).flatten(1)
        output: Tensor = self.layers(torch.cat([place, waves.sin(), waves.cos()], dim=1))
        return output


def train(points: Tensor, schedule: object, steps: int, batch: int = 512, seed: int = 0) -> PointModel:
    """Train on points ``[N, 2]``; everything drawn follows from the seed, the point's number and the epoch."""
    torch.manual_seed(seed)
    model = PointModel()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    per_epoch = len(points) // batch
    for step in range(steps):
        epoch, place = divmod(step, per_epoch)
        if place == 0:
            order = torch.randperm(len(points))
        ids = order[place * batch : (place + 1) * batch]
        x0, seeds = points[ids], sample_seeds(seed, ids, epoch)
        t = draw_timesteps(batch, 1000, sampling="logit_normal", seeds=seeds)
        output = model(ops.add_noise(x0, t, schedule, seeds=seeds), t)
        loss = ops.diffusion_loss(output, x0, t, schedule, "flow_prediction", seeds=seeds)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate.step()
        if step % max(1, steps // 5) == 0 or step == steps - 1:
            print(f"step {step}: loss {loss.item():.4f}")
    return model.eval()


def distance_to(points: Tensor, samples: Tensor) -> float:
    """Return the median distance of samples to the nearest point."""
    return float(torch.cdist(samples, points).amin(dim=1).median())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--samples", type=int, default=2000)
    arguments = parser.parse_args()

    points = spiral(8192, torch.Generator().manual_seed(0))
    schedule = fastdiff.create_noise_scheduler("flow")
    model = train(points, schedule, arguments.steps)
    sampler = fastdiff.create_sampler(schedule, "flow_heun", num_inference_steps=20)
    noise = fastdiff.randn((arguments.samples, 2), fastdiff.spawn_seeds(1, arguments.samples))
    samples = sampler.sample(model, noise, progress=False).samples
    print(f"median distance to the data: noise {distance_to(points, noise):.3f}, samples", end=" ")
    print(f"{distance_to(points, samples):.3f}, new data {distance_to(points, spiral(2000, torch.Generator())):.3f}")

    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(8, 4), sharex=True, sharey=True)
    for axis, title, shown in zip(axes, ("data", "samples"), (points[: len(samples)], samples), strict=True):
        axis.scatter(*shown.T.numpy(), s=2)
        axis.set_title(title)
        axis.set_aspect("equal")
    figure.savefig("toy_2d.png")


if __name__ == "__main__":
    main()
