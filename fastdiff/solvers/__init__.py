# SPDX-License-Identifier: MIT
"""Solvers: short pure functions from noise levels and options to a `StepTable`, in float64 on the host.

None of this is on the hot path.  To add one, write ``def solver(levels, prediction, *, options) -> StepTable`` with
the symbols of `fastdiff.solvers.affine` and export it here; see "How to add a solver" in CONTRIBUTING.md.
"""

from .ddim import ddim
from .ddpm import VarianceType, ddpm
from .dpm_multistep import dpm_multistep
from .dpm_singlestep import dpm_singlestep
from .euler import Churn, euler, euler_ancestral, heun
from .exponential import Algorithm, SolverType
from .prediction import Prediction, PredictionType

__all__ = [
    "Algorithm",
    "Churn",
    "Prediction",
    "PredictionType",
    "SolverType",
    "VarianceType",
    "ddim",
    "ddpm",
    "dpm_multistep",
    "dpm_singlestep",
    "euler",
    "euler_ancestral",
    "heun",
]
