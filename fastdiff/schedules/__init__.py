# SPDX-License-Identifier: MIT
"""The training noise schedule, and what a loop takes from it.

The modules::

    base.py              the arrays of a schedule and its forward process
    noise_schedulers.py  betas and ᾱ of each schedule, from a configuration
    flow.py              the schedule of flow matching
    betas.py             the formulas
    config.py            the configuration and its checks
    timesteps.py         which timesteps or noise levels a loop visits
    levels.py            α and σ there
    schedule_file.py     the numbers of a schedule as a file
"""

from .betas import rescale_zero_terminal_snr
from .config import NoiseSchedulerConfig, NoiseScheduleType
from .flow import FlowNoiseScheduler, flow_mu
from .noise_schedulers import (
    BaseNoiseScheduler,
    CosineNoiseScheduler,
    CustomNoiseScheduler,
    ExponentialNoiseScheduler,
    KarrasNoiseScheduler,
    LaplaceNoiseScheduler,
    LinearNoiseScheduler,
    LinearRescaledNoiseScheduler,
    QuadraticNoiseScheduler,
    ScaledLinearNoiseScheduler,
    SigmoidNoiseScheduler,
    create_noise_scheduler,
)
from .schedule_file import ScheduleKind, ScheduleValues

__all__ = [
    "BaseNoiseScheduler",
    "CosineNoiseScheduler",
    "CustomNoiseScheduler",
    "ExponentialNoiseScheduler",
    "FlowNoiseScheduler",
    "KarrasNoiseScheduler",
    "LaplaceNoiseScheduler",
    "LinearNoiseScheduler",
    "LinearRescaledNoiseScheduler",
    "NoiseScheduleType",
    "NoiseSchedulerConfig",
    "QuadraticNoiseScheduler",
    "ScaledLinearNoiseScheduler",
    "ScheduleKind",
    "ScheduleValues",
    "SigmoidNoiseScheduler",
    "create_noise_scheduler",
    "flow_mu",
    "rescale_zero_terminal_snr",
]
