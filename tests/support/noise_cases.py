# SPDX-License-Identifier: MIT
"""How each of diffusers' schedulers draws its noise, for each option that noise depends on."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from support.dropin_cases import Case

SDE = {"algorithm_type": "sde-dpmsolver++"}
CHURN = {"s_churn": 20.0}
SOME_CHURN = {"s_churn": 8.0, "s_tmin": 0.05, "s_tmax": 20.0, "s_noise": 1.003}


@dataclass(frozen=True)
class NoiseCase:
    """A class with options, and what a loop of four steps of it draws.

    Attributes:
        draws: the number of draws of each step; "u" for RePaint's `undo_step`, which draws once for each of its 250
            training timesteps.
        interval: whether a draw belongs to an interval of noise levels.
        finite: whether diffusers' own results are.
    """

    name: str
    draws: str
    config: dict[str, Any] = field(default_factory=dict)
    arguments: dict[str, Any] = field(default_factory=dict)
    interval: bool = False
    finite: bool = True
    per_token: bool = False

    @property
    def kind(self) -> str:
        """none, once, twice or interval."""
        if self.interval:
            return "interval"
        return {"0": "none", "1": "once", "2": "twice"}[max(self.draws.replace("u", ""))]

    def case(self, **changes: Any) -> Case:
        """The loop."""
        shape = (3, 6, 4) if self.per_token else (3, 4, 4, 4)
        return Case(self.name, self.config, 4, self.arguments, shape, per_token=self.per_token).of(**changes)

    def __str__(self) -> str:
        options = [f"{k}={v}" for k, v in {**self.config, **self.arguments}.items()]
        return "-".join([self.name, *options, *(["per_token"] if self.per_token else [])])


NOISE_CASES = [
    NoiseCase("CMStochasticIterative", "1111"),
    NoiseCase("CogVideoXDDIM", "0000"),
    NoiseCase("CogVideoXDDIM", "0000", {}, {"eta": 1.0}),
    NoiseCase("CogVideoXDPM", "1221"),
    NoiseCase("CogVideoXDPM", "1221", {"timestep_spacing": "trailing"}),
    NoiseCase("ConsistencyDecoder", "10"),
    NoiseCase("CosineDPMSolverMultistep", "1111", interval=True),
    NoiseCase("CosineDPMSolverMultistep", "1111", {"sigma_schedule": "karras", "solver_order": 1}, interval=True),
    NoiseCase("CosineDPMSolverMultistep", "1111", {"solver_type": "heun", "prediction_type": "epsilon"}, interval=True),
    NoiseCase("DDIM", "0000"),
    NoiseCase("DDIM", "1111", {}, {"eta": 0.4}),
    NoiseCase("DDIM", "1111", {"thresholding": True, "clip_sample": False}, {"eta": 1.0}),
    NoiseCase("DDIMInverse", "0000"),
    NoiseCase("DDIMParallel", "0000"),
    NoiseCase("DDIMParallel", "1111", {}, {"eta": 0.4}),
    NoiseCase("DDPM", "1110"),
    NoiseCase("DDPM", "1111", {"timestep_spacing": "trailing"}),
    NoiseCase("DDPM", "1110", {"variance_type": "fixed_small_log"}),
    NoiseCase("DDPM", "1110", {"variance_type": "fixed_large"}),
    NoiseCase("DDPM", "1110", {"variance_type": "fixed_large_log"}, finite=False),
    NoiseCase("DDPM", "1110", {"variance_type": "learned"}),
    NoiseCase("DDPM", "1110", {"variance_type": "learned_range"}),
    NoiseCase("DDPM", "1110", {"thresholding": True}),
    NoiseCase("DDPMParallel", "1110"),
    NoiseCase("DDPMParallel", "1110", {"variance_type": "learned_range"}),
    NoiseCase("DDPMWuerstchen", "1111"),
    NoiseCase("DEISMultistep", "0000"),
    NoiseCase("DPMSolverMultistep", "0000"),
    NoiseCase("DPMSolverMultistep", "1111", SDE),
    NoiseCase("DPMSolverMultistep", "1111", {**SDE, "solver_order": 3}),
    NoiseCase("DPMSolverMultistep", "1111", {**SDE, "solver_type": "heun"}),
    NoiseCase("DPMSolverMultistep", "1111", {"algorithm_type": "sde-dpmsolver", "final_sigmas_type": "sigma_min"}),
    NoiseCase("DPMSolverMultistepInverse", "0000"),
    NoiseCase("DPMSolverMultistepInverse", "1111", SDE, finite=False),
    NoiseCase("DPMSolverMultistepInverse", "1111", {"algorithm_type": "sde-dpmsolver"}, finite=False),
    NoiseCase("DPMSolverSDE", "1111110", interval=True),
    NoiseCase("DPMSolverSDE", "1111110", {"noise_sampler_seed": 5, "prediction_type": "v_prediction"}, interval=True),
    NoiseCase("DPMSolverSDE", "1111110", {"use_karras_sigmas": True}, {"s_noise": 0.9}, interval=True),
    NoiseCase("DPMSolverSinglestep", "0000"),
    NoiseCase("DPMSolverSinglestep", "1111", SDE),
    NoiseCase("EDMDPMSolverMultistep", "0000"),
    NoiseCase("EDMDPMSolverMultistep", "1111", SDE),
    NoiseCase("EDMEuler", "0000"),
    NoiseCase("EDMEuler", "1111", {}, CHURN),
    NoiseCase("EDMEuler", "0110", {}, SOME_CHURN),
    NoiseCase("EulerAncestralDiscrete", "1111"),
    NoiseCase("EulerAncestralDiscrete", "1111", {"prediction_type": "v_prediction"}),
    NoiseCase("EulerDiscrete", "0000"),
    NoiseCase("EulerDiscrete", "1111", {}, CHURN),
    NoiseCase("EulerDiscrete", "0110", {}, SOME_CHURN),
    NoiseCase("FlowMapEulerDiscrete", "0000"),
    NoiseCase("FlowMatchEulerDiscrete", "0000"),
    NoiseCase("FlowMatchEulerDiscrete", "1111", {"stochastic_sampling": True}),
    NoiseCase("FlowMatchEulerDiscrete", "1111", {"stochastic_sampling": True}, per_token=True),
    NoiseCase("FlowMatchHeunDiscrete", "0000000"),
    NoiseCase("FlowMatchHeunDiscrete", "1111111", {}, CHURN),
    NoiseCase("FlowMatchHeunDiscrete", "1111110", {}, SOME_CHURN),
    NoiseCase("FlowMatchLCM", "1111"),
    NoiseCase("HeunDiscrete", "0000000"),
    NoiseCase("IPNDM", "0000"),
    NoiseCase("KDPM2AncestralDiscrete", "0101010"),
    NoiseCase("KDPM2AncestralDiscrete", "0101010", {"beta_schedule": "squaredcos_cap_v2"}, finite=False),
    NoiseCase("KDPM2Discrete", "0000000"),
    NoiseCase("LCM", "1110"),
    NoiseCase("LCM", "1110", {"rescale_betas_zero_snr": True}, finite=False),
    NoiseCase("LMSDiscrete", "0000"),
    NoiseCase("LTXEulerAncestralRF", "1110"),
    NoiseCase("LTXEulerAncestralRF", "0000", {"eta": 0.0}),
    NoiseCase("LTXEulerAncestralRF", "1110", {"eta": 0.5, "s_noise": 0.9}),
    NoiseCase("PNDM", "0000000000000"),
    NoiseCase("PNDM", "00000", {"skip_prk_steps": True}),
    NoiseCase("RePaint", "1111uu11"),
    NoiseCase("RePaint", "1111uu11", {"eta": 1.0}),
    NoiseCase("SASolver", "1111"),
    NoiseCase("SASolver", "1111", {"algorithm_type": "noise_prediction"}),
    NoiseCase("SASolver", "1111", {"corrector_order": 4}),
    NoiseCase("SCM", "1111"),
    NoiseCase("TCD", "1110"),
    NoiseCase("TCD", "0000", {}, {"eta": 0.0}),
    NoiseCase("TCD", "1110", {"rescale_betas_zero_snr": True}, finite=False),
    NoiseCase("UnCLIP", "1110"),
    NoiseCase("UnCLIP", "1110", {"variance_type": "learned_range"}),
    NoiseCase("UniPCMultistep", "0000"),
]
