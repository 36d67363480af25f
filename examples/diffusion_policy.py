# SPDX-License-Identifier: MIT
"""Control rate of a diffusion policy with diffusers' schedulers and with fastdiff's.

A policy (C. Chi et al., "Diffusion Policy", arXiv 2303.04137) samples the next actions of a robot from a small
conditional 1-D U-Net.  A call of its denoiser takes between a fraction of a millisecond and a few milliseconds, so the
scheduler is a noticeable part of a step.  Here a point moves in the plane to a goal and passes an obstacle on the left
or on the right: the distribution of plans has two modes for each observation.

    python examples/diffusion_policy.py                    # trains for half a minute, then measures
    python examples/diffusion_policy.py --iterations 0     # measures with random weights
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import diffusers
import torch
from torch import Tensor, nn
from torch.nn import functional

import fastdiff.diffusers

#: Number of actions in a plan, and the size of an action: a position in the plane.
HORIZON, ACTION = 16, 2
#: Size of an observation: the point's position and the goal's.
OBSERVATION = 4
#: Lateral distance at which a plan passes the obstacle, relative to the distance of the goal.
DETOUR = 0.5


class ConditionalBlock(nn.Module):
    """Two convolutions over time, scaled and shifted by a condition (observation and timestep)."""

    def __init__(self, channels_in: int, channels: int, condition: int) -> None:
        super().__init__()
        self.first = nn.Conv1d(channels_in, channels, 5, padding=2)
        self.second = nn.Conv1d(channels, channels, 5, padding=2)
        self.norms = nn.ModuleList(nn.GroupNorm(4, channels) for _ in range(2))
        self.film = nn.Linear(condition, 2 * channels)
        self.shortcut = nn.Conv1d(channels_in, channels, 1) if channels_in != channels else nn.Identity()

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        scale, shift = self.film(condition)[:, :, None].chunk(2, dim=1)
        hidden = functional.mish(self.norms[0](self.first(x))) * (1 + scale) + shift
        result: Tensor = functional.mish(self.norms[1](self.second(hidden))) + self.shortcut(x)
        return result


class PolicyUnet(nn.Module):
    """Predict the noise in plans ``[B, 2, 16]``, given timesteps ``[B]`` and observations ``[B, 4]``."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        condition = 2 * width
        self.frequencies: Tensor
        self.register_buffer("frequencies", torch.exp(-torch.arange(width // 2) * 9.21 / (width // 2)))
        self.embed = nn.Sequential(
            nn.Linear(width + OBSERVATION, condition), nn.Mish(), nn.Linear(condition, condition)
        )
        self.down = ConditionalBlock(ACTION, width, condition)
        self.shorten = nn.Conv1d(width, width, 3, stride=2, padding=1)
        self.middle = ConditionalBlock(width, 2 * width, condition)
        self.widen = nn.ConvTranspose1d(2 * width, width, 4, stride=2, padding=1)
        self.up = ConditionalBlock(2 * width, width, condition)
        self.out = nn.Conv1d(width, ACTION, 1)

    def forward(self, x: Tensor, timestep: Tensor, observation: Tensor) -> Tensor:
        angles = timestep.reshape(-1, 1).float() * self.frequencies
        embedding = torch.cat([angles.sin(), angles.cos()], dim=1).expand(len(x), -1)
        condition = self.embed(torch.cat([embedding, observation], dim=1))
        skip = self.down(x, condition)
        deep = self.widen(self.middle(self.shorten(skip), condition))
        result: Tensor = self.out(self.up(torch.cat([deep, skip], dim=1), condition))
        return result


def demonstrations(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return observations ``[count, 4]`` and an expert's plans ``[count, 2, 16]``, which pass on a random side."""
    start, goal = torch.rand(2, count, ACTION, generator=generator) * 2 - 1
    side = torch.randint(0, 2, (count, 1), generator=generator) * 2.0 - 1
    along = torch.linspace(0, 1, HORIZON)[None, None]
    straight = start[:, :, None] + (goal - start)[:, :, None] * along
    across = torch.stack([start[:, 1] - goal[:, 1], goal[:, 0] - start[:, 0]], dim=1)
    across = across / across.norm(dim=1, keepdim=True).clamp(min=1e-6)
    plans = straight + DETOUR * (side * across)[:, :, None] * torch.sin(torch.pi * along)
    return torch.cat([start, goal], dim=1), plans


def train(model: PolicyUnet, iterations: int, generator: torch.Generator) -> None:
    """Train the model to predict the noise in the expert's plans (arXiv 2006.11239, algorithm 1)."""
    schedule = diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2", num_train_timesteps=100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(iterations):
        observations, plans = demonstrations(256, generator)
        noise = torch.randn(plans.shape, generator=generator)
        timesteps = torch.randint(0, 100, (len(plans),), generator=generator)
        predicted = model(schedule.add_noise(plans, noise, timesteps), timesteps, observations)
        loss = functional.mse_loss(predicted, noise)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@torch.inference_mode()
def plan(model: PolicyUnet, scheduler: Any, steps: int, observation: Tensor, seed: int) -> Tensor:
    """Sample the next actions, ``[B, 2, 16]``: the loop that would run on the robot."""
    generator = torch.Generator().manual_seed(seed)
    scheduler.set_timesteps(steps)
    x = torch.randn(len(observation), ACTION, HORIZON, generator=generator)
    for timestep in scheduler.timesteps:
        output = model(x, timestep, observation)
        x = scheduler.step(output, timestep, x, generator=generator, return_dict=False)[0]
    return x


def median_times(calls: dict[str, Callable[[int], object]], rounds: int) -> dict[str, float]:
    """Return seconds per call, the median over rounds in which all calls alternate."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for round_ in range(-1, rounds):
        for name, call in calls.items():
            started = time.perf_counter()
            call(round_)
            if round_ >= 0:
                seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}


def compare(model: PolicyUnet, method: str, steps: int, rounds: int) -> str:
    """Return one line of the table: a scheduler's plans per second with diffusers and with fastdiff."""
    options = {"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 100, "clip_sample_range": 2.0}
    observation, _ = demonstrations(1, torch.Generator().manual_seed(1))
    schedulers = {
        "diffusers": getattr(diffusers, method)(**options),
        "fastdiff": getattr(fastdiff.diffusers, method)(**options),
    }
    plans = [plan(model, scheduler, steps, observation, 7) for scheduler in schedulers.values()]
    difference = float((plans[0] - plans[1]).abs().max())
    seconds = median_times(
        {name: lambda i, s=scheduler: plan(model, s, steps, observation, i) for name, scheduler in schedulers.items()},  # type: ignore[misc]
        rounds,
    )
    theirs, ours = 1 / seconds["diffusers"], 1 / seconds["fastdiff"]
    return f"{method:15} {steps:5}   {theirs:9.1f}   {ours:9.1f}   {ours / theirs:5.2f}   {difference:.1e}"


def distance_to_goal(model: PolicyUnet) -> float:
    """Return the distance between a plan's end and the goal, the median over a hundred observations."""
    observations, _ = demonstrations(100, torch.Generator().manual_seed(2))
    scheduler = fastdiff.diffusers.DDIMScheduler(
        beta_schedule="squaredcos_cap_v2", num_train_timesteps=100, clip_sample_range=2.0
    )
    ends = plan(model, scheduler, 10, observations, 3)[:, :, -1]
    return float((ends - observations[:, 2:]).norm(dim=1).median())


def main() -> None:
    """Train, then print plans per second with diffusers and with fastdiff."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, default=1500, help="steps of training")
    parser.add_argument("--steps", type=int, nargs="+", default=[10, 20, 50, 100], help="steps of denoising")
    parser.add_argument("--rounds", type=int, default=15, help="number of timed plans per scheduler")
    parser.add_argument("--threads", type=int, default=1)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    torch.manual_seed(0)
    model = PolicyUnet()
    train(model, chosen.iterations, torch.Generator().manual_seed(0))
    model.eval()
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters} parameters; plans end {distance_to_goal(model):.3f} from the goal (median)")
    print("scheduler       steps   diffusers    fastdiff    times   difference (plans per second)")
    for method in ("DDIMScheduler", "DDPMScheduler"):
        for steps in chosen.steps:
            print(compare(model, method, steps, chosen.rounds))


if __name__ == "__main__":
    main()
