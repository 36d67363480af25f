# SPDX-License-Identifier: MIT
"""Solvers: short pure functions from noise levels and options to a `StepTable`, in float64 on the host.

The modules::

    __init__.py     the registry: every solver that people ask for by name, once
    ddim.py ...     one file a solver: its paper's formula, on the symbols of affine.py
    prediction.py   x0 and ε from the model's output, for every prediction type
    exponential.py  one step in λ, for the DPM-Solvers
    adams.py        multistep weights, and a predictor with its corrector, for all Adams methods
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
from .deis import deis
from .dpm_multistep import dpm_multistep
from .dpm_singlestep import dpm_singlestep
from .edm_euler import edm_euler
from .euler import Churn, euler
from .euler_ancestral import euler_ancestral
from .exponential import Algorithm, SolverType
from .flow_euler import flow_euler
from .flow_heun import flow_heun
from .heun import heun
from .ipndm import ipndm
from .kdpm2 import kdpm2
from .kdpm2_ancestral import kdpm2_ancestral
from .lcm import lcm
from .lms import lms
from .pndm import pndm
from .prediction import Prediction, PredictionType
from .registry import Solver, SolverEntry
from .sa_solver import sa_solver
from .table import StepTable
from .tcd import tcd
from .unipc import UNIPC_TYPES, unipc

__all__ = [
    "ENTRIES",
    "SOLVER_MODES",
    "UNIPC_TYPES",
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
    "deis",
    "dpm_multistep",
    "dpm_singlestep",
    "edm_euler",
    "euler",
    "euler_ancestral",
    "flow_euler",
    "flow_heun",
    "heun",
    "ipndm",
    "kdpm2",
    "kdpm2_ancestral",
    "lcm",
    "lms",
    "pndm",
    "sa_solver",
    "tcd",
    "unipc",
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
    UNIPC = "unipc"
    DEIS = "deis"
    SA_SOLVER = "sa_solver"
    LMS = "lms"
    PNDM = "pndm"
    IPNDM = "ipndm"
    LCM = "lcm"
    TCD = "tcd"
    KDPM2 = "kdpm2"
    KDPM2_ANCESTRAL = "kdpm2_ancestral"
    EDM_EULER = "edm_euler"
    FLOW_EULER = "flow_euler"
    FLOW_HEUN = "flow_heun"

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
    """The solver with the fields of `Churn` among its options."""

    def compiled(levels: Levels, prediction: Prediction, **options: Any) -> StepTable:
        churn = {name: options.pop(name) for name in _CHURN if name in options}
        return solver(levels, prediction, churn=Churn(**churn), **options)

    return compiled


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
    SamplingMethod.UNIPC: SolverEntry(
        "UniPCSampler",
        (unipc,),
        ("solver_order", "unipc_type", "predict_x0", "use_corrector", "lower_order_final"),
        "2302.04867",
        order=3,
    ),
    SamplingMethod.DEIS: SolverEntry(
        "DEISSampler", (deis,), ("solver_order", "lower_order_final"), "2204.13902", order=2
    ),
    SamplingMethod.SA_SOLVER: SolverEntry(
        "SASolverSampler",
        (sa_solver,),
        ("predictor_order", "corrector_order", "tau", "s_tmin", "s_tmax", "predict_x0", "lower_order_final"),
        "2309.05019",
        order=2,
    ),
    SamplingMethod.LMS: SolverEntry("LMSSampler", (lms,), ("multistep_order",), "k-diffusion", order=4),
    SamplingMethod.PNDM: SolverEntry("PNDMSampler", (pndm,), ("skip_prk_steps",), "2202.09778", order=2, extra_calls=1),
    SamplingMethod.IPNDM: SolverEntry("IPNDMSampler", (ipndm,), ("multistep_order",), "2204.13902", order=2),
    SamplingMethod.LCM: SolverEntry(
        "LCMSampler", (lcm,), ("timestep_scaling", "sigma_data"), "2310.04378", distilled=True
    ),
    SamplingMethod.TCD: SolverEntry("TCDSampler", (tcd,), ("eta",), "2402.19159", distilled=True),
    SamplingMethod.KDPM2: SolverEntry(
        "KDPM2Sampler", (kdpm2,), _CHURN, "2206.00364", compile=_with_churn(kdpm2), order=2, calls_per_step=2
    ),
    SamplingMethod.KDPM2_ANCESTRAL: SolverEntry(
        "KDPM2AncestralSampler", (kdpm2_ancestral,), ("eta", "s_noise"), "k-diffusion", order=2, calls_per_step=2
    ),
    SamplingMethod.EDM_EULER: SolverEntry(
        "EDMEulerSampler", (edm_euler,), ("sigma_data", *_CHURN), "2206.00364", compile=_with_churn(edm_euler)
    ),
    SamplingMethod.FLOW_EULER: SolverEntry("FlowEulerSampler", (flow_euler,), ("stochastic_sampling",), "2209.03003"),
    SamplingMethod.FLOW_HEUN: SolverEntry("FlowHeunSampler", (flow_heun,), (), "2209.03003", order=2, calls_per_step=2),
}
