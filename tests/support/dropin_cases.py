# SPDX-License-Identifier: MIT
"""What a diffusers scheduler may be asked to do: configurations, schedules, tensors and arguments, class by class."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st

Choices = list[dict[str, Any]]


def one_of(name: str, *values: Any) -> Choices:
    """The default, or one of these values of an option."""
    return [{}, *({name: value} for value in values)]


TRAINED = np.linspace(2e-4, 0.015, 1000).tolist()
BETAS: Choices = [
    {},
    {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    {"beta_schedule": "linear", "beta_start": 0.001, "beta_end": 0.03},
    {"beta_schedule": "squaredcos_cap_v2"},
    {"trained_betas": TRAINED},
    {"num_train_timesteps": 200},
    {"beta_schedule": "cubic"},  # which there is not
]
SPACING: Choices = [
    {},
    {"timestep_spacing": "leading"},
    {"timestep_spacing": "leading", "steps_offset": 1},
    {"timestep_spacing": "trailing"},
    {"timestep_spacing": "linspace"},
    {"timestep_spacing": "none such"},
]
PREDICTION: Choices = one_of("prediction_type", "epsilon", "v_prediction", "sample", "none such")
FLOW_PREDICTION: Choices = one_of("prediction_type", "epsilon", "v_prediction", "sample", "flow_prediction")
SIGMAS: Choices = [
    {},
    {"use_karras_sigmas": True},
    {"use_exponential_sigmas": True},
    {"use_beta_sigmas": True},
    {"use_karras_sigmas": True, "use_beta_sigmas": True},  # one at a time, says diffusers
]
FLOW_SIGMAS: Choices = [*SIGMAS, {"use_flow_sigmas": True, "flow_shift": 3.0, "prediction_type": "flow_prediction"}]
THRESHOLDING: Choices = [
    {},
    {"thresholding": True},
    {"thresholding": True, "dynamic_thresholding_ratio": 0.9, "sample_max_value": 1.5},
]
CLIP: Choices = [{}, {"clip_sample": False}, {"clip_sample": True, "clip_sample_range": 0.7}, {"clip_sample": True}]
ZERO_SNR: Choices = one_of("rescale_betas_zero_snr", True)
FINAL: Choices = one_of("final_sigmas_type", "sigma_min", "zero")
ALPHA_TO_ONE: Choices = one_of("set_alpha_to_one", False, True)
ORDER: Choices = one_of("solver_order", 1, 2, 3)
LOWER: Choices = one_of("lower_order_final", False, True)
EULER_FINAL: Choices = one_of("euler_at_final", True)
LAMBDA_CLIP: Choices = one_of("lambda_min_clipped", -5.1)
SHIFTING: Choices = [{}, {}, {"use_dynamic_shifting": True, "time_shift_type": "exponential"}]
SHIFT: Choices = one_of("shift", 3.0)
FLOW_MATCH: list[Choices] = [
    SIGMAS, SHIFT, [*SHIFTING, {"use_dynamic_shifting": True, "time_shift_type": "linear"}],
    one_of("shift_terminal", 0.1), one_of("invert_sigmas", True),
]  # fmt: skip
DDIM: list[Choices] = [BETAS, SPACING, PREDICTION, CLIP, ZERO_SNR, ALPHA_TO_ONE]
MULTISTEP: list[Choices] = [
    BETAS, SPACING, FLOW_PREDICTION, FLOW_SIGMAS, THRESHOLDING, ORDER, LOWER,
]  # fmt: skip
DPM: list[Choices] = [
    *MULTISTEP, LAMBDA_CLIP, one_of("solver_type", "heun", "midpoint"),
    one_of("variance_type", "learned_range"),
]  # fmt: skip
KARRAS: list[Choices] = [BETAS, SPACING, PREDICTION, SIGMAS]
EDM: list[Choices] = [
    one_of("sigma_schedule", "exponential", "karras"), one_of("prediction_type", "epsilon", "v_prediction"), FINAL,
    [{}, {"sigma_min": 0.01, "sigma_max": 20.0}], one_of("sigma_data", 1.0),
]  # fmt: skip
DDPM: list[Choices] = [
    *DDIM[:5], THRESHOLDING,
    one_of("variance_type", "fixed_small_log", "fixed_large", "fixed_large_log", "learned", "learned_range"),
]  # fmt: skip
LCM: list[Choices] = [
    *DDIM, THRESHOLDING, one_of("timestep_scaling", 5.0), one_of("original_inference_steps", 20),
]  # fmt: skip

#: Solvers of noise do not go to 0.
ALGORITHMS: Choices = [
    {},
    {"algorithm_type": "sde-dpmsolver++"},
    {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"},
    {"algorithm_type": "sde-dpmsolver", "final_sigmas_type": "sigma_min"},
    {"final_sigmas_type": "sigma_min"},
    {"algorithm_type": "dpmsolver"},
]

#: Class by class, without "Scheduler": independent groups of choices.
OPTIONS: dict[str, list[Choices]] = {
    "CMStochasticIterative": [one_of("clip_denoised", False), one_of("sigma_max", 20.0), one_of("s_noise", 0.9)],
    "CogVideoXDDIM": [*DDIM, one_of("snr_shift_scale", 1.0)],
    "CogVideoXDPM": [*DDIM, one_of("snr_shift_scale", 1.0)],
    "ConsistencyDecoder": [one_of("sigma_data", 1.0)],
    "CosineDPMSolverMultistep": [
        *EDM[:3], one_of("sigma_max", 50.0), one_of("solver_order", 1, 2), LOWER, EULER_FINAL,
        one_of("solver_type", "heun"),
    ],
    "DDIM": [*DDIM, THRESHOLDING],
    "DDIMInverse": DDIM,
    "DDIMParallel": [*DDIM, THRESHOLDING],
    "DDPM": DDPM,
    "DDPMParallel": DDPM,
    "DDPMWuerstchen": [one_of("scaler", 0.5, 2.0), one_of("s", 0.01)],
    "DEISMultistep": [*MULTISTEP, SHIFTING, one_of("solver_type", "midpoint", "logrho")],
    "DPMSolverMultistep": [
        *DPM, ALGORITHMS, EULER_FINAL, ZERO_SNR, SHIFTING, [{}, {}, {"use_lu_lambdas": True}],
    ],
    "DPMSolverMultistepInverse": [
        *DPM, EULER_FINAL, one_of("algorithm_type", "sde-dpmsolver++", "dpmsolver", "sde-dpmsolver"),
    ],
    "DPMSolverSDE": [*KARRAS, [{"noise_sampler_seed": 3}]],
    "DPMSolverSinglestep": [*DPM, [*ALGORITHMS[:3], *ALGORITHMS[4:]], SHIFTING],
    "EDMDPMSolverMultistep": [
        *EDM, THRESHOLDING, ORDER, LOWER, EULER_FINAL, one_of("solver_type", "heun"),
        one_of("algorithm_type", "sde-dpmsolver++"),
    ],
    "EDMEuler": EDM,
    "EulerAncestralDiscrete": [BETAS, SPACING, PREDICTION, ZERO_SNR],
    "EulerDiscrete": [
        *KARRAS, ZERO_SNR, FINAL, one_of("interpolation_type", "log_linear"), one_of("timestep_type", "continuous"),
        [{}, {}, {"sigma_min": 0.02, "sigma_max": 20.0}],
    ],
    "FlowMapEulerDiscrete": [SHIFT, one_of("num_train_timesteps", 100)],
    "FlowMatchEulerDiscrete": [*FLOW_MATCH, one_of("stochastic_sampling", True)],
    "FlowMatchHeunDiscrete": [SHIFT],
    "FlowMatchLCM": FLOW_MATCH,
    "HeunDiscrete": [*KARRAS, [{}, {"beta_schedule": "exp"}, {"beta_schedule": "squaredcos_cap_v2"}], CLIP],
    "IPNDM": [one_of("num_train_timesteps", 200)],
    "KDPM2AncestralDiscrete": KARRAS,
    "KDPM2Discrete": KARRAS,
    "LCM": LCM,
    "LMSDiscrete": KARRAS,
    "LTXEulerAncestralRF": [one_of("eta", 0.0, 0.5), one_of("s_noise", 0.9)],
    "PNDM": [BETAS, SPACING[:5], PREDICTION[:3], ALPHA_TO_ONE, one_of("skip_prk_steps", True)],
    "RePaint": [BETAS, one_of("eta", 0.0, 0.5, 1.0), one_of("clip_sample", False)],
    "SASolver": [
        *MULTISTEP[:5], LOWER, LAMBDA_CLIP, one_of("predictor_order", 1, 3, 4), one_of("corrector_order", 0, 1, 3, 4),
        one_of("algorithm_type", "noise_prediction"), one_of("variance_type", "learned_range"),
    ],
    "SCM": [one_of("sigma_data", 1.0)],
    "TCD": LCM,
    "UnCLIP": [
        one_of("variance_type", "learned_range"), one_of("prediction_type", "sample"),
        [{}, {"clip_sample": False}, {"clip_sample_range": 0.7}],
    ],
    "UniPCMultistep": [
        *MULTISTEP, FINAL, ZERO_SNR, SHIFTING, one_of("solver_type", "bh1"), one_of("predict_x0", False),
        one_of("disable_corrector", [0], [1, 2]), [{}, {}, {"solver_p": "DEIS"}],
    ],
}  # fmt: skip

ETA: Choices = [{}, {"eta": 1.0}, {"eta": 0.4}]
CHURN: Choices = [
    {},
    {"s_churn": 20.0},
    {"s_churn": 8.0, "s_tmin": 0.05, "s_tmax": 20.0, "s_noise": 1.003},
]
CLIPPED_OUTPUT: Choices = one_of("use_clipped_model_output", True)
#: What a step takes beside its tensors.
ARGUMENTS: dict[str, list[Choices]] = {
    "CogVideoXDDIM": [ETA, CLIPPED_OUTPUT],
    "DDIM": [ETA, CLIPPED_OUTPUT],
    "DDIMParallel": [ETA, CLIPPED_OUTPUT],
    "DPMSolverSDE": [one_of("s_noise", 0.9)],
    "EDMEuler": [CHURN],
    "EulerDiscrete": [CHURN],
    "FlowMatchHeunDiscrete": [CHURN],
    "LMSDiscrete": [one_of("order", 1, 2, 3)],
    "TCD": [one_of("eta", 0.0, 1.0)],
}
#: Classes whose samples are of one form: sequences of tokens, or B×C×H×W.
PER_TOKEN = ("FlowMatchEulerDiscrete",)
#: The most steps where a class has its own limit (ConsistencyDecoder has two, whatever it is asked).
MOST_STEPS = {"LCM": 20, "TCD": 20, "CMStochasticIterative": 39, "RePaint": 12}
#: Of classes whose step takes it.
VARIANCE_NOISE = ("CogVideoXDDIM", "DDIM", "DDIMParallel", "DPMSolverMultistep", "DPMSolverMultistepInverse")
#: Classes whose model may give twice the channels, by the variance type in their configuration.
LEARNED = ("DDPM", "DDPMParallel", "DPMSolverMultistep", "DPMSolverMultistepInverse", "DPMSolverSinglestep",
           "SASolver", "UnCLIP")  # fmt: skip

SHAPES = [(2, 4, 4, 4), (1, 3, 4, 4), (1, 4, 5, 3), (2, 3, 7), (1, 2, 3, 4, 5), (3, 2, 6, 2)]
LAYOUTS = ["contiguous", "channels_last", "transposed", "negated", "expanded", "windows"]
HALVES = [torch.float16, torch.bfloat16]


@dataclass(frozen=True)
class Case:
    """One loop: which class, how it is made, how many steps, on what, with which arguments."""

    name: str
    config: dict[str, Any]
    steps: int
    arguments: dict[str, Any]
    shape: tuple[int, ...] = (2, 4, 4, 4)
    dtype: torch.dtype = torch.float32
    layout: str = "contiguous"
    output_layout: str = ""  # of the model's outputs; the samples' own where it is empty
    noise: str = "generator"
    return_dict: bool = True
    per_token: bool = False
    seed: int = 0

    @property
    def doubled(self) -> bool:
        """Whether the model's output has twice the channels of the samples."""
        return self.name in LEARNED and str(self.config.get("variance_type")).startswith("learned")

    def of(self, **changes: Any) -> Case:
        return replace(self, **changes)


def _merged(choices: tuple[dict[str, Any], ...]) -> dict[str, Any]:
    return {name: value for chosen in choices for name, value in chosen.items()}


def _drawn(groups: list[Choices]) -> st.SearchStrategy[dict[str, Any]]:
    # Half of the draws leave a group alone: else hardly a configuration would be one that diffusers accepts.
    return st.tuples(*(st.one_of(st.just(g[0]), st.sampled_from(g)) for g in groups)).map(_merged)


def cases(name: str, dtypes: list[torch.dtype] | None = None, most_steps: int = 50) -> st.SearchStrategy[Case]:
    """Loops of the class `name` (without "Scheduler"), in float32 if nothing else is asked for."""
    most = min(most_steps, MOST_STEPS.get(name, 50))
    # Short loops are as good as long ones for most of what can be wrong, and a tenth of the work.
    steps = st.one_of(st.integers(1, min(12, most)), st.integers(1, min(12, most)), st.integers(1, most))
    noises = ["generator", "generators", "none"] + (["variance_noise"] if name in VARIANCE_NOISE else [])
    return st.builds(
        Case,
        name=st.just(name),
        config=_drawn(OPTIONS[name]),
        steps=steps,
        arguments=_drawn(ARGUMENTS.get(name, [])),
        shape=st.sampled_from(SHAPES),
        dtype=st.sampled_from(dtypes or [torch.float32]),
        layout=st.sampled_from(LAYOUTS),
        output_layout=st.sampled_from(["", "", *LAYOUTS]),
        noise=st.sampled_from(noises),
        return_dict=st.booleans(),
        per_token=st.sampled_from([False, False, True]) if name in PER_TOKEN else st.just(False),
        seed=st.integers(0, 2**20),
    )
