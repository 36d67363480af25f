# SPDX-License-Identifier: MIT
"""The parts of a model that a trainer needs: its network, and its noise schedule, which checkpoints tell apart."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...errors import error_message
from ...ops.forward_rows import ForwardScales
from ...schedules import BaseNoiseScheduler, create_noise_scheduler
from ..config import DiffusionConfig


def trained_network(model: Any) -> nn.Module:
    """Return the module that is trained: the U-Net of an object with ``unet`` and ``scheduler``, else the model.

    Raises:
        TypeError: it is no module.
    """
    network = model.unet if hasattr(model, "unet") and hasattr(model, "scheduler") else model
    if not isinstance(network, nn.Module):
        got, remedy = f"is a {type(network).__name__}", "pass the network"
        raise TypeError(error_message("Trainer", "model", got, "a torch.nn.Module", remedy))
    return network


def noise_schedule(model: Any, config: DiffusionConfig) -> Any:
    """Return the noise schedule that a model is trained on: that of its ``scheduler``, else the configuration's.

    Args:
        model: an object whose ``scheduler`` is a schedule of fastdiff, or has one as ``schedule``; or any other.
        config: settled.
    """
    scheduler = getattr(model, "scheduler", None)
    own = getattr(scheduler, "schedule", scheduler)
    return own if isinstance(own, BaseNoiseScheduler) else create_noise_scheduler(config.noise_scheduler_config())


def schedule_levels(schedule: Any) -> dict[str, Any] | None:
    """Return T, and α and σ at 5 timesteps from 0 to T − 1, as values of JSON that tell two schedules apart.

    Args:
        schedule: a noise schedule of fastdiff or diffusers, or ᾱ ``[T]``; of any other kind, which only an objective of
            one's own reads, the result is None.
    """
    try:
        scales = ForwardScales.of("save_checkpoint", schedule)
    except TypeError:
        return None
    alpha, sigma = scales.at(torch.linspace(0, scales.steps - 1, 5, dtype=torch.float64).round().long())
    return {"num_train_timesteps": scales.steps, "alpha": alpha.tolist(), "sigma": sigma.tolist()}


def equal_levels(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Return True where two results of `schedule_levels` are of one schedule, up to float32 arithmetic.

    diffusers computes ᾱ in float32: T factors 1 − β and T products are rounded, each by 2^-24 at most.  ᾱ and
    σ² = 1 − ᾱ, both at most 1, are off by T·2^-23 then, and α by half of it; a factor of 2 is to spare.
    """
    if one["num_train_timesteps"] != other["num_train_timesteps"]:
        return False
    tolerance = one["num_train_timesteps"] * 2.0**-22
    return all(
        abs(a - b) <= tolerance and abs(s**2 - r**2) <= tolerance
        for a, b, s, r in zip(one["alpha"], other["alpha"], one["sigma"], other["sigma"], strict=True)
    )


def check_configured_schedule(
    state: Mapping[str, Any], config: DiffusionConfig, path: Path, operation: str, argument: str
) -> None:
    """Refuse a checkpoint whose model was trained on another noise schedule than a configuration's.

    Args:
        state: of the checkpoint; one without a schedule's levels passes.
        config: settled; its schedule is the one that the model would be sampled on.
        path: of the checkpoint.
        operation, argument: for messages.

    Raises:
        ValueError: the schedules differ.
    """
    trained = state.get("schedule")
    own = schedule_levels(create_noise_scheduler(config.noise_scheduler_config()))
    if trained is not None and own is not None and not equal_levels(trained, own):
        got = f"is {str(path)!r}, whose trainer was given another noise schedule than its configuration has"
        remedy = "load_checkpoint it into the model, and pass create_sampler the schedule of the training"
        raise ValueError(error_message(operation, argument, got, "a model on the configuration's schedule", remedy))
