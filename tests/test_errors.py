# SPDX-License-Identifier: MIT
"""Refusals: one sentence with operation, argument, what it got, what was expected, and a remedy."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
import torch

from fastdiff import NoiseSchedulerConfig, SamplingConfig, create_noise_scheduler, create_sampler
from fastdiff.errors import require, sentence, unknown_name
from fastdiff.guidance import GuidanceMode
from fastdiff.rng import draw
from fastdiff.solvers import Algorithm, Churn, Prediction, PredictionType, SolverType, VarianceType


def test_sentence_has_its_five_parts() -> None:
    assert sentence("step", "row", "is 7", "0 to 4", "start again") == "step: row is 7, expected 0 to 4; start again"


def test_unknown_name_lists_what_is_known_in_order() -> None:
    error = unknown_name("create_sampler", "method", "eular", ["heun", "euler"])
    assert isinstance(error, ValueError)
    assert str(error) == "create_sampler: method is 'eular', expected one of euler, heun; pick a name from that list"


def test_require_gives_the_module() -> None:
    assert require("json", "cli", "reading") is sys.modules["json"]


def test_require_names_the_extra_of_a_missing_package() -> None:
    with pytest.raises(ImportError, match=r"reading: the package 'no_such_package' cannot be imported") as refusal:
        require("no_such_package.inner", "spacings", "reading")
    assert "expected it to be installed; run: pip install 'fastdiff-kernels[spacings]'" in str(refusal.value)
    assert isinstance(refusal.value.__cause__, ImportError)


def test_require_says_so_for_a_package_that_is_blocked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.stats", None)
    with pytest.raises(ImportError, match=r"fastdiff-kernels\[spacings\]"):
        create_sampler("linear", "ddim", sigma_spacing="beta")


@pytest.mark.parametrize(
    ("kind", "argument", "known"),
    [
        (Algorithm, "algorithm_type", "dpmsolver++"),
        (SolverType, "solver_type", "midpoint"),
        (VarianceType, "variance_type", "learned_range"),
        (PredictionType, "prediction_type", "v_prediction"),
        (GuidanceMode, "guidance_mode", "sequential"),
    ],
)
def test_names_are_parsed_or_refused_with_the_list(kind: type, argument: str, known: str) -> None:
    member = kind.parse(known)  # type: ignore[attr-defined]
    assert member.value == known
    assert kind.parse(member) is member  # type: ignore[attr-defined]
    for wrong in ("nonsense", "", 3, None):
        with pytest.raises(ValueError, match=rf"{argument} is {wrong!r}, expected one of .*; pick") as refusal:
            kind.parse(wrong)  # type: ignore[attr-defined]
        assert known in str(refusal.value)


NOISE_CONFIG, SAMPLING = NoiseSchedulerConfig, SamplingConfig

REFUSALS: dict[str, tuple[Callable[[], object], str]] = {
    "negative eta": (lambda: SAMPLING(eta=-0.1), "eta"),
    "eta that is no number": (lambda: SAMPLING(eta=float("nan")), "eta"),
    "infinite eta": (lambda: SAMPLING(eta=float("inf")), "eta"),
    "eta of the wrong type": (lambda: SAMPLING(eta="much"), "eta"),  # type: ignore[arg-type]
    "no steps": (lambda: SAMPLING(num_inference_steps=0), "num_inference_steps"),
    "half a step": (lambda: SAMPLING(num_inference_steps=2.5), "num_inference_steps"),  # type: ignore[arg-type]
    "more steps than timesteps": (lambda: create_sampler("linear", "ddim", num_inference_steps=1001), "num_inference"),
    "unknown method": (lambda: SAMPLING(method="eular"), "method"),
    "unknown prediction": (lambda: SAMPLING(prediction_type="eps"), "prediction_type"),
    "unknown algorithm": (lambda: SAMPLING(algorithm_type="dpm"), "algorithm_type"),
    "unknown solver type": (lambda: SAMPLING(solver_type="rk4"), "solver_type"),
    "unknown solver mode": (lambda: SAMPLING(solver_mode="both"), "solver_mode"),
    "unknown third order": (lambda: SAMPLING(third_order="good"), "third_order"),
    "unknown variance": (lambda: SAMPLING(variance_type="large"), "variance_type"),
    "unknown spacing of sigmas": (lambda: SAMPLING(sigma_spacing="cubic"), "sigma_spacing"),
    "unknown guidance mode": (lambda: SAMPLING(guidance_mode="parallel"), "guidance_mode"),
    "order 4": (lambda: SAMPLING(solver_order=4), "solver_order"),
    "quantile above 1": (lambda: SAMPLING(dynamic_thresholding_ratio=1.5), "dynamic_thresholding_ratio"),
    "quantile 0": (lambda: SAMPLING(dynamic_thresholding_ratio=0.0), "dynamic_thresholding_ratio"),
    "two spacings": (lambda: SAMPLING(use_karras_sigmas=True, sigma_spacing="lu"), "use_karras_sigmas"),
    "guidance that is no number": (lambda: SAMPLING(guidance_scale=float("nan")), "guidance_scale"),
    "guidance of the wrong type": (lambda: SAMPLING(guidance_scale="7.5"), "guidance_scale"),  # type: ignore[arg-type]
    "negative churn": (lambda: create_sampler("linear", "euler", s_churn=-1.0), "s_churn"),
    "negative noise": (lambda: Churn(s_noise=-1.0), "s_noise"),
    "clip of nothing": (lambda: Prediction(PredictionType.EPSILON, 0.0), "clip_range"),
    "unknown field": (lambda: create_sampler("linear", "ddim", steps=5), "field"),
    "field of the schedule beside one": (
        lambda: create_sampler(create_noise_scheduler("linear"), "ddim", beta_end=0.1),
        "field",
    ),
    "unknown schedule": (lambda: create_sampler("liner", "ddim"), "schedule_type"),
    "unknown spacing": (lambda: NOISE_CONFIG(timestep_spacing="even"), "timestep_spacing"),
    "beta that is no number": (lambda: NOISE_CONFIG(beta_end=float("nan")), "beta_end"),
    "beta of 0": (lambda: NOISE_CONFIG(beta_start=0.0), "beta_start"),
    "beta of 1": (lambda: NOISE_CONFIG(beta_end=1.0), "beta_end"),
    "betas with NaN": (lambda: NOISE_CONFIG(schedule_type="custom", custom_betas=[0.1, float("nan")]), "custom_betas"),
    "negative betas": (lambda: NOISE_CONFIG(schedule_type="custom", custom_betas=[-0.1, 0.2]), "custom_betas"),
    "betas of 1": (lambda: NOISE_CONFIG(schedule_type="custom", custom_betas=[0.1, 1.0]), "custom_betas"),
    "epsilon at zero SNR": (
        lambda: create_sampler("linear", "ddim", rescale_betas_zero_snr=True, timestep_spacing="trailing"),
        "prediction_type",
    ),
    "generators for another batch": (
        lambda: draw((3, 2), [torch.Generator()], dtype=torch.float32, device=torch.device("cpu")),
        "generator",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusal_names_argument_expectation_and_remedy(case: str) -> None:
    call, argument = REFUSALS[case]
    with pytest.raises((TypeError, ValueError), match=rf"(?s)^\w+: {argument}.*, expected .+; .+"):
        call()
