# SPDX-License-Identifier: MIT
"""Training: configuration, losses, timesteps, model and scheduler.

The modules::

    config.py  the configuration of model, training and sampling

A name is imported when it is asked for: the losses need torch alone, the model needs diffusers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import DiffusionConfig as DiffusionConfig
    from .config import SchedulerType as SchedulerType

#: The public names by module.
_MODULES = {
    "config": ("DiffusionConfig", "SchedulerType"),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)
