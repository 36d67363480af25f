# SPDX-License-Identifier: MIT
"""Guidance: the methods, one file each, and the model under classifier-free guidance.

A method gives the weight of each branch in the guided output, from scalars a sample; the step combines the branches
(`fastdiff.sampling.GuidedStepper`).
"""

from .cfg_plus_plus import cfg_plus_plus
from .composed import ComposedGuidance, DualGuidance
from .frequency import FrequencyDecoupledGuidance
from .gradients import ClassifierGuidance, LossGuidance
from .guided_model import GuidanceMode, GuidedModel, Model, unwrap, write_model_input
from .magnitude_aware import MagnitudeAwareGuidance
from .method import Guidance, Place
from .mixed import MixedGuidance
from .per_token_norm import PerTokenNormGuidance
from .perpendicular import PerpendicularGuidance
from .perturbed import PerturbedGuidance
from .plain import AutoGuidance, PlainGuidance
from .projected import LateProjectedGuidance, ProjectedGuidance
from .rescale import rescaling_of, rows_with_scaled_output
from .residual import ResidualGuidance
from .tangential import TangentialGuidance
from .zero_star import ZeroStarGuidance

__all__ = [
    "AutoGuidance",
    "ClassifierGuidance",
    "ComposedGuidance",
    "DualGuidance",
    "FrequencyDecoupledGuidance",
    "Guidance",
    "GuidanceMode",
    "GuidedModel",
    "LateProjectedGuidance",
    "LossGuidance",
    "MagnitudeAwareGuidance",
    "MixedGuidance",
    "Model",
    "PerTokenNormGuidance",
    "PerpendicularGuidance",
    "PerturbedGuidance",
    "Place",
    "PlainGuidance",
    "ProjectedGuidance",
    "ResidualGuidance",
    "TangentialGuidance",
    "ZeroStarGuidance",
    "cfg_plus_plus",
    "rescaling_of",
    "rows_with_scaled_output",
    "unwrap",
    "write_model_input",
]
