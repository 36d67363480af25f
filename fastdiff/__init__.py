# SPDX-License-Identifier: MIT
"""fastdiff: a diffusion sampling step, guidance and noise included, as one fused pass.

The way of the data::

    schedules/  the training noise schedule, which of its timesteps a loop visits, α and σ there
    solvers/    a paper's formula, run once on symbols, gives a table: a row of scalars a model call
    samplers/   a schedule and a solver, compiled to a table, and the ways to walk it
    guidance/   the model under classifier-free guidance
    noise/      noise that is drawn outside the step
    sampling/   walks the rows of a table and calls the model in between; single steps
    loops/      one function a method in k-diffusion's manner
    graphs/     captures both as CUDA graphs
    ops/        the one fused operation, its checks, and the choice among its implementations:
                ops/reference.py, kernels/ and csrc/, which extension.py loads

From bottom to top: the modules beside the packages, ops, schedules, solvers, noise, guidance, sampling, loops, graphs,
samplers, rl, editing, analysis, sharding, classroom, digits, diffusers, training, compression, and the command line;
nothing below knows what is above.

`fastdiff.diffusers`, `fastdiff.patch` and `fastdiff.unpatch` need diffusers: they are imported when they are asked for,
and ``from fastdiff import *`` asks for none of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import _moved, ops, samplers
from .graphs import CapturedLoop
from .ops import FallbackWarning, randn
from .ops.memory import release_memory
from .philox import Purpose, as_seeds, spawn_seeds
from .samplers import (
    BaseSampler,
    DDIMSampler,
    DDPMSampler,
    DEISSampler,
    DPMSolverSampler,
    EDMEulerSampler,
    EulerAncestralSampler,
    EulerSampler,
    FlowEulerSampler,
    FlowHeunSampler,
    HeunSampler,
    IPNDMSampler,
    KDPM2AncestralSampler,
    KDPM2Sampler,
    LCMSampler,
    LMSSampler,
    PNDMSampler,
    SASolverSampler,
    TCDSampler,
    UniPCSampler,
    create_sampler,
)
from .samplers.manager import AdvancedSamplingManager, create_advanced_sampling_manager
from .sampling.config import SamplingConfig
from .sampling.loop import SamplingResult, StepInfo
from .sampling.stepper import Stepper
from .sampling.stream import SampleStream
from .schedules import (
    BaseNoiseScheduler,
    CosineNoiseScheduler,
    CustomNoiseScheduler,
    ExponentialNoiseScheduler,
    FlowNoiseScheduler,
    KarrasNoiseScheduler,
    LaplaceNoiseScheduler,
    LinearNoiseScheduler,
    LinearRescaledNoiseScheduler,
    NoiseSchedulerConfig,
    NoiseScheduleType,
    QuadraticNoiseScheduler,
    ScaledLinearNoiseScheduler,
    SigmoidNoiseScheduler,
    create_noise_scheduler,
)
from .solvers import SamplingMethod
from .solvers.table import StepTable

if TYPE_CHECKING:
    from . import diffusers as diffusers
    from .diffusers.patch import patch as patch
    from .diffusers.patch import unpatch as unpatch

__version__ = "0.1.0"

_moved.install()
globals().update((cls.__name__, cls) for cls in samplers.SAMPLERS.values())

__all__ = [
    "AdvancedSamplingManager",
    "BaseNoiseScheduler",
    "BaseSampler",
    "CapturedLoop",
    "CosineNoiseScheduler",
    "CustomNoiseScheduler",
    "DDIMSampler",
    "DDPMSampler",
    "DEISSampler",
    "DPMSolverSampler",
    "EDMEulerSampler",
    "EulerAncestralSampler",
    "EulerSampler",
    "ExponentialNoiseScheduler",
    "FallbackWarning",
    "FlowEulerSampler",
    "FlowHeunSampler",
    "FlowNoiseScheduler",
    "HeunSampler",
    "IPNDMSampler",
    "KDPM2AncestralSampler",
    "KDPM2Sampler",
    "KarrasNoiseScheduler",
    "LCMSampler",
    "LMSSampler",
    "LaplaceNoiseScheduler",
    "LinearNoiseScheduler",
    "LinearRescaledNoiseScheduler",
    "NoiseScheduleType",
    "NoiseSchedulerConfig",
    "PNDMSampler",
    "Purpose",
    "QuadraticNoiseScheduler",
    "SASolverSampler",
    "SampleStream",
    "SamplingConfig",
    "SamplingMethod",
    "SamplingResult",
    "ScaledLinearNoiseScheduler",
    "SigmoidNoiseScheduler",
    "StepInfo",
    "StepTable",
    "Stepper",
    "TCDSampler",
    "UniPCSampler",
    "as_seeds",
    "create_advanced_sampling_manager",
    "create_noise_scheduler",
    "create_sampler",
    "ops",
    "randn",
    "release_memory",
    "spawn_seeds",
]


def __getattr__(name: str) -> Any:
    if name in ("diffusers", "patch", "unpatch"):
        from importlib import import_module

        module = import_module(".diffusers", __name__)
        return module if name == "diffusers" else getattr(module, name)
    return _moved.attribute(__name__, name)
