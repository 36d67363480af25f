# SPDX-License-Identifier: MIT
"""Refusals: one sentence with operation, argument, what it got, what was expected, and a remedy."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fastdiff import (
    AdvancedSamplingManager,
    DDIMSampler,
    NoiseSchedulerConfig,
    SamplingConfig,
    create_noise_scheduler,
    create_sampler,
    ops,
    randn,
    sampling,
    spawn_seeds,
)
from fastdiff.errors import error_message, require, unknown_name
from fastdiff.guidance import GuidanceMode
from fastdiff.noise.generators import draw
from fastdiff.solvers import Algorithm, Churn, Prediction, PredictionType, SolverType, VarianceType
from fastdiff.solvers.table import StepTable


def test_sentence_has_its_five_parts() -> None:
    assert (
        error_message("step", "row", "is 7", "0 to 4", "start again") == "step: row is 7, expected 0 to 4; start again"
    )


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


def _x2() -> list[torch.Tensor]:
    return [torch.ones(2, 3), torch.ones(2, 3)]


def _rows() -> torch.Tensor:
    return create_sampler("linear", "ddim").table.coefficients_as(torch.float32)


def _sample(**given: Any) -> object:
    arguments = {"model": lambda x, t, *c: 0.1 * x, "latents": torch.ones(2, 3), "progress": False, **given}
    return create_sampler("linear", "ddim", num_inference_steps=2).sample(**arguments)


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
    "order True": (lambda: SAMPLING(solver_order=True), "solver_order"),
    "order 2.0": (lambda: SAMPLING(solver_order=2.0), "solver_order"),  # type: ignore[arg-type]
    "huge guidance": (lambda: SAMPLING(guidance_scale=10**400), "guidance_scale"),
    "huge eta": (lambda: SAMPLING(eta=10**400), "eta"),
    "huge beta": (lambda: NOISE_CONFIG(beta_end=10**400), "beta_end"),
    "huge churn": (lambda: Churn(10**400), "s_churn"),
    "churn of True": (lambda: Churn(True), "s_churn"),
    "clip of None": (lambda: Prediction(PredictionType.EPSILON, None), "clip_range"),  # type: ignore[arg-type]
    "huge number of steps below 0": (lambda: SAMPLING(num_inference_steps=-(10**5000)), "num_inference_steps"),
    "a word for a flag": (lambda: SAMPLING(thresholding="no"), "thresholding"),  # type: ignore[arg-type]
    "a number for a flag": (lambda: SAMPLING(lower_order_final=1), "lower_order_final"),  # type: ignore[arg-type]
    "no configuration": (lambda: DDIMSampler(create_noise_scheduler("linear"), 5), "config"),  # type: ignore[arg-type]
    "no manager's configuration": (
        lambda: AdvancedSamplingManager(None, 5),  # type: ignore[arg-type]
        "sampling_config",
    ),
    "no rows": (lambda: StepTable((5,)), "source"),  # type: ignore[arg-type]
    "half a seed": (lambda: randn((1, 2), 1.5), "seeds"),  # type: ignore[arg-type]
    "huge seed": (lambda: randn((1, 2), [10**5000]), "seeds"),
    "half a step of noise": (lambda: randn((1, 2), [1], step=1.5), "step"),  # type: ignore[arg-type]
    "step of noise of None": (lambda: randn((1, 2), [1], step=None), "step"),  # type: ignore[arg-type]
    "purpose of True": (lambda: randn((1, 2), [1], purpose=True), "purpose"),
    "no shape": (lambda: randn(None, [1]), "shape"),  # type: ignore[arg-type]
    "half a shape": (lambda: randn((1, 2.5), [1]), "shape"),  # type: ignore[arg-type]
    "negative shape": (lambda: randn((1, -2), [1]), "shape"),
    "seed of True": (lambda: spawn_seeds(True, 2), "seed"),
    "half a count": (lambda: spawn_seeds(1, 2.5), "count"),  # type: ignore[arg-type]
    "huge correction": (lambda: ops.std(torch.ones(2, 3), correction=10**400), "correction"),
    "huge row": (lambda: ops.step(*_x2(), _rows(), 10**5000), "row_index"),
    "guidance of True": (lambda: ops.step(*_x2(), _rows(), 0, uncond=_x2()[0], guidance_scale=True), "guidance_scale"),
    "huge guidance of a step": (
        lambda: ops.step(*_x2(), _rows(), 0, uncond=_x2()[0], guidance_scale=10**400),
        "guidance",
    ),
    "huge guidance of rows": (
        lambda: ops.step_rows(
            *_x2(), _rows(), torch.zeros(1, dtype=torch.int64), uncond=_x2()[0], guidance_scale=10**400
        ),
        "guidance",
    ),
    "huge guidance combined": (lambda: sampling.cfg_combine(*_x2(), 10**400), "guidance"),
    "guidance of True combined": (lambda: sampling.cfg_combine(*_x2(), True), "guidance"),
    "list of embeddings": (lambda: _sample(prompt_embeds=[1, 2]), "prompt_embeds"),
    "list of negative embeddings": (
        lambda: _sample(prompt_embeds=torch.ones(2), negative_prompt_embeds=[1, 2], guidance_scale=2.0),
        "negative_prompt_embeds",
    ),
    "sparse latents": (lambda: _sample(latents=_x2()[0].to_sparse()), "latents"),
    "float8 latents": (lambda: _sample(latents=_x2()[0].to(torch.float8_e4m3fn)), "latents"),
    "complex latents": (lambda: _sample(latents=_x2()[0].to(torch.complex64)), "latents"),
    "meta latents": (lambda: _sample(latents=_x2()[0].to("meta")), "latents"),
    "complex output": (lambda: _sample(model=lambda x, t: x.to(torch.complex64)), "model returned torch.complex64"),
    "sparse output": (lambda: _sample(model=lambda x, t: x.to_sparse()), "model returned layout"),
    "output elsewhere": (lambda: _sample(model=lambda x, t: x.to("meta")), "model returned layout"),
    "no model": (lambda: _sample(model=None), "model"),
    "no callback": (lambda: _sample(callback=5), "callback"),
    "name of a model dtype": (lambda: _sample(model_dtype="half"), "model_dtype"),
    "model in float8": (lambda: _sample(model_dtype=torch.float8_e4m3fn), "model_dtype"),
    "keyword arguments of a number": (lambda: _sample(model_kwargs=5), "model_kwargs"),
    "number for a generator": (lambda: _sample(generator=5), "generator"),
    "huge guidance of a loop": (lambda: _sample(guidance_scale=10**400), "guidance_scale"),
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
