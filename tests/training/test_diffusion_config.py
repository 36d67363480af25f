# SPDX-License-Identifier: MIT
"""The configuration of training: pairs of names, refusals, warnings, JSON."""

from __future__ import annotations

import json
import warnings
from dataclasses import asdict, fields
from typing import Any

import numpy as np
import pytest

from fastdiff.schedules import NoiseScheduleType
from fastdiff.training import AdvancedScheduler, DiffusionConfig, SchedulerType

PAIRS = {
    "num_timesteps": ("num_train_timesteps", 500, 400),
    "scheduler_type": ("beta_schedule", "cosine", "linear"),
    "gradient_clipping": ("max_grad_norm", 0.5, 2.0),
    "hidden_size": ("model_channels", 64, 96),
}


@pytest.mark.parametrize("first", PAIRS)
def test_pair_of_names_has_one_value(first: str) -> None:
    second, value, other = PAIRS[first]
    for given in ({first: value}, {second: value}, {first: value, second: value}):
        settled = DiffusionConfig(**given).validate()
        assert getattr(settled, first) == getattr(settled, second) == value
    with pytest.raises(ValueError, match=f"DiffusionConfig: {second} is .*like {first}.*leave one of the two out"):
        DiffusionConfig(**{first: value, second: other}).validate()
    config = DiffusionConfig(**{first: other})
    setattr(config, first, value)  # mutable: the last value counts, and the other name was never given
    assert getattr(config.validate(), second) == value


@pytest.mark.parametrize(
    ("given", "refused"),
    [
        ({"v_prediction": True, "prediction_type": "epsilon"}, "v_prediction"),
        ({"v_prediction": False, "prediction_type": "v_prediction"}, "v_prediction"),
        ({"num_layers": 3, "channel_mult": (1, 2)}, "num_layers"),
        ({"snr_gamma": 5.0, "loss_weighting": "p2"}, "snr_gamma"),
        ({"scheduler_type": SchedulerType.SCALED_LINEAR, "beta_schedule": "scaled_linear"}, "beta_schedule"),
        ({"beta_schedule": SchedulerType.SCALED_LINEAR}, "beta_schedule"),
        ({"scheduler_type": NoiseScheduleType.SCALED_LINEAR}, "scheduler_type"),
        ({"beta_schedule": "custom_betas"}, "beta_schedule"),
        ({"scheduler_type": "exponential"}, "scheduler_type"),
        ({"prediction_type": "edm"}, "prediction_type"),
        ({"prediction_type": "noise"}, "prediction_type"),
        ({"out_channels": 5}, "out_channels"),
        ({"image_size": 36}, "image_size"),
        ({"num_heads": 7}, "num_heads"),
        ({"model_channels": 33}, "model_channels"),
        ({"channel_mult": ()}, "channel_mult"),
        ({"channel_mult": 4}, "channel_mult"),
        ({"num_res_blocks": 1.5}, "num_res_blocks"),
        ({"dropout": 1.0}, "dropout"),
        ({"ema_decay": 1.5}, "ema_decay"),
        ({"learning_rate": 0}, "learning_rate"),
        ({"mixed_precision": "fp8"}, "mixed_precision"),
        ({"mixed_precision": 1}, "mixed_precision"),
        ({"loss_type": "mse"}, "loss_type"),
        ({"eta": float("nan")}, "eta"),
        ({"guidance_scale": "7.5"}, "guidance_scale"),
        ({"use_ema": 1}, "use_ema"),
        ({"num_timesteps": True}, "num_train_timesteps"),
        ({"beta_start": 0.1, "beta_end": 0.02}, "beta_start"),
        ({"timestep_spacing": "even"}, "timestep_spacing"),
        ({"sampling_method": "half"}, "sampling_method"),
        ({"timestep_spacing": "leading", "beta_schedule": "flow"}, "timestep_spacing"),
    ],
)
def test_contradictions_and_bad_values_are_refused(given: dict[str, Any], refused: str) -> None:
    config = DiffusionConfig(**given)
    before = asdict(config)
    with pytest.raises((ValueError, TypeError), match=rf"Config: {refused}\S* .*expected .*; "):
        config.validate()
    assert asdict(config) == before


@pytest.mark.parametrize("kind", SchedulerType)
def test_scheduler_type_names_a_schedule(kind: SchedulerType) -> None:
    expected = "linear_rescaled" if kind is SchedulerType.SCALED_LINEAR else kind.value
    for given in (kind, kind.value):
        settled = DiffusionConfig(scheduler_type=given).validate()
        assert settled.scheduler_type is kind
        assert settled.beta_schedule == settled.noise_scheduler_config().schedule_type == expected
    assert DiffusionConfig(beta_schedule=expected).validate().scheduler_type is kind


def test_one_formula_under_two_names_is_no_contradiction() -> None:
    settled = DiffusionConfig(scheduler_type=SchedulerType.QUADRATIC, beta_schedule="scaled_linear").validate()
    assert settled.beta_schedule == "quadratic"


def test_prediction_type_follows_flag_and_schedule() -> None:
    assert DiffusionConfig().validate().prediction_type == "epsilon"
    assert DiffusionConfig(v_prediction=True).validate().prediction_type == "v_prediction"
    assert DiffusionConfig(prediction_type="v_prediction").validate().v_prediction is True
    assert DiffusionConfig(beta_schedule="flow").validate().prediction_type == "flow_prediction"


@pytest.mark.parametrize(
    ("spacing", "visited"),
    [
        (None, [150, 100, 50, 0]),
        ("leading", [150, 100, 50, 0]),
        ("trailing", [199, 149, 99, 49]),
        ("linspace", [199, 133, 66, 0]),
    ],
)
def test_samplers_visit_timesteps_of_the_spacing(spacing: str | None, visited: list[int]) -> None:
    config = DiffusionConfig(num_timesteps=200, timestep_spacing=spacing)
    for given in (config, config.validate(), DiffusionConfig.from_json(config.to_json())):
        assert AdvancedScheduler(given).sampler("ddim", 4).timesteps.tolist() == visited
    assert config.validate().timestep_spacing == (spacing or "leading")
    assert DiffusionConfig(beta_schedule="flow").validate().timestep_spacing == "trailing"


def test_levels_and_output_channels() -> None:
    settled = DiffusionConfig(num_layers=3, hidden_size=32, in_channels=2, out_channels=4).validate()
    assert settled.channel_mult == (1, 2, 2)
    assert settled.block_out_channels == (32, 64, 64)
    assert settled.attention_levels == (False, False, True)  # 64, 32 and 16 pixels
    assert settled.learned_variance
    assert not DiffusionConfig().validate().learned_variance


def test_validation_gives_a_settled_copy() -> None:
    config = DiffusionConfig(num_timesteps=200, snr_gamma=3.0, mixed_precision=True)
    settled = config.validate()
    assert settled is not config
    assert config.num_train_timesteps is None
    assert settled.validate() == settled
    assert (settled.mixed_precision, settled.loss_weighting) == ("bf16", "min_snr")
    assert [field.name for field in fields(settled) if getattr(settled, field.name) is None] == []


@pytest.mark.parametrize(
    "given",
    [
        {"in_channels": 8, "out_channels": 16},
        {"model_channels": 16},
        {"num_res_blocks": 5},
        {"dropout": 0.7},
        {"num_heads": 32},
        {"context_dim": 64, "use_spatial_transformer": True},
        {"num_timesteps": 50},
        {"learning_rate": 0.01},
        {"ema_decay": 0.5},
        {"attention_resolutions": (7,)},
    ],
)
def test_unusual_values_are_warned_of(given: dict[str, Any]) -> None:
    name = {"num_timesteps": "num_train_timesteps"}.get(next(iter(given)), next(iter(given)))
    with pytest.warns(UserWarning, match=f"DiffusionConfig: {name} is"):
        DiffusionConfig(**given).validate()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        DiffusionConfig(context_dim=64).validate()  # not used without cross-attention


@pytest.mark.parametrize("settle", [False, True])
def test_json_gives_an_equal_configuration(settle: bool) -> None:
    config = DiffusionConfig(scheduler_type=SchedulerType.SCALED_LINEAR, channel_mult=(1, 2, 2), v_prediction=True)
    config.timestep_spacing = "linspace"
    config = config.validate() if settle else config
    assert DiffusionConfig(**json.loads(json.dumps(asdict(config)))) == config
    assert DiffusionConfig.from_json(config.to_json()) == config
    with pytest.raises(ValueError, match="hiden_size"):
        DiffusionConfig.from_json('{"hiden_size": 3}')


def test_numbers_of_numpy_become_numbers_of_json() -> None:
    fields = {
        "learning_rate": np.float32(0.5),
        "max_grad_norm": np.float32(2),
        "seed": np.int64(3),
        "eta": np.float32(0),
    }
    fields |= {"num_timesteps": np.int64(100), "eta": np.float32(0), "lr_warmup_steps": np.int32(1)}
    config = DiffusionConfig(**fields)
    with pytest.warns(UserWarning, match="learning_rate"):
        settled = config.validate()
    assert type(settled.learning_rate) is float
    assert type(settled.seed) is int
    for one in (config, settled):
        assert DiffusionConfig.from_json(one.to_json()) == one
    with pytest.raises(ValueError, match="expected 0 to 2"):
        DiffusionConfig(seed=2**64).validate()
