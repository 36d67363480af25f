# SPDX-License-Identifier: MIT
"""DDPM as it is taught, on the fused step: the sampler of a demo, and "DDPM from scratch", in one class.

The modules::

    ddpm.py        `DDPMSampler`: the schedule's arrays, one step, the loop, classifier guidance
    comparison.py  `FastSampler` and `SamplingComparison`
    models.py      a model's device and shape, a guidance function's gradient

The code is meant to be read.  docs/pitfalls.md lists its forms that are wrong elsewhere.
"""

from ..analysis.sample_statistics import compute_sample_variance, compute_sharpness
from .comparison import FastSampler, SamplingComparison
from .ddpm import DDPMSampler

__all__ = ["DDPMSampler", "FastSampler", "SamplingComparison", "compute_sample_variance", "compute_sharpness"]
