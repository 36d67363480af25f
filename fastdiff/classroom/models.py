# SPDX-License-Identifier: MIT
"""Facts that a loop needs of a model: its device, the shape of its samples; and its generators after an error."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ..noise.generators import Generators, generator_states, restore_generators

#: Shape of one sample where neither the caller nor the model says one.
DEFAULT_SHAPE = (3, 32, 32)


def is_noise_scheduler(value: object) -> bool:
    """Return True for an object with a schedule and a forward process; a model may hold a schedule alone."""
    return isinstance(getattr(value, "alphas_cumprod", None), Tensor) and hasattr(value, "add_noise")


def device_of(model: object) -> torch.device | None:
    """Return the device of a module's parameters; None where it has none."""
    parameters = model.parameters() if isinstance(model, torch.nn.Module) else iter(())
    return next((parameter.device for parameter in parameters), None)


def shape_of(model: object) -> tuple[int, ...]:
    """Return the shape of one sample that a model or its configuration names, else `DEFAULT_SHAPE`."""
    for owner in (getattr(model, "config", None), model):
        channels = getattr(owner, "in_channels", None)
        size = getattr(owner, "sample_size", None) or getattr(owner, "image_size", None)
        if isinstance(channels, int) and size is not None:
            return (channels, size, size) if isinstance(size, int) else (channels, *size)
    return DEFAULT_SHAPE


@contextmanager
def restored_on_error(generator: Generators, device: torch.device) -> Iterator[None]:
    """Put generators back to their states from before a block that fails; for None, torch's default one of a device."""
    states = generator_states(generator, device)
    try:
        yield
    except BaseException:
        restore_generators(states)
        raise
