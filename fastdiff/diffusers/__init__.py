# SPDX-License-Identifier: MIT
"""Drop-in schedulers for diffusers: its classes under their own names, each step one fused pass.

    pipe.scheduler = fastdiff.diffusers.DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)

A class here is a subclass of diffusers' own: configuration, timesteps, state and refusals are those of the installed
diffusers.  Only `step` is replaced: the first time that a scheduler is in some state the step is compiled to a plan
(`compiler`), which is run from then on (`running`).

`TableScheduler` walks a step table, such as one from a file, inside a pipeline.

`patch` and `unpatch` do the same to a whole pipeline, in place; `guiders` has the guiders of modular pipelines;
`explain` reports how each step of a scheduler is taken.
"""

from __future__ import annotations

from typing import Any

from ..errors import error_message, require

require("diffusers", "diffusers", "fastdiff.diffusers")

from .explain import ExplainedStep, Explanation, explain  # noqa: E402
from .mixin import FusedScheduler  # noqa: E402
from .patch import Part, PatchReport, patch, unpatch  # noqa: E402
from .registry import ABSENT, CLASSES  # noqa: E402
from .table_scheduler import TableScheduler  # noqa: E402

__all__ = [
    "ExplainedStep",
    "Explanation",
    "FusedScheduler",
    "Part",
    "PatchReport",
    "TableScheduler",
    "explain",
    "patch",
    "unpatch",
    *CLASSES,
]


def __getattr__(name: str) -> Any:
    if name in CLASSES:
        return CLASSES[name]
    if name in ABSENT:
        remedy = "install what diffusers asks for, or a newer diffusers"
        raise ImportError(
            error_message("fastdiff.diffusers", name, f"is absent ({ABSENT[name]})", "it in diffusers", remedy)
        )
    if name.endswith(("Guidance", "Guider")):  # they take a third of a second to import
        from . import guiders

        found = guiders.FusedGuider if name == "FusedGuider" else guiders.GUIDERS.get(name)
        if found is not None:
            return found
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
