# SPDX-License-Identifier: MIT
"""Manager of schedule, sampler and loop; loops leave their arguments unchanged, so that both can be shared."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from fastdiff import (
    AdvancedSamplingManager,
    NoiseSchedulerConfig,
    SamplingConfig,
    SamplingMethod,
    StepInfo,
    create_advanced_sampling_manager,
    create_noise_scheduler,
    create_sampler,
)
from fastdiff.samplers import SAMPLERS
from support.solver_cases import DETERMINISTIC, METHODS, STOCHASTIC, model_calls


def _model(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return torch.tanh(x) * 0.5 + 0.0001 * t.to(x.dtype).reshape(-1, 1)


def _latents() -> torch.Tensor:
    return torch.randn(2, 6, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("method", METHODS)
def test_manager_samples_like_its_sampler(method: str) -> None:
    manager = create_advanced_sampling_manager("cosine", method, num_inference_steps=6, timestep_spacing="trailing")
    sampler = create_sampler("cosine", method, num_inference_steps=6, timestep_spacing="trailing")
    ends = [
        one.sample(_model, _latents(), generator=torch.Generator().manual_seed(1), progress=False).samples
        for one in (manager, sampler)
    ]
    assert torch.equal(*ends)
    assert torch.equal(manager.timesteps, sampler.timesteps)


def test_manager_has_defaults() -> None:
    manager = AdvancedSamplingManager()
    assert manager.scheduler_config == NoiseSchedulerConfig()
    assert manager.sampling_config == SamplingConfig()
    assert len(manager.timesteps) == 50


def test_manager_configures_method_and_steps() -> None:
    manager = create_advanced_sampling_manager("linear", "ddim", num_inference_steps=5)
    manager.configure(method="heun", num_inference_steps=8)
    assert manager.sampling_config.method is SamplingMethod.HEUN
    # Heun calls twice in all steps but the last.
    assert manager.get_info()["model_calls"] == 15
    manager.configure(method="dpm_solver", solver_order=3, use_karras_sigmas=True)
    assert manager.sampling_config.num_inference_steps == 8, "what is not named stays"
    assert manager.get_info()["model_calls"] == 8
    assert manager.timesteps.dtype == torch.float32
    assert manager.sample(_model, _latents(), progress=False).steps == 8


@pytest.mark.parametrize(
    "fields",
    [
        {"eta": -1.0},
        {"num_inference_steps": 0},
        {"num_inference_steps": 1001},
        {"method": "eular"},
        {"steps": 3},
        {"beta_end": 0.1},
        {"method": "euler", "s_churn": -1.0},
        {"solver_order": 5},
    ],
    ids=str,
)
def test_failed_configuration_leaves_manager_unchanged(fields: dict[str, object]) -> None:
    manager = create_advanced_sampling_manager("linear", "ddim", num_inference_steps=5)
    sampler, config = manager.sampler, manager.sampling_config
    table = sampler.table
    with pytest.raises((TypeError, ValueError), match=r"(?s)^\w+: .+, expected .+; .+"):
        manager.configure(**fields)
    assert manager.sampler is sampler
    assert manager.sampling_config is config
    assert manager.sampler.table is table


@pytest.mark.parametrize(("name", "value"), [("steps", 3), ("beta_endd", 0.1), ("clip", True)])
def test_manager_refuses_unknown_fields(name: str, value: object) -> None:
    with pytest.raises(
        ValueError, match=rf"create_advanced_sampling_manager: field is '{name}', expected one of .*beta_end"
    ):
        create_advanced_sampling_manager("linear", "ddim", **{name: value})


def test_manager_describes_itself() -> None:
    manager = create_advanced_sampling_manager(
        "linear", "dpm_solver", num_train_timesteps=400, num_inference_steps=10, timestep_spacing="trailing"
    )
    info = manager.get_info()
    assert info["method"] == "dpm_solver"
    assert info["schedule_type"] == "linear"
    assert info["num_train_timesteps"] == 400
    assert info["num_inference_steps"] == info["model_calls"] == 10
    assert info["timesteps_range"] == (39.0, 399.0)
    assert info["zero_terminal_snr"] is False
    assert math.isclose(info["betas_range"][1], 0.02)


def test_manager_splits_fields_by_configuration() -> None:
    manager = create_advanced_sampling_manager("scaled_linear", "ddpm", beta_end=0.012, variance_type="fixed_large")
    assert manager.scheduler_config.beta_end == 0.012
    assert manager.scheduler_config.schedule_type == "scaled_linear"
    assert manager.sampling_config.variance_type.value == "fixed_large"  # type: ignore[union-attr]


def test_manager_propagates_loop_errors() -> None:
    manager = create_advanced_sampling_manager("linear", "ddim", num_inference_steps=3)
    with pytest.raises(ValueError, match="model returned shape"):
        manager.sample(lambda x, t: x[:1], _latents(), progress=False)
    assert manager.sample(_model, _latents(), progress=False).steps == 3


# ------------------------------------------------------------------------------ what a shared sampler leaves as it was


def _seeded(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(("method", "fields"), STOCHASTIC, ids=str)
def test_same_seed_gives_same_samples(method: str, fields: dict[str, Any]) -> None:
    manager = create_advanced_sampling_manager("linear", method, num_inference_steps=5, **fields)
    first, again, other = (
        manager.sample(_model, _latents(), generator=_seeded(seed), progress=False).samples for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("method", METHODS)
def test_loop_draws_only_used_noise(method: str) -> None:
    """Five steps, the last without noise: the draws equal diffusers', so that a seed gives the same samples."""
    manager = create_advanced_sampling_manager("linear", method, num_inference_steps=5)
    given, counted = _seeded(), _seeded()
    manager.sample(_model, _latents(), generator=given, progress=False)
    # TCD adds nothing in its step to timestep 0, where no level is below; diffusers draws there and multiplies by 0.
    draws = {"tcd": 3}.get(method, 4)
    for _ in range(0 if method in DETERMINISTIC else draws):
        torch.randn(2, 6, generator=counted)
    assert torch.equal(given.get_state(), counted.get_state())


@pytest.mark.parametrize(("method", "fields"), STOCHASTIC, ids=str)
def test_separate_sample_equals_sample_in_batch(method: str, fields: dict[str, Any]) -> None:
    """With a generator per sample, a sample does not depend on the rest of the batch."""
    manager = create_advanced_sampling_manager("linear", method, num_inference_steps=5, **fields)
    together = manager.sample(_model, _latents(), generator=[_seeded(3), _seeded(4)], progress=False).samples
    for i in range(2):
        alone = manager.sample(_model, _latents()[i : i + 1], generator=[_seeded(3 + i)], progress=False).samples
        assert torch.equal(alone[0], together[i])
    with pytest.raises(ValueError, match=r"generator is a list of 3, expected one generator for each sample"):
        manager.sample(_model, _latents(), generator=[_seeded()] * 3, progress=False)


@pytest.mark.parametrize("method", METHODS)
def test_loop_writes_no_argument(method: str) -> None:
    manager = create_advanced_sampling_manager("linear", method, num_inference_steps=5)
    latents, condition, negative = _latents(), torch.ones(2, 6), torch.zeros(2, 6)
    kept = [t.clone() for t in (latents, condition, negative, manager.sampler.table.coefficients)]

    def model(x: torch.Tensor, t: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        return _model(x + c, t)

    for _ in range(2):
        manager.sample(model, latents, condition, negative, guidance_scale=2.0, progress=False)
    for before, after in zip(kept, (latents, condition, negative, manager.sampler.table.coefficients), strict=True):
        assert torch.equal(before, after)


class _FailsAt:
    """Model that fails at one call in a given way."""

    def __init__(self, call: int, how: str) -> None:
        self.left, self.how = call, how

    def __call__(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        self.left -= 1
        if self.left >= 0:
            return _model(x, t)
        if self.how == "exception":
            raise RuntimeError("out of memory")
        return x[:1] if self.how == "shape" else torch.full_like(x, math.nan if self.how == "nan" else math.inf)


@pytest.mark.parametrize("call", [0, 3])
@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        ("exception", RuntimeError, "out of memory"),
        ("shape", ValueError, r"sample: model returned shape \[1, 6\], expected \[2, 6\]; return one output like"),
        ("nan", ValueError, r"sample: model returned NaN at timestep \d+, expected finite numbers; check the model"),
        ("infinity", ValueError, r"sample: model returned infinity at timestep \d+"),
    ],
)
@pytest.mark.parametrize("generators", [1, 2])
def test_failing_model_leaves_everything_unchanged(
    how: str, error: type[BaseException], message: str | None, call: int, generators: int
) -> None:
    manager = create_advanced_sampling_manager("linear", "euler_ancestral", num_inference_steps=5)
    latents, table = _latents(), manager.sampler.table
    given = [_seeded(5), _seeded(6)] if generators == 2 else _seeded(5)
    fresh = [_seeded(5), _seeded(6)] if generators == 2 else _seeded(5)
    expected = manager.sample(_model, latents, generator=fresh, progress=False).samples
    with pytest.raises(error, match=message):
        manager.sample(_FailsAt(call, how), latents, generator=given, progress=False)
    assert torch.equal(latents, _latents())
    assert manager.sampler.table is table
    assert torch.equal(manager.sample(_model, latents, generator=given, progress=False).samples, expected)


def test_failing_callback_leaves_generator_unchanged() -> None:
    manager = create_advanced_sampling_manager("linear", "ddpm", num_inference_steps=5)

    def callback(info: StepInfo) -> None:
        if info.index == 2:
            raise RuntimeError("enough")

    generator = _seeded()
    with pytest.raises(RuntimeError, match="enough"):
        manager.sample(_model, _latents(), generator=generator, callback=callback, progress=False)
    assert torch.equal(generator.get_state(), _seeded().get_state())


@pytest.mark.parametrize("steps", [0, -3, 1001, 2.5])
def test_failing_set_timesteps_leaves_sampler_unchanged(steps: object) -> None:
    sampler = create_sampler("linear", "dpm_solver", num_inference_steps=5)
    table, config = sampler.table, sampler.config
    with pytest.raises((TypeError, ValueError), match=r"\w+: num_inference_steps .*, expected .+; .+"):
        sampler.set_timesteps(steps)  # type: ignore[arg-type]
    assert sampler.table is table
    assert sampler.config is config
    sampler.set_timesteps(7)
    assert (len(sampler.table), sampler.config.num_inference_steps) == (7, 7)


@pytest.mark.parametrize("method", METHODS)
def test_table_of_all_timesteps_compiles(method: str) -> None:
    sampler = create_sampler("linear", method, num_inference_steps=1000)
    assert len(sampler.table) == model_calls(method, 1000)
    assert sampler.table.timesteps[0] == 999.0
    assert sampler.table.timesteps[-1] == 0.0


@pytest.mark.parametrize(
    ("latents", "error"),
    [
        ([0.0, 1.0], TypeError),
        (torch.zeros(2, 3, dtype=torch.int64), TypeError),
        (torch.zeros(2, 3, dtype=torch.complex64), TypeError),
        (torch.tensor(1.0), TypeError),
        (torch.full((2, 3), math.nan), ValueError),
    ],
    ids=["list", "int64", "complex", "number", "NaN"],
)
def test_non_noise_latents_are_refused(latents: object, error: type[Exception]) -> None:
    sampler = create_sampler("linear", "ddim", num_inference_steps=2)
    with pytest.raises(error, match=r"sample: latents .*, expected .*; draw it with torch.randn"):
        sampler.sample(_model, latents, progress=False)  # type: ignore[arg-type]


def test_final_samples_are_checked_unless_checks_are_off() -> None:
    sampler = create_sampler("linear", "ddim", num_inference_steps=3)
    # Half precision can overflow in the step itself, from outputs that are finite.
    latents = _latents().half() * 100
    with pytest.raises(ValueError, match=r"sample: samples became NaN or infinite.*check_finite=True"):
        sampler.sample(lambda x, t: torch.full_like(x, 6e4), latents, progress=False)
    result = sampler.sample(lambda x, t: x * math.nan, _latents(), progress=False, check_finite=False)
    assert result.steps == 3
    assert bool(result.samples.isnan().all())


@pytest.mark.parametrize("method", METHODS)
def test_sampler_class_refuses_other_methods(method: str) -> None:
    scheduler = create_noise_scheduler("linear")
    kind = SAMPLERS[SamplingMethod(method)]
    assert kind(scheduler, num_inference_steps=3).config.method is SamplingMethod(method)
    other = "heun" if method != "heun" else "ddim"
    with pytest.raises(
        ValueError, match=rf"{kind.__name__}: method is '{other}', expected '{method}'; use create_samp"
    ):
        kind(scheduler, SamplingConfig(method=other))
    with pytest.raises(TypeError, match=r"scheduler is a str, expected a noise scheduler; make one with create_noise"):
        kind("linear")  # type: ignore[arg-type]
