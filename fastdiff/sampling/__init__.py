# SPDX-License-Identifier: MIT
"""Loops and single steps on the fused operation.

The modules::

    stepper.py           walks the rows of a step table
    blend_target.py      what a masked step blends its samples with
    loop.py              calls the model in between
    config.py            the configuration of a sampler and its checks
    single_steps.py      one step of a solver, for people who bring their own loop
    timing.py            times and peak memory of a loop
    reference_counts.py  who holds a tensor
"""

from .blend_target import BlendTarget
from .config import SamplingConfig, SamplingMethod
from .loop import SamplingResult, StepInfo
from .single_steps import cfg_combine, ddim_step, ddpm_step, dpm_solver_step, euler_step
from .stepper import Stepper

__all__ = [
    "BlendTarget",
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
