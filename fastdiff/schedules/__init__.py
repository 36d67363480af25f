# SPDX-License-Identifier: MIT
"""The training noise schedule, and what a loop takes from it.

The modules::

    noise_schedulers.py  betas and ᾱ of each schedule, from a configuration
    betas.py             the formulas
    config.py            the configuration and its checks
    timesteps.py         which timesteps or noise levels a loop visits
    levels.py            α and σ there
    schedule_file.py     the numbers of a schedule as a file
"""

from .betas import rescale_zero_terminal_snr
from .config import NoiseSchedulerConfig, NoiseScheduleType
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
    "rescale_zero_terminal_snr",
]
