# SPDX-License-Identifier: MIT
"""The parts of a model that a trainer needs: its network and its noise schedule."""

from __future__ import annotations

from typing import Any

from torch import nn

from ...errors import error_message
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
