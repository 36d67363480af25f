# SPDX-License-Identifier: MIT
"""fastdiff: a diffusion sampling step, guidance and noise included, as one fused pass.

The way of the data::

    schedules.py   the training noise schedule: betas, ᾱ
    timesteps.py   which of its timesteps or noise levels a loop visits
    levels.py      α and σ there
    solvers/       a paper's formula, run once on symbols (affine.py) ...
    table.py       ... gives a row of scalars a model call
    stepper.py     walks the rows; loop.py calls the model in between, graphs.py captures both
    ops/           the one fused operation, its checks, and the choice among
    csrc/ kernels/ reference.py    its implementations

`samplers.py` and `manager.py` put them together; nothing below knows what is above it.

`fastdiff.diffusers`, `fastdiff.patch` and `fastdiff.unpatch` need diffusers: they are imported when they are asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import ops
from .graphs import CapturedLoop
from .loop import SamplingResult, StepInfo
from .manager import AdvancedSamplingManager, create_advanced_sampling_manager
from .memory import release_memory
from .ops import FallbackWarning, randn
from .philox import Purpose, as_seeds, spawn_seeds
from .samplers import (
    BaseSampler,
    DDIMSampler,
    DDPMSampler,
    DPMSolverSampler,
    EulerAncestralSampler,
    EulerSampler,
    HeunSampler,
    create_sampler,
)
from .sampling_config import SamplingConfig, SamplingMethod
from .schedules import (
    BaseNoiseScheduler,
    CosineNoiseScheduler,
    CustomNoiseScheduler,
    ExponentialNoiseScheduler,
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
from .stepper import Stepper
from .table import StepTable

if TYPE_CHECKING:
    from . import diffusers
    from .diffusers import patch, unpatch

__version__ = "0.1.0"

__all__ = [
    "AdvancedSamplingManager",
    "BaseNoiseScheduler",
    "BaseSampler",
    "CapturedLoop",
    "CosineNoiseScheduler",
    "CustomNoiseScheduler",
    "DDIMSampler",
    "DDPMSampler",
    "DPMSolverSampler",
    "EulerAncestralSampler",
    "EulerSampler",
    "ExponentialNoiseScheduler",
    "FallbackWarning",
    "HeunSampler",
    "KarrasNoiseScheduler",
    "LaplaceNoiseScheduler",
    "LinearNoiseScheduler",
    "LinearRescaledNoiseScheduler",
    "NoiseScheduleType",
    "NoiseSchedulerConfig",
    "Purpose",
    "QuadraticNoiseScheduler",
    "SamplingConfig",
    "SamplingMethod",
    "SamplingResult",
    "ScaledLinearNoiseScheduler",
    "SigmoidNoiseScheduler",
    "StepInfo",
    "StepTable",
    "Stepper",
    "as_seeds",
    "create_advanced_sampling_manager",
    "create_noise_scheduler",
    "create_sampler",
    "diffusers",
    "ops",
    "patch",
    "randn",
    "release_memory",
    "spawn_seeds",
    "unpatch",
]


def __getattr__(name: str) -> Any:
    if name in ("diffusers", "patch", "unpatch"):
        from importlib import import_module

        module = import_module(".diffusers", __name__)
        return module if name == "diffusers" else getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
