# SPDX-License-Identifier: MIT
"""The configuration of a sampler: its method and the options of all methods, checked when they are set."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import checked_bool, checked_float, checked_integer, error_message, unknown_name
from ..guidance import GuidanceMode
from ..json_fields import fields_from_json, fields_to_json, parsed_object
from ..schedules.timesteps import SIGMA_SPACINGS
from ..solvers import SOLVER_MODES, UNIPC_TYPES, Algorithm, PredictionType, SamplingMethod, SolverType, VarianceType
from ..solvers.adams import checked_order
from ..solvers.dpm_multistep import THIRD_ORDERS, check_order

__all__ = ["METHOD_ETA", "SamplingConfig", "SamplingMethod", "check_guidance_rescale", "check_guidance_scale"]


class _MethodDefault(float):
    """A default that a method replaces by its own; equal to the number that people read."""


#: The eta of a configuration that names none: 0.0 to read, and the method's own default in its table.
METHOD_ETA = _MethodDefault(0.0)


@dataclass(frozen=True)
class SamplingConfig:
    """The options of sampling.  A method ignores all options but those of its `SolverEntry`.

    Args:
        method: a `SamplingMethod` or its name.
        num_inference_steps: steps of the loop, 1 to num_train_timesteps.  One model call each; Heun makes two in all
            steps but the last.
        eta: how much noise a method puts back, 0: none, 1: DDPM's.  Left out, or None, it reads 0.0 and every method
            takes its own default, 0 for DDIM and 1 for Euler-ancestral; a number that is given, 0.0 too, is taken by
            all methods that have the option.
        guidance_scale: of classifier-free guidance; 1 makes no unconditional call.
        guidance_rescale: φ of arXiv 2305.08891, section 3.4, 0 to 1: the guided output is scaled by
            φ·std(c)/std(guided) + 1 − φ, a sample; c is the conditional output.
        use_clipped_model_output: DDIM derives ε again from the clipped x0.
        prediction_type: ``epsilon``, ``v_prediction``, ``sample``, ``flow_prediction`` or ``edm``.
        thresholding: dynamic thresholding of x0, instead of clip_sample.
        dynamic_thresholding_ratio: the quantile of |x0| that it takes, in (0, 1]. The threshold is held to 1 or more
            and to the schedule's ``sample_max_value``, 1 or more, or less.
        algorithm_type: DPM-Solver's form: ``dpmsolver``, ``dpmsolver++``, ``sde-dpmsolver``, ``sde-dpmsolver++``.
        solver_type: ``midpoint`` or ``heun`` second-order steps of DPM-Solver.
        lower_order_final: DPM-Solver takes its last steps at lower order when there are fewer than 15.
        use_karras_sigmas: short for ``sigma_spacing="karras"``.
        solver_order: 1, 2 or 3, of DPM-Solver.
        solver_mode: ``multistep`` or ``singlestep`` DPM-Solver.
        euler_at_final: DPM-Solver's last step is of order 1.
        third_order: ``compatible`` or ``exact``, see `fastdiff.solvers.dpm_multistep`.
        variance_type: of DDPM, see `fastdiff.solvers.ddpm`.
        sigma_spacing: ``karras``, ``exponential``, ``beta`` or ``lu`` noise levels instead of the scheduler's
            timestep_spacing; None keeps that.
        set_alpha_to_one: the last step goes to the clean sample; False: to the noise of timestep 0.
        s_churn, s_tmin, s_tmax, s_noise: of Euler and Heun, see `fastdiff.solvers.Churn`; s_noise of
            Euler-ancestral too.
        guidance_mode: ``batched`` or ``sequential``, see `fastdiff.guidance.GuidanceMode`.
        unipc_type: ``bh1`` or ``bh2``, see `fastdiff.solvers.unipc`.
        predict_x0: UniPC and SA-Solver interpolate x0; False: ε.
        use_corrector: of UniPC.
        predictor_order, corrector_order: of SA-Solver, 1 to 4; 0 for no corrector.
        tau: how much noise SA-Solver adds, 0 for none; in the range of σ̂ from s_tmin to s_tmax.
        multistep_order: 1 to 4, of LMS and IPNDM.
        skip_prk_steps: PNDM starts with one step of two model calls instead of three of four.
        timestep_scaling: of LCM.
        sigma_data: the standard deviation of the data, of LCM, EDM Euler and the prediction type ``edm``.
        stochastic_sampling: flow Euler steps to fresh noise.

    Raises:
        ValueError, TypeError: a field is out of range or of the wrong type; the message names it.
    """

    method: SamplingMethod | str = SamplingMethod.DDPM
    num_inference_steps: int = 50
    eta: float | None = METHOD_ETA
    guidance_scale: float = 7.5
    use_clipped_model_output: bool = False
    prediction_type: PredictionType | str = PredictionType.EPSILON
    thresholding: bool = False
    dynamic_thresholding_ratio: float = 0.995
    algorithm_type: Algorithm | str = Algorithm.DPM_SOLVER_PP
    solver_type: SolverType | str = SolverType.MIDPOINT
    lower_order_final: bool = True
    use_karras_sigmas: bool = False
    solver_order: int = 2
    solver_mode: str = "multistep"
    euler_at_final: bool = False
    third_order: str = "compatible"
    variance_type: VarianceType | str = VarianceType.FIXED_SMALL
    sigma_spacing: str | None = None
    set_alpha_to_one: bool = True
    s_churn: float = 0.0
    s_tmin: float = 0.0
    s_tmax: float = math.inf
    s_noise: float = 1.0
    guidance_mode: GuidanceMode | str = GuidanceMode.BATCHED
    unipc_type: str = "bh2"
    predict_x0: bool = True
    use_corrector: bool = True
    predictor_order: int = 2
    corrector_order: int = 2
    tau: float = 1.0
    multistep_order: int = 4
    skip_prk_steps: bool = True
    timestep_scaling: float = 10.0
    sigma_data: float = 0.5
    stochastic_sampling: bool = False
    guidance_rescale: float = 0.0

    def __post_init__(self) -> None:
        parsed = {
            "method": SamplingMethod.parse(self.method),
            "prediction_type": PredictionType.parse(self.prediction_type),
            "algorithm_type": Algorithm.parse(self.algorithm_type),
            "solver_type": SolverType.parse(self.solver_type),
            "variance_type": VarianceType.parse(self.variance_type),
            "guidance_mode": GuidanceMode.parse(self.guidance_mode),
            "num_inference_steps": checked_integer(
                "SamplingConfig", "num_inference_steps", self.num_inference_steps, 1
            ),
        }
        for name, value in parsed.items():
            object.__setattr__(self, name, value)
        check_order(self.solver_order)
        for name, known in (("solver_mode", SOLVER_MODES), ("third_order", THIRD_ORDERS), ("unipc_type", UNIPC_TYPES)):
            if getattr(self, name) not in known:
                raise unknown_name("SamplingConfig", name, getattr(self, name), known)
        if self.sigma_spacing is not None and self.sigma_spacing not in SIGMA_SPACINGS:
            raise unknown_name("SamplingConfig", "sigma_spacing", self.sigma_spacing, SIGMA_SPACINGS)
        for name in (
            "use_clipped_model_output",
            "thresholding",
            "lower_order_final",
            "use_karras_sigmas",
            "euler_at_final",
            "set_alpha_to_one",
            "predict_x0",
            "use_corrector",
            "skip_prk_steps",
            "stochastic_sampling",
        ):
            checked_bool("SamplingConfig", name, getattr(self, name))
        self._check_numbers()

    def _check_numbers(self) -> None:
        operation = "SamplingConfig"
        if self.eta is None:
            object.__setattr__(self, "eta", METHOD_ETA)
        checked_float(operation, "eta", self.eta, 0.0)
        for name in ("s_churn", "s_tmin", "s_noise"):
            checked_float(operation, name, getattr(self, name), 0.0)
        if self.s_tmax != math.inf:
            checked_float(operation, "s_tmax", self.s_tmax, 0.0)
        checked_order(operation, "predictor_order", self.predictor_order, 1, 4)
        checked_order(operation, "corrector_order", self.corrector_order, 0, 4)
        checked_order(operation, "multistep_order", self.multistep_order, 1, 4)
        for name in ("tau", "timestep_scaling"):
            checked_float(operation, name, getattr(self, name), 0.0)
        checked_float(operation, "sigma_data", self.sigma_data, 0.0, strict=True)
        check_guidance_scale(operation, self.guidance_scale)
        check_guidance_rescale(operation, self.guidance_rescale)
        if (
            checked_float(operation, "dynamic_thresholding_ratio", self.dynamic_thresholding_ratio, 0.0, strict=True)
            > 1
        ):
            raise ValueError(
                error_message(
                    operation,
                    "dynamic_thresholding_ratio",
                    f"is {self.dynamic_thresholding_ratio}",
                    "a quantile above 0 and up to 1",
                    "0.995 is the usual one",
                )
            )
        if self.use_karras_sigmas and self.sigma_spacing not in (None, "karras"):
            raise ValueError(
                error_message(
                    "SamplingConfig",
                    "use_karras_sigmas",
                    f"is set beside sigma_spacing {self.sigma_spacing!r}",
                    "one spacing",
                    "leave one of the two out",
                )
            )

    @property
    def noise_spacing(self) -> str | None:
        """The sigma spacing in force, None for the scheduler's timestep spacing."""
        return "karras" if self.use_karras_sigmas else self.sigma_spacing

    def options(self, names: Iterable[str]) -> dict[str, Any]:
        """Return the fields of these names for a solver, None for those that take the solver's own default."""
        values = {name: getattr(self, name) for name in names}
        return {name: None if isinstance(value, _MethodDefault) else value for name, value in values.items()}

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as values of standard JSON; `from_dict` makes an equal configuration of them.

        Enumerations are their values and infinity is ``"inf"``; an eta that was left out is None.
        """
        return {**fields_to_json(self), **self.options(["eta"])}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SamplingConfig:
        """Make a configuration of what `to_dict` gave, checked like any other."""
        return cls(**fields_from_json(cls, values))

    def to_json(self) -> str:
        """Return the fields as one object of standard JSON (RFC 8259)."""
        return json.dumps(self.to_dict(), allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> SamplingConfig:
        """Make a configuration of what `to_json` gave."""
        return cls.from_dict(parsed_object(cls.__name__, text))


def check_guidance_scale(operation: str, guidance_scale: object) -> None:
    """Refuse a guidance scale that is no finite number; 1 is none, and it may be negative."""
    checked_float(operation, "guidance_scale", guidance_scale, -math.inf)


def check_guidance_rescale(operation: str, guidance_rescale: object) -> None:
    """Refuse a share of rescaled guidance that is no number from 0 to 1."""
    if checked_float(operation, "guidance_rescale", guidance_rescale, 0.0) > 1.0:
        got, remedy = f"is {guidance_rescale}", "0.7 is the usual one"
        raise ValueError(error_message(operation, "guidance_rescale", got, "a number from 0 to 1", remedy))
