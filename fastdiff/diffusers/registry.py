# SPDX-License-Identifier: MIT
"""Registry of the drop-in classes: diffusers' continuous schedulers under their own names, with fused steps.

Schedulers of discrete tokens (Amused, VQ diffusion, discrete DDIM, block refinement) add no tensors, so they have no
class here.
"""

from __future__ import annotations

import importlib
from typing import Any

import diffusers

from .mixin import FusedScheduler
from .per_token import PerTokenSteps

#: For each class, the methods that take a step and the module that exports it.
_SCHEDULERS: dict[str, tuple[tuple[str, ...], str]] = {
    **{
        f"{name}Scheduler": (("step",), "diffusers")
        for name in (
            "CMStochasticIterative", "CogVideoXDDIM", "CogVideoXDPM", "CosineDPMSolverMultistep", "DDIM", "DDIMInverse",
            "DDIMParallel", "DDPM", "DDPMParallel", "DDPMWuerstchen", "DEISMultistep", "DPMSolverMultistep",
            "DPMSolverMultistepInverse", "DPMSolverSDE", "DPMSolverSinglestep", "EDMDPMSolverMultistep", "EDMEuler",
            "EulerAncestralDiscrete", "EulerDiscrete", "FlowMapEulerDiscrete", "FlowMatchEulerDiscrete",
            "FlowMatchHeunDiscrete", "FlowMatchLCM", "HeunDiscrete", "IPNDM", "KDPM2AncestralDiscrete", "KDPM2Discrete",
            "LCM", "LMSDiscrete", "LTXEulerAncestralRF", "RePaint", "SASolver", "SCM", "TCD", "UnCLIP",
            "UniPCMultistep",
        )
    },
    "PNDMScheduler": (("step", "step_prk", "step_plms"), "diffusers"),
    "ConsistencyDecoderScheduler": (("step",), "diffusers.schedulers.scheduling_consistency_decoder"),
}  # fmt: skip

#: Classes whose `scale_model_input` does not just return its argument.
_SCALES_MODEL_INPUT = frozenset(
    f"{name}Scheduler"
    for name in (
        "CMStochasticIterative", "ConsistencyDecoder", "CosineDPMSolverMultistep", "DPMSolverSDE",
        "EDMDPMSolverMultistep", "EDMEuler", "EulerAncestralDiscrete", "EulerDiscrete", "HeunDiscrete",
        "KDPM2AncestralDiscrete", "KDPM2Discrete", "LMSDiscrete",
    )
)  # fmt: skip


def _fused_class(name: str, stepping: tuple[str, ...], module: str) -> Any:
    """Return the subclass of diffusers' class of that name, or why the installed diffusers has none."""
    original = getattr(importlib.import_module(module), name, None)
    if original is None:
        return f"diffusers {diffusers.__version__} has none"
    try:
        original.step  # noqa: B018
    except ImportError as error:
        # Without scipy or torchsde, diffusers exports a placeholder that raises at each attribute.
        return str(error).strip()
    if name in _SCALES_MODEL_INPUT:
        stepping = (*stepping, "scale_model_input")
    doc = f"diffusers' {name} with fused steps; see `fastdiff.diffusers`.\n\n{original.__doc__ or ''}"
    mixins: tuple[type, ...] = (PerTokenSteps,) if name == "FlowMatchEulerDiscreteScheduler" else ()
    return type(name, (*mixins, FusedScheduler, original), {"stepping": stepping, "__doc__": doc})


_MADE = {name: _fused_class(name, *spec) for name, spec in sorted(_SCHEDULERS.items())}
CLASSES: dict[str, Any] = {name: made for name, made in _MADE.items() if isinstance(made, type)}
#: Classes that are not available here, and why.
ABSENT: dict[str, str] = {name: made for name, made in _MADE.items() if isinstance(made, str)}
globals().update(CLASSES)
__all__ = sorted(CLASSES)
