# SPDX-License-Identifier: MIT
"""Loops and single steps on the fused operation.

The modules::

    stepper.py           walks the rows of a step table
    blend_target.py      what a masked step blends its samples with
    guided_stepper.py    walks them under a guidance method
    cached_calls.py      walks them with fewer model calls
    loop.py              calls the model in between
    stream.py            a loop as an iterator
    result.py            what a loop tells after each step and at its end
    trajectory.py        the frames of a loop
    interrupts.py        Ctrl-C in a loop
    model_mode.py        evaluation mode for a loop
    config.py            the configuration of a sampler and its checks
    single_steps.py      one step of a solver, for people who bring their own loop
    timing.py            times and peak memory of a loop
    reference_counts.py  who holds a tensor
"""

from .blend_target import BlendTarget
from .cached_calls import CachedCalls, CachedStepper
from .config import SamplingConfig, SamplingMethod
from .guided_stepper import GuidedStepper
from .loop import SamplingResult, StepInfo
from .single_steps import cfg_combine, ddim_step, ddpm_step, dpm_solver_step, euler_step
from .stepper import Stepper
from .stream import SampleStream

__all__ = [
    "BlendTarget",
    "CachedCalls",
    "CachedStepper",
    "GuidedStepper",
    "SampleStream",
    "SamplingConfig",
    "SamplingMethod",
    "SamplingResult",
    "StepInfo",
    "Stepper",
    "cfg_combine",
    "ddim_step",
    "ddpm_step",
    "dpm_solver_step",
    "euler_step",
]
