# SPDX-License-Identifier: MIT
"""Every form of every registered solver, the table behind the parameters of the tests.

Every registered solver is included.  `VARIANTS` adds the options that change its formula, by name; a method that
is left out there is taken in the forms of its presets.  The other facts of a solver are in its `SolverEntry`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from fastdiff import SamplingMethod
from fastdiff.schedules.levels import Levels, levels_from_half_log_snr
from fastdiff.solvers import Prediction, PredictionType
from fastdiff.solvers.table import StepTable

ALGORITHMS = ("dpmsolver", "dpmsolver++", "sde-dpmsolver", "sde-dpmsolver++")
VARIANCE_TYPES = ("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", "learned", "learned_range")
CHURN = {"s_churn": 1.5, "s_tmin": 0.05, "s_tmax": 30.0, "s_noise": 1.01}

Options = dict[str, Any]

#: No lower order in the last steps, for solvers that lower it at any number of steps.
WHOLE_ORDER: Options = {"lower_order_final": False}


@dataclass(frozen=True)
class Form:
    """A method with options, which are fields of `SamplingConfig`."""

    method: SamplingMethod
    options: Options = field(default_factory=dict)

    def __call__(self, levels: Levels, prediction: Prediction) -> StepTable:
        return self.method.entry.table(levels, prediction, **self.options)

    @property
    def draws_noise(self) -> bool:
        levels = levels_from_half_log_snr([-1.0, -0.4, 0.2, 1.0, math.inf])
        return any(self(levels, Prediction(PredictionType.V_PREDICTION)).draws_noise)


def _dpm_solver() -> dict[str, Options]:
    found: dict[str, Options] = {}
    for algorithm in ALGORITHMS:
        multistep: Options = {"algorithm_type": algorithm, "lower_order_final": False}
        for order in (1, 2, 3):
            for solver_type in ("midpoint", "heun"):
                name, options = (
                    f"{algorithm}-{order}-{solver_type}",
                    {"solver_order": order, "solver_type": solver_type},
                )
                found[f"singlestep-{name}"] = {
                    "algorithm_type": algorithm,
                    "solver_mode": "singlestep",
                    **options,
                }
                found[f"multistep-{name}"] = {**multistep, **options}
        found[f"multistep-{algorithm}-3-exact"] = {**multistep, "solver_order": 3, "third_order": "exact"}
        found[f"multistep-{algorithm}-3-lower_final"] = {"algorithm_type": algorithm, "solver_order": 3}
    return found


VARIANTS: dict[SamplingMethod, dict[str, Options]] = {
    SamplingMethod.DDPM: {f"ddpm-{kind}": {"variance_type": kind} for kind in VARIANCE_TYPES},
    SamplingMethod.DDIM: {
        **{f"ddim-{eta}": {"eta": eta} for eta in (0.0, 0.5, 1.0)},
        "ddim-clipped": {"use_clipped_model_output": True},
    },
    SamplingMethod.DPM_SOLVER: _dpm_solver(),
    SamplingMethod.EULER: {"euler": {}, "euler-churn": CHURN},
    SamplingMethod.HEUN: {"heun": {}, "heun-churn": CHURN},
    SamplingMethod.EULER_ANCESTRAL: {f"ancestral-{eta}": {"eta": eta} for eta in (0.5, 1.0)},
    SamplingMethod.UNIPC: {
        "unipc": WHOLE_ORDER,
        "unipc-3": {"solver_order": 3, **WHOLE_ORDER},
        "unipc-3-noise": {"solver_order": 3, "predict_x0": False, **WHOLE_ORDER},
    },
    SamplingMethod.DEIS: {"deis-3": {"solver_order": 3, **WHOLE_ORDER}},
    SamplingMethod.SA_SOLVER: {
        "sa": WHOLE_ORDER,
        "sa-ode-noise": {"tau": 0.0, "predictor_order": 3, "predict_x0": False, **WHOLE_ORDER},
    },
    SamplingMethod.PNDM: {"pndm": {}, "pndm-prk": {"skip_prk_steps": False}},
    SamplingMethod.KDPM2: {"kdpm2": {}, "kdpm2-churn": CHURN},
    SamplingMethod.FLOW_EULER: {"flow_euler": {}, "flow_euler-stochastic": {"stochastic_sampling": True}},
}

#: Forms whose loops do not converge to the data of a model that predicts the mean of x0.
NOT_CONVERGING = ("lcm", "tcd", "flow_euler-stochastic")
#: Orders of forms that differ from that of the method's default.
ORDERS = {"unipc-3": 4, "unipc-3-noise": 4, "deis-3": 3}


def _forms(method: SamplingMethod) -> dict[str, Form]:
    variants = VARIANTS.get(method) or method.entry.presets or {method.value: {}}
    return {name: Form(method, dict(options)) for name, options in variants.items()}


#: Every method × option that changes the formula, by name.
FORMS: dict[str, Form] = {name: form for method in SamplingMethod for name, form in _forms(method).items()}
METHODS: list[str] = [method.value for method in SamplingMethod]
#: Methods that add no noise unless an option asks for it.
DETERMINISTIC: list[str] = [method.value for method in SamplingMethod if not Form(method).draws_noise]


def _stochastic() -> list[tuple[str, Options]]:
    """For each method and mode that can draw noise, the first such form of a fixed variance, for `create_sampler`."""
    found: dict[tuple[str, str], tuple[str, Options]] = {}
    for form in FORMS.values():
        if form.draws_noise:
            key = form.method.value, form.options.get("solver_mode", "")
            found.setdefault(key, (form.method.value, form.options))
    return list(found.values())


STOCHASTIC = _stochastic()


def model_calls(method: str, steps: int) -> int:
    """The number of model calls of a loop that ends at the clean sample."""
    entry = SamplingMethod(method).entry
    return entry.calls_per_step * (steps - 1) + 1 + (entry.extra_calls if steps > 1 else 0)
