# SPDX-License-Identifier: MIT
"""Solvers: short pure functions from noise levels and options to a `StepTable`, in float64 on the host.

The modules::

    __init__.py     the registry: every solver that people ask for by name, once
    ddim.py ...     one file a solver: its paper's formula, on the symbols of affine.py
    prediction.py   x0 and ε from the model's output, for every prediction type
    exponential.py  one step in λ, for the DPM-Solvers
    affine.py       symbols for the tensors of a step
    table.py        what a solver returns: one row of coefficients a model call

Letters mean the same in every file.  A step goes from level t, where the model is called, to level s, which has
less noise; papers that step from s to t are written with the two exchanged.  x = α·x0 + σ·ε is the sample, ε its
noise, z a fresh normal draw; σ̂ = σ/α, λ = log(α/σ) and h = λ_s − λ_t > 0.

None of this is on the hot path, and nothing here knows of samplers.  See "How to add a solver" in CONTRIBUTING.md.
"""

from __future__ import annotations

from enum import Enum
from typing import Any

from ..errors import parse_choice
from ..schedules.levels import Levels
from .ddim import ddim
from .ddpm import VarianceType, ddpm
from .dpm_multistep import dpm_multistep
from .dpm_singlestep import dpm_singlestep
from .euler import Churn, euler
from .euler_ancestral import euler_ancestral
from .exponential import Algorithm, SolverType
from .heun import heun
from .prediction import Prediction, PredictionType
from .registry import Solver, SolverEntry
from .table import StepTable

__all__ = [
    "ENTRIES",
    "SOLVER_MODES",
    "Algorithm",
    "Churn",
    "Prediction",
    "PredictionType",
    "SamplingMethod",
    "SolverEntry",
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

SOLVER_MODES = ("multistep", "singlestep")


class SamplingMethod(str, Enum):
    """The solvers by name; `ENTRIES` has the facts of each."""

    DDPM = "ddpm"
    DDIM = "ddim"
    DPM_SOLVER = "dpm_solver"
    EULER = "euler"
    EULER_ANCESTRAL = "euler_ancestral"
    HEUN = "heun"

    @classmethod
    def parse(cls, value: str | SamplingMethod) -> SamplingMethod:
        return parse_choice(cls, "SamplingConfig", "method", value)

    # A member equals its name, so that it has to have its hash: dictionaries find it by either.
    __hash__ = str.__hash__

    def __str__(self) -> str:
        return str(self.value)

    @property
    def entry(self) -> SolverEntry:
        return ENTRIES[self]

    @property
    def presets(self) -> dict[str, dict[str, Any]]:
        """Fields of `SamplingConfig` by the names that the command line takes."""
        named = self.entry.presets or {self.value: {}}
        return {name: {"method": self, **options} for name, options in named.items()}


def _dpm_solver(levels: Levels, prediction: Prediction, *, solver_mode: str = "multistep", **options: Any) -> StepTable:
    """Both modes under one name; singlestep has no use for three of the options."""
    if solver_mode == "multistep":
        return dpm_multistep(levels, prediction, **options)
    unused = ("lower_order_final", "euler_at_final", "third_order")
    return dpm_singlestep(levels, prediction, **{name: options[name] for name in options if name not in unused})


def _with_churn(solver: Solver) -> Solver:
    """The solver with the fields of `Churn` as its options."""
    return lambda levels, prediction, **churn: solver(levels, prediction, churn=Churn(**churn))


_CHURN = ("s_churn", "s_tmin", "s_tmax", "s_noise")
_DPM_SOLVER = (
    "algorithm_type",
    "solver_order",
    "solver_mode",
    "solver_type",
    "lower_order_final",
    "euler_at_final",
    "third_order",
)

#: The registry.  The sampler classes, `create_sampler`, the command line, the benchmarks, the table of docs/samplers.md
#: and the matrices of the tests all go by it.
ENTRIES: dict[SamplingMethod, SolverEntry] = {
    SamplingMethod.DDPM: SolverEntry(
        "DDPMSampler", (ddpm,), ("variance_type",), "arXiv 2006.11239; learned variances 2102.09672"
    ),
    SamplingMethod.DDIM: SolverEntry("DDIMSampler", (ddim,), ("eta", "use_clipped_model_output"), "2010.02502"),
    SamplingMethod.DPM_SOLVER: SolverEntry(
        "DPMSolverSampler",
        (dpm_multistep, dpm_singlestep),
        _DPM_SOLVER,
        "2206.00927, 2211.01095",
        compile=_dpm_solver,
        presets={algorithm.value: {"algorithm_type": algorithm.value} for algorithm in Algorithm},
        order=2,
    ),
    SamplingMethod.EULER: SolverEntry("EulerSampler", (euler,), _CHURN, "2206.00364", compile=_with_churn(euler)),
    SamplingMethod.EULER_ANCESTRAL: SolverEntry(
        "EulerAncestralSampler", (euler_ancestral,), ("eta", "s_noise"), "k-diffusion", presets={"euler-ancestral": {}}
    ),
    SamplingMethod.HEUN: SolverEntry(
        "HeunSampler", (heun,), _CHURN, "2206.00364", compile=_with_churn(heun), order=2, calls_per_step=2
    ),
}
