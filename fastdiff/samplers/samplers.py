# SPDX-License-Identifier: MIT
"""The samplers by name: one class for each method of the registry."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from ..errors import unknown_name
from ..sampling.config import SamplingConfig
from ..schedules import BaseNoiseScheduler, NoiseSchedulerConfig, create_noise_scheduler
from ..schedules.levels import Levels, with_edm_coordinates
from ..solvers import PredictionType, SamplingMethod
from .base import BaseSampler, check_fields

__all__ = [
    "SAMPLERS",
    "BaseSampler",
    "DDIMSampler",
    "DDPMSampler",
    "DEISSampler",
    "DPMSolverSampler",
    "EDMEulerSampler",
    "EulerAncestralSampler",
    "EulerSampler",
    "FlowEulerSampler",
    "FlowHeunSampler",
    "HeunSampler",
    "IPNDMSampler",
    "KDPM2AncestralSampler",
    "KDPM2Sampler",
    "LCMSampler",
    "LMSSampler",
    "PNDMSampler",
    "SASolverSampler",
    "TCDSampler",
    "UniPCSampler",
    "check_fields",
    "create_sampler",
    "split_fields",
    "with_prediction_type",
]


class DDPMSampler(BaseSampler):
    """Ancestral sampling of DDPM (arXiv 2006.11239); `variance_type` chooses its noise."""

    method = SamplingMethod.DDPM


class DDIMSampler(BaseSampler):
    """DDIM (arXiv 2010.02502), deterministic unless `eta` is set."""

    method = SamplingMethod.DDIM


class DPMSolverSampler(BaseSampler):
    """DPM-Solver and DPM-Solver++ (arXiv 2206.00927, 2211.01095): all orders, both modes, ODE and SDE."""

    method = SamplingMethod.DPM_SOLVER


class EulerSampler(BaseSampler):
    """Euler's method in σ/α, with churn where `s_churn` is set (arXiv 2206.00364)."""

    method = SamplingMethod.EULER


class EulerAncestralSampler(BaseSampler):
    """Euler steps with ancestral noise, in proportion to `eta` (1 unless set)."""

    method = SamplingMethod.EULER_ANCESTRAL


class HeunSampler(BaseSampler):
    """Heun's method in σ/α (arXiv 2206.00364): two model calls a step, one in the last."""

    method = SamplingMethod.HEUN


class UniPCSampler(BaseSampler):
    """UniPC (arXiv 2302.04867): predictor and corrector of any order from 1 to 3, one model call a step."""

    method = SamplingMethod.UNIPC


class DEISSampler(BaseSampler):
    """DEIS (arXiv 2204.13902): ε extrapolated in log σ/α."""

    method = SamplingMethod.DEIS


class SASolverSampler(BaseSampler):
    """SA-Solver (arXiv 2309.05019): stochastic Adams steps; `tau` sets the noise, 0 for none."""

    method = SamplingMethod.SA_SOLVER


class LMSSampler(BaseSampler):
    """Linear multistep sampling of k-diffusion: Adams-Bashforth in σ/α."""

    method = SamplingMethod.LMS


class PNDMSampler(BaseSampler):
    """PNDM (arXiv 2202.09778): pseudo linear multistep, with or without its Runge-Kutta start."""

    method = SamplingMethod.PNDM


class IPNDMSampler(BaseSampler):
    """IPNDM: PNDM that starts at the order the history allows (arXiv 2204.13902, appendix)."""

    method = SamplingMethod.IPNDM


class LCMSampler(BaseSampler):
    """Multistep sampling of latent consistency models (arXiv 2310.04378)."""

    method = SamplingMethod.LCM


class TCDSampler(BaseSampler):
    """Strategic stochastic sampling of trajectory consistency models (arXiv 2402.19159); `eta` is its γ."""

    method = SamplingMethod.TCD


class KDPM2Sampler(BaseSampler):
    """The midpoint method in log σ/α, k-diffusion's `dpm_2`: two model calls a step, one in the last."""

    method = SamplingMethod.KDPM2


class KDPM2AncestralSampler(BaseSampler):
    """`KDPM2Sampler` with ancestral noise, in proportion to `eta` (1 unless set)."""

    method = SamplingMethod.KDPM2_ANCESTRAL


class EDMEulerSampler(BaseSampler):
    """Euler's method for networks with EDM's preconditioning (arXiv 2206.00364): ``prediction_type="edm"``.

    With that type samples are held as the network is shown them, c_in·x/α, and its time is c_noise = ¼·log(σ/α).  The
    end is the sample itself.  With other types this is `EulerSampler`.
    """

    method = SamplingMethod.EDM_EULER

    def levels(self, num_inference_steps: int) -> Levels:
        """Return the levels of `BaseSampler.levels`, for EDM networks in their coordinates and time."""
        return self._in_coordinates(super().levels(num_inference_steps))

    def _given_levels(self, *args: Any) -> Levels:
        return self._in_coordinates(super()._given_levels(*args))

    def _in_coordinates(self, levels: Levels) -> Levels:
        if self.config.prediction_type is not PredictionType.EDM:
            return levels
        return with_edm_coordinates(levels, self.config.sigma_data)


class FlowEulerSampler(BaseSampler):
    """Euler's method of rectified flow (arXiv 2209.03003), in the time σ/(α + σ)."""

    method = SamplingMethod.FLOW_EULER


class FlowHeunSampler(BaseSampler):
    """Heun's method of rectified flow: two model calls a step, one in the last."""

    method = SamplingMethod.FLOW_HEUN


def _sampler_class(method: SamplingMethod) -> type[BaseSampler]:
    """Return the class above of a method, or make one of its registered name."""
    name = method.entry.sampler_class
    if name not in globals():
        doc = f"Samples with `{method.value}` ({method.entry.source})."
        globals()[name] = type(name, (BaseSampler,), {"method": method, "__doc__": doc, "__module__": __name__})
    found: type[BaseSampler] = globals()[name]
    return found


#: One class a registered method.  A class statement above gives it a static type; the registry is enough for the rest.
SAMPLERS: dict[SamplingMethod, type[BaseSampler]] = {method: _sampler_class(method) for method in SamplingMethod}


def create_sampler(
    schedule_type: str | NoiseSchedulerConfig | BaseNoiseScheduler, method: str | SamplingMethod, **fields: Any
) -> BaseSampler:
    """Make a sampler for a noise schedule and a method.

    Args:
        schedule_type: a name of `NoiseScheduleType`, a configuration, or a scheduler.
        method: a `SamplingMethod` or its name.
        fields: fields of `NoiseSchedulerConfig` and `SamplingConfig`, distinguished by name.  On a flow schedule the
            prediction type is ``flow_prediction`` where none is given.

    Raises:
        ValueError: an unknown name or field, or a value out of range.
    """
    chosen = SamplingMethod.parse(method)
    schedule_fields, sampling_fields = split_fields("create_sampler", fields)
    if isinstance(schedule_type, BaseNoiseScheduler):
        check_fields("create_sampler", schedule_fields, SamplingConfig)
        scheduler = schedule_type
    else:
        scheduler = create_noise_scheduler(schedule_type, **schedule_fields)
    sampling_fields = with_prediction_type(scheduler.config, sampling_fields)
    return SAMPLERS[chosen](scheduler, SamplingConfig(method=chosen, **sampling_fields))


def with_prediction_type(schedule: NoiseSchedulerConfig, sampling: Mapping[str, Any]) -> dict[str, Any]:
    """Return fields of `SamplingConfig` with the prediction type of flow models where a flow schedule has none."""
    usual = {"prediction_type": "flow_prediction"} if schedule.schedule_type == "flow" else {}
    return {**usual, **sampling}


def split_fields(operation: str, given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split fields into those of the noise scheduler and those of the sampler."""
    of_schedule = {field.name for field in fields(NoiseSchedulerConfig)}
    of_sampling = {field.name for field in fields(SamplingConfig)}
    for name in given:
        if name not in of_schedule | of_sampling:
            raise unknown_name(operation, "field", name, of_schedule | of_sampling)
    schedule = {name: value for name, value in given.items() if name in of_schedule}
    return schedule, {name: value for name, value in given.items() if name in of_sampling}
