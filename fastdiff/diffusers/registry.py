# SPDX-License-Identifier: MIT
"""The classes: each of diffusers' continuous schedulers, under its own name, with fused steps.

Schedulers of discrete tokens (Amused, VQ diffusion, discrete DDIM, block refinement) add up no tensors; they have no
class here.
"""

from __future__ import annotations

import importlib
from typing import Any

import diffusers

from .mixin import FusedScheduler
from .per_token import PerTokenSteps

#: Class by class, the methods that take a step, and the module where diffusers does not export it.
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

#: Classes whose `scale_model_input` is more than its argument.
_SCALES_MODEL_INPUT = frozenset(
    f"{name}Scheduler"
    for name in (
        "CMStochasticIterative", "ConsistencyDecoder", "CosineDPMSolverMultistep", "DPMSolverSDE",
        "EDMDPMSolverMultistep", "EDMEuler", "EulerAncestralDiscrete", "EulerDiscrete", "HeunDiscrete",
        "KDPM2AncestralDiscrete", "KDPM2Discrete", "LMSDiscrete",
    )
)  # fmt: skip


def _fused_class(name: str, stepping: tuple[str, ...], module: str) -> Any:
    """The class over diffusers' own of that name; why there is none, where the installed diffusers has none."""
    original = getattr(importlib.import_module(module), name, None)
    if original is None:
        return f"diffusers {diffusers.__version__} has none"
    try:
        original.step  # noqa: B018
    except ImportError as error:
        # What diffusers exports without what it needs (scipy, torchsde) is a stand-in that says so at each look.
        return str(error).strip()
    if name in _SCALES_MODEL_INPUT:
        stepping = (*stepping, "scale_model_input")
    doc = f"diffusers' {name} with fused steps; see `fastdiff.diffusers`.\n\n{original.__doc__ or ''}"
    mixins: tuple[type, ...] = (PerTokenSteps,) if name == "FlowMatchEulerDiscreteScheduler" else ()
    return type(name, (*mixins, FusedScheduler, original), {"stepping": stepping, "__doc__": doc})


_MADE = {name: _fused_class(name, *spec) for name, spec in sorted(_SCHEDULERS.items())}
CLASSES: dict[str, Any] = {name: made for name, made in _MADE.items() if isinstance(made, type)}
#: Classes that cannot be had here, and why.
ABSENT: dict[str, str] = {name: made for name, made in _MADE.items() if isinstance(made, str)}
globals().update(CLASSES)
__all__ = sorted(CLASSES)
