# SPDX-License-Identifier: MIT
"""Drop-in schedulers for diffusers: its classes under their own names, each step one fused pass.

    pipe.scheduler = fastdiff.diffusers.DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)

A class here is a subclass of diffusers' own: configuration, timesteps, state and refusals are those of the installed
diffusers.  Only `step` is replaced: the first time that a scheduler is in some state it is traced (`tracing`,
`symbols`), brought into the form of a row of the fused step's table (`form`, `plan`), and from then on run (`running`).
"""

from __future__ import annotations

from typing import Any

from ..errors import require

require("diffusers", "diffusers", "fastdiff.diffusers")

from .scheduler import FusedScheduler  # noqa: E402
from .schedulers import CLASSES  # noqa: E402

__all__ = ["FusedScheduler", *CLASSES]


def __getattr__(name: str) -> Any:
    try:
        return CLASSES[name]
    except KeyError:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None
