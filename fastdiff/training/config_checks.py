# SPDX-License-Identifier: MIT
"""Checks of `DiffusionConfig`: names and ranges of its fields, and the values of those that were left out.

Each ``settle_`` function changes the configuration that it is given; `DiffusionConfig.validate` passes a copy.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import fields
from enum import Enum
from typing import TYPE_CHECKING, Any

from ..errors import checked_bool, checked_float, checked_integer, error_message, parse_choice, shown, unknown_name
from ..ops.diffusion_loss import LOSSES
from ..schedules import NoiseScheduleType
from ..solvers import PredictionType, SamplingMethod

if TYPE_CHECKING:
    from .config import DiffusionConfig

LOSS_WEIGHTINGS = ("uniform", "min_snr", "p2", "debiased")
TIMESTEP_SAMPLINGS = ("uniform", "logit_normal")
#: `mixed_precision` as accelerate names it.
_PRECISIONS = {"False": "no", "True": "bf16", "no": "no", "fp16": "fp16", "bf16": "bf16"}

_OPERATION = "DiffusionConfig"

#: What the guide allows.  Outside of it a warning is given.
_USUAL: dict[str, tuple[float, float]] = {
    "in_channels": (1, 4),
    "out_channels": (1, 4),
    "model_channels": (32, 512),
    "num_res_blocks": (1, 4),
    "dropout": (0.0, 0.5),
    "num_heads": (1, 16),
    "context_dim": (256, 1024),
    "num_train_timesteps": (100, 4000),
    "learning_rate": (1e-5, 1e-3),
    "ema_decay": (0.99, 0.9999),
}


class SchedulerType(str, Enum):
    """The noise schedules of `DiffusionConfig.scheduler_type`.

    ``SCALED_LINEAR`` multiplies the ends of the line by 1000/T (arXiv 2102.09672, code).  diffusers and
    `DiffusionConfig.beta_schedule` give the name ``"scaled_linear"`` to the line in √β, which is ``QUADRATIC`` here.
    """

    LINEAR = "linear"
    COSINE = "cosine"
    QUADRATIC = "quadratic"
    SIGMOID = "sigmoid"
    SCALED_LINEAR = "scaled_linear"
    KARRAS = "karras"

    @property
    def schedule(self) -> NoiseScheduleType:
        """The schedule's name in `fastdiff.schedules`."""
        if self is SchedulerType.SCALED_LINEAR:
            return NoiseScheduleType.LINEAR_RESCALED
        return NoiseScheduleType(self.value)


_SCHEDULER_TYPES = {kind.schedule: kind for kind in SchedulerType}


def _given(config: DiffusionConfig, name: str) -> Any:
    """Return a field that may still be None, which its annotation does not say."""
    return getattr(config, name)


def _agree(config: DiffusionConfig, first: str, second: str, default: Any) -> None:
    """Give two names of one thing the value of whichever is given."""
    given = [value for value in (getattr(config, first), getattr(config, second)) if value is not None]
    if len(given) == 2 and given[0] != given[1]:
        raise _refused(second, f"is {given[1]!r}", f"{given[0]!r} like {first}", "leave one of the two out")
    value = given[0] if given else default
    setattr(config, first, value)
    setattr(config, second, value)


def settle_schedule(config: DiffusionConfig) -> None:
    """Settle T, the noise schedule and the prediction type."""
    _agree(config, "num_timesteps", "num_train_timesteps", 1000)
    kind = _schedule_kind(config)
    config.beta_schedule, config.scheduler_type = kind.value, _SCHEDULER_TYPES.get(kind)
    if _given(config, "v_prediction") is not None:
        checked_bool(_OPERATION, "v_prediction", config.v_prediction)
    if _given(config, "prediction_type") is not None:
        prediction = parse_choice(PredictionType, _OPERATION, "prediction_type", config.prediction_type)
        if prediction is PredictionType.EDM:
            known = [one.value for one in PredictionType if one is not PredictionType.EDM]
            raise unknown_name(_OPERATION, "prediction_type", config.prediction_type, known)
    elif config.v_prediction:
        prediction = PredictionType.V_PREDICTION
    else:
        flow = kind is NoiseScheduleType.FLOW
        prediction = PredictionType.FLOW_PREDICTION if flow else PredictionType.EPSILON
    is_v = prediction is PredictionType.V_PREDICTION
    if config.v_prediction not in (None, is_v):
        got, expected = f"is {config.v_prediction} beside prediction_type {prediction.value!r}", f"{is_v}"
        raise _refused("v_prediction", got, expected, "set both, or leave v_prediction out")
    config.prediction_type, config.v_prediction = prediction.value, is_v


def _schedule_kind(config: DiffusionConfig) -> NoiseScheduleType:
    """Return the noise schedule that `scheduler_type` and `beta_schedule` name."""
    for name, other, foreign in (
        ("scheduler_type", "beta_schedule", NoiseScheduleType),
        ("beta_schedule", "scheduler_type", SchedulerType),
    ):
        value = getattr(config, name)
        if isinstance(value, foreign) and value.value == "scaled_linear":
            got, expected = f"is {foreign.__name__}.{value.name}", f"that in {other}"
            raise _refused(name, got, expected, f"set {other}: the name means another schedule in {name}")
    by_beta = None
    if _given(config, "beta_schedule") is not None:
        by_beta = NoiseScheduleType.parse(config.beta_schedule, _OPERATION)
        if by_beta.value.startswith("custom"):
            known = [one.value for one in NoiseScheduleType if not one.value.startswith("custom")]
            raise unknown_name(_OPERATION, "beta_schedule", config.beta_schedule, known)
    if config.scheduler_type is None:
        return by_beta or NoiseScheduleType.LINEAR
    by_type = parse_choice(SchedulerType, _OPERATION, "scheduler_type", config.scheduler_type)
    same = by_beta is NoiseScheduleType.SCALED_LINEAR and by_type is SchedulerType.QUADRATIC  # one formula
    if by_beta not in (None, by_type.schedule) and not same:
        got, expected = f"is {config.beta_schedule!r}", f"{by_type.schedule.value!r} like scheduler_type"
        remedy = f"leave one of the two out: scheduler_type {by_type.value!r} is {by_type.schedule.value!r} here"
        raise _refused("beta_schedule", got, expected, remedy)
    return by_type.schedule


def settle_model(config: DiffusionConfig) -> None:
    """Settle the sizes of the samples and of the U-Net."""
    if _given(config, "out_channels") is None:
        config.out_channels = config.in_channels
    _agree(config, "hidden_size", "model_channels", 128)
    for name in ("image_size", "in_channels", "out_channels", "num_res_blocks", "num_heads", "transformer_depth"):
        setattr(config, name, checked_integer(_OPERATION, name, getattr(config, name), 1))
    config.context_dim = checked_integer(_OPERATION, "context_dim", config.context_dim, 1)
    width = config.model_channels = config.hidden_size = checked_integer(
        _OPERATION, "model_channels", config.model_channels, 4
    )
    if width % 2:
        raise _refused("model_channels", f"is {width}", "an even number", "the embedding of the timestep needs it")
    if _given(config, "num_layers") is not None:
        checked_integer(_OPERATION, "num_layers", config.num_layers, 1)
    if _given(config, "channel_mult") is None:
        config.channel_mult = (1,) + (2,) * ((config.num_layers or 4) - 1)
    config.channel_mult = _integers("channel_mult", config.channel_mult)
    if not config.channel_mult:
        raise _refused("channel_mult", "is empty", "one multiple a level", "(1, 2, 2, 2) is usual")
    levels = len(config.channel_mult)
    if config.num_layers not in (None, levels):
        got, expected = f"is {config.num_layers}", f"{levels}, the length of channel_mult"
        raise _refused("num_layers", got, expected, "leave one of the two out")
    config.num_layers = levels
    config.attention_resolutions = _integers("attention_resolutions", config.attention_resolutions)
    if config.out_channels not in (config.in_channels, 2 * config.in_channels):
        expected = f"{config.in_channels}, or {2 * config.in_channels} for a learned variance"
        raise _refused("out_channels", f"is {config.out_channels}", expected, "leave it out to take in_channels")
    if config.image_size % 2 ** (levels - 1):
        expected = f"a multiple of {2 ** (levels - 1)} for {levels} levels"
        raise _refused("image_size", f"is {config.image_size}", expected, "take another size, or fewer levels")
    for i, channels in enumerate(config.block_out_channels):
        if (config.attention_levels[i] or i == levels - 1) and channels % config.num_heads:
            expected = f"a divisor of the {channels} channels of level {i}"
            raise _refused("num_heads", f"is {config.num_heads}", expected, "take fewer heads or other channels")
    if config.attention_resolutions and not any(config.attention_levels):
        sides = ", ".join(str(config.image_size // 2**i) for i in range(levels))
        got, expected = f"is {config.attention_resolutions}", f"a side of a level, one of {sides}"
        remedy = "name one of them, or pass () for attention in the middle alone"
        warnings.warn(error_message(_OPERATION, "attention_resolutions", got, expected, remedy), stacklevel=3)


def settle_training(config: DiffusionConfig) -> None:
    """Settle the fields of optimizer, precision, averages and loss."""
    _agree(config, "gradient_clipping", "max_grad_norm", 1.0)
    for name in ("learning_rate", "huber_c", "p2_k", "logit_std", "timestep_shift"):
        setattr(config, name, checked_float(_OPERATION, name, getattr(config, name), 0.0, strict=True))
    for name in ("weight_decay", "max_grad_norm", "p2_gamma", "vlb_weight"):
        setattr(config, name, checked_float(_OPERATION, name, getattr(config, name), 0.0))
    config.gradient_clipping = config.max_grad_norm
    config.logit_mean = checked_float(_OPERATION, "logit_mean", config.logit_mean, -math.inf)
    for name, at_one in (("ema_decay", False), ("condition_dropout", True), ("dropout", False)):
        share = checked_float(_OPERATION, name, getattr(config, name), 0.0)
        if share > 1 or (share == 1 and not at_one):
            expected = "a number from 0 to 1" + ("" if at_one else ", below 1")
            raise _refused(name, f"is {share}", expected, f"pass {name} in that range")
        setattr(config, name, share)
    for name, least in (
        ("gradient_accumulation_steps", 1),
        ("lr_warmup_steps", 0),
        ("max_train_steps", 1),
        ("seed", 0),
    ):
        setattr(config, name, checked_integer(_OPERATION, name, getattr(config, name), least))
    if config.seed >= 2**64:
        raise _refused("seed", f"is {shown(config.seed)}", "0 to 2**64 - 1", "take it modulo 2**64")
    precision = _PRECISIONS.get(str(config.mixed_precision))
    if precision is None:
        raise unknown_name(_OPERATION, "mixed_precision", config.mixed_precision, _PRECISIONS)
    config.mixed_precision = precision
    if config.snr_gamma is not None:
        config.snr_gamma = checked_float(_OPERATION, "snr_gamma", config.snr_gamma, 0.0, strict=True)
    if _given(config, "loss_weighting") is None:
        config.loss_weighting = "uniform" if config.snr_gamma is None else "min_snr"
    for name, known in (
        ("loss_type", LOSSES),
        ("loss_weighting", LOSS_WEIGHTINGS),
        ("timestep_sampling", TIMESTEP_SAMPLINGS),
    ):
        if getattr(config, name) not in known:
            raise unknown_name(_OPERATION, name, getattr(config, name), known)
    if config.loss_weighting == "min_snr":
        config.snr_gamma = 5.0 if config.snr_gamma is None else config.snr_gamma
    elif config.snr_gamma is not None:
        got, expected = f"is given beside loss_weighting {config.loss_weighting!r}", "min_snr"
        raise _refused("snr_gamma", got, expected, "leave one of the two out")


def settle_sampling(config: DiffusionConfig) -> None:
    """Check the fields of sampling and all flags, after the schedule is settled."""
    config.sampling_method = parse_choice(SamplingMethod, _OPERATION, "sampling_method", config.sampling_method).value
    config.num_inference_steps = checked_integer(_OPERATION, "num_inference_steps", config.num_inference_steps, 1)
    config.guidance_scale = checked_float(_OPERATION, "guidance_scale", config.guidance_scale, -math.inf)
    config.eta = checked_float(_OPERATION, "eta", config.eta, 0.0)
    for field in fields(config):
        if field.type == "bool":
            checked_bool(_OPERATION, field.name, getattr(config, field.name))
    config.timestep_spacing = str(config.noise_scheduler_config().timestep_spacing)


def warn_of_unusual_values(config: DiffusionConfig) -> None:
    """Warn of fields of a settled configuration that are outside of the range that the guide gives."""
    for name, (low, high) in _USUAL.items():
        value = getattr(config, name)
        if not low <= value <= high and not (name == "context_dim" and not config.use_spatial_transformer):
            expected, remedy = f"{low:g} to {high:g}", "stay in that range, or check that this is meant"
            warnings.warn(error_message(_OPERATION, name, f"is {value}", expected, remedy), stacklevel=3)


def _refused(argument: str, got: str, expected: str, remedy: str) -> ValueError:
    return ValueError(error_message(_OPERATION, argument, got, expected, remedy))


def _integers(name: str, values: Any) -> tuple[int, ...]:
    """Return a sequence of positive integers as a tuple."""
    if isinstance(values, (str, bytes)) or not isinstance(values, Sequence):
        got, remedy = f"is a {type(values).__name__}", "pass a tuple"
        raise TypeError(error_message(_OPERATION, name, got, "a sequence of integers", remedy))
    return tuple(checked_integer(_OPERATION, f"{name}[{i}]", value, 1) for i, value in enumerate(values))
