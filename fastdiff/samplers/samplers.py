# SPDX-License-Identifier: MIT
"""The samplers by name: each compiles its method's table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from ..errors import unknown_name
from ..sampling.config import SamplingConfig, SamplingMethod
from ..schedules import BaseNoiseScheduler, NoiseSchedulerConfig, create_noise_scheduler
from ..schedules.levels import Levels
from ..solvers import Churn, Prediction, ddim, ddpm, dpm_multistep, dpm_singlestep, euler, euler_ancestral, heun
from ..solvers.table import StepTable
from .base import BaseSampler, check_fields

__all__ = [
    "SAMPLERS",
    "BaseSampler",
    "DDIMSampler",
    "DDPMSampler",
    "DPMSolverSampler",
    "EulerAncestralSampler",
    "EulerSampler",
    "HeunSampler",
    "check_fields",
    "create_sampler",
    "split_fields",
]


class DDPMSampler(BaseSampler):
    """Ancestral sampling of DDPM (arXiv 2006.11239); `variance_type` chooses its noise."""

    method = SamplingMethod.DDPM

    def _solve(self, levels: Levels, prediction: Prediction) -> StepTable:
        return ddpm(levels, prediction, variance_type=self.config.variance_type)


class DDIMSampler(BaseSampler):
    """DDIM (arXiv 2010.02502), deterministic unless `eta` is set."""

    method = SamplingMethod.DDIM

    def _solve(self, levels: Levels, prediction: Prediction) -> StepTable:
        clipped = self.config.use_clipped_model_output
        return ddim(levels, prediction, eta=self.config.eta or 0.0, use_clipped_model_output=clipped)


class DPMSolverSampler(BaseSampler):
    """DPM-Solver and DPM-Solver++ (arXiv 2206.00927, 2211.01095): all orders, both modes, ODE and SDE."""

    method = SamplingMethod.DPM_SOLVER

    def _solve(self, levels: Levels, prediction: Prediction) -> StepTable:
        config = self.config
        if config.solver_mode == "singlestep":
            return dpm_singlestep(
                levels,
                prediction,
                algorithm_type=config.algorithm_type,
                solver_order=config.solver_order,
                solver_type=config.solver_type,
            )
        return dpm_multistep(
            levels,
            prediction,
            algorithm_type=config.algorithm_type,
            solver_order=config.solver_order,
            solver_type=config.solver_type,
            lower_order_final=config.lower_order_final,
            euler_at_final=config.euler_at_final,
            third_order=config.third_order,
        )


class EulerSampler(BaseSampler):
    """Euler's method in σ/α, with churn where `s_churn` is set (arXiv 2206.00364)."""

    method = SamplingMethod.EULER

    def _solve(self, levels: Levels, prediction: Prediction) -> StepTable:
        return euler(levels, prediction, churn=_churn(self.config))


class EulerAncestralSampler(BaseSampler):
    """Euler steps with ancestral noise; `eta` (1 unless set) says how much."""

    method = SamplingMethod.EULER_ANCESTRAL

    def _solve(self, levels: Levels, prediction: Prediction) -> StepTable:
        eta = 1.0 if self.config.eta is None else self.config.eta
        return euler_ancestral(levels, prediction, eta=eta, s_noise=self.config.s_noise)


class HeunSampler(BaseSampler):
    """Heun's method in σ/α (arXiv 2206.00364): two model calls a step, one in the last."""

    method = SamplingMethod.HEUN

    def _solve(self, levels: Levels, prediction: Prediction) -> StepTable:
        return heun(levels, prediction, churn=_churn(self.config))


SAMPLERS: dict[SamplingMethod, type[BaseSampler]] = {
    cls.method: cls
    for cls in (DDPMSampler, DDIMSampler, DPMSolverSampler, EulerSampler, EulerAncestralSampler, HeunSampler)
}


def create_sampler(
    schedule_type: str | NoiseSchedulerConfig | BaseNoiseScheduler, method: str | SamplingMethod, **fields: Any
) -> BaseSampler:
    """A sampler for a kind of noise schedule and a method.

    Args:
        schedule_type: a name of `NoiseScheduleType`, a configuration, or a scheduler.
        method: a `SamplingMethod` or its name.
        fields: fields of `NoiseSchedulerConfig` and `SamplingConfig`, told apart by name.

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
    return SAMPLERS[chosen](scheduler, SamplingConfig(method=chosen, **sampling_fields))


def split_fields(operation: str, given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Tell fields of the noise scheduler from fields of the sampler."""
    of_schedule = {field.name for field in fields(NoiseSchedulerConfig)}
    of_sampling = {field.name for field in fields(SamplingConfig)}
    for name in given:
        if name not in of_schedule | of_sampling:
            raise unknown_name(operation, "field", name, of_schedule | of_sampling)
    schedule = {name: value for name, value in given.items() if name in of_schedule}
    return schedule, {name: value for name, value in given.items() if name in of_sampling}


def _churn(config: SamplingConfig) -> Churn:
    return Churn(config.s_churn, config.s_tmin, config.s_tmax, config.s_noise)
