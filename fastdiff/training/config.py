# SPDX-License-Identifier: MIT
"""The configuration of training and of the sampling after it: model, schedule, loss, optimizer, sampler, memory.

Two guides name the same things differently.  A field that is left out is None, and `DiffusionConfig.validate` settles
each pair of names on one value::

    num_timesteps      = num_train_timesteps     T
    scheduler_type     = beta_schedule           the noise schedule; see `SchedulerType` for "scaled linear"
    v_prediction=True  = prediction_type="v_prediction"
    gradient_clipping  = max_grad_norm           the largest norm of the gradient
    hidden_size        = model_channels          channels of the first level of the U-Net
    num_layers         = len(channel_mult)       levels of the U-Net, each half the size of the one before
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from enum import Enum
from typing import Any

from ..errors import checked_bool, checked_float, checked_integer, error_message, parse_choice, unknown_name
from ..json_fields import fields_from_json, fields_to_json, parsed_object
from ..schedules import NoiseSchedulerConfig, NoiseScheduleType
from ..solvers import PredictionType

__all__ = ["LOSS_TYPES", "LOSS_WEIGHTINGS", "TIMESTEP_SAMPLINGS", "DiffusionConfig", "SchedulerType"]

LOSS_TYPES = ("l2", "l1", "huber")
LOSS_WEIGHTINGS = ("uniform", "min_snr", "p2", "debiased")
TIMESTEP_SAMPLINGS = ("uniform", "logit_normal")
#: `mixed_precision` as accelerate names it.
_PRECISIONS = {"False": "no", "True": "bf16", "no": "no", "fp16": "fp16", "bf16": "bf16"}

#: A field that was left out; typed so that users of a settled configuration need no checks for None.
_NOT_GIVEN: Any = None

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


@dataclass
class DiffusionConfig:
    """The configuration of a model, its training and its sampling.  Mutable, and checked where it is used.

    Every consumer calls `validate` and works with the settled copy that it returns.
    ``json.dump(asdict(config), file)`` and ``DiffusionConfig(**json.load(file))`` give an equal configuration.

    Args:
        image_size: height and width of the samples, 64 if left out; divisible by 2 for each level after the first.
        in_channels: channels of a sample, 3 if left out.
        out_channels: channels of the model's output: `in_channels`, which it is if left out, or twice that, for a
            model that learns its variance (arXiv 2102.09672).
        hidden_size, model_channels: channels of the first level, even, 128 if left out.
        num_layers: the number of levels, 4 if left out; `channel_mult` then is DDPM's (1, 2, 2, …).
        channel_mult: channels of each level as multiples of `model_channels`.
        num_res_blocks: residual blocks a level (one more on the way up).
        attention_resolutions: sides of the feature maps, in pixels, that have attention.  The middle always has.
        dropout: share of features dropped in each residual block, 0 to 1 (exclusive).
        num_heads: attention heads.  Without a spatial transformer all heads have one size: this is then their number on
            the narrowest level with attention, and wider levels have more.
        use_spatial_transformer: condition on embeddings ``[B, tokens, context_dim]`` by cross-attention.
        transformer_depth: transformer blocks of each attention.
        context_dim: width of the embeddings.
        num_timesteps, num_train_timesteps: T, 1000 if left out.
        beta_start, beta_end: as in `NoiseSchedulerConfig`.
        scheduler_type: a `SchedulerType` or its name; linear if left out.
        beta_schedule: a name of `NoiseScheduleType`, as diffusers means it; not a custom schedule.
        prediction_type: ``epsilon``, ``v_prediction``, ``sample`` or ``flow_prediction``; if left out,
            ``flow_prediction`` on a flow schedule and ``epsilon`` on others.
        v_prediction: whether the prediction type is ``v_prediction``.
        learning_rate, weight_decay: of AdamW.
        gradient_clipping, max_grad_norm: the gradient's norm is held to it, 1 if left out; 0 for no clipping.
        mixed_precision: ``"no"``, ``"bf16"`` or ``"fp16"``; False is no, True is bf16.
        gradient_checkpointing: compute activations again in the backward pass.
        gradient_accumulation_steps: batches an optimizer step.
        lr_warmup_steps, max_train_steps: optimizer steps of the warm-up, and of warm-up and cosine together.
        use_ema, ema_decay: average the weights.
        seed: of everything drawn in training.
        condition_dropout: share of conditions replaced by the null condition, for classifier-free guidance.
        loss_type: ``l2``, ``l1`` or ``huber``.
        huber_c: c of the pseudo-Huber loss.
        loss_weighting: ``uniform``, ``min_snr`` (arXiv 2303.09556), ``p2`` (arXiv 2204.00227) or ``debiased``
            (arXiv 2310.08442); if left out, min_snr where `snr_gamma` is given and uniform elsewhere.
        snr_gamma: γ of min-SNR, 5 if left out.
        p2_gamma, p2_k: γ and k of P2.
        vlb_weight: weight of the variational bound where the variance is learned (arXiv 2102.09672, eq. 16).
        timestep_sampling: ``uniform`` or ``logit_normal`` (arXiv 2403.03206, section 3.1).
        logit_mean, logit_std: of the logit-normal distribution.
        timestep_shift: moves the drawn timesteps towards noise (arXiv 2403.03206, eq. 23); 1 leaves them.
        num_inference_steps, guidance_scale, eta: of sampling; the guidance scale applies where there is a condition.
        clip_denoised: clamp the predicted x0 to [−1, 1].
        use_attention_slicing, use_vae_slicing, use_memory_efficient_attention, use_xformers, use_cpu_offload: memory
            options, passed to diffusers.  Of slicing, memory-efficient attention and xFormers, the last named that is
            set computes the attention.
    """

    image_size: int = 64
    in_channels: int = 3
    out_channels: int = _NOT_GIVEN
    hidden_size: int = _NOT_GIVEN
    num_layers: int = _NOT_GIVEN
    model_channels: int = _NOT_GIVEN
    num_res_blocks: int = 2
    attention_resolutions: Sequence[int] = (8, 16)
    dropout: float = 0.1
    channel_mult: Sequence[int] = _NOT_GIVEN
    num_heads: int = 8
    use_spatial_transformer: bool = False
    transformer_depth: int = 1
    context_dim: int = 768

    num_timesteps: int = _NOT_GIVEN
    num_train_timesteps: int = _NOT_GIVEN
    beta_start: float = 1e-4
    beta_end: float = 0.02
    scheduler_type: SchedulerType | str | None = None
    beta_schedule: str = _NOT_GIVEN
    prediction_type: str = _NOT_GIVEN
    v_prediction: bool = _NOT_GIVEN

    learning_rate: float = 1e-4
    weight_decay: float = 0.01
    gradient_clipping: float = _NOT_GIVEN
    max_grad_norm: float = _NOT_GIVEN
    mixed_precision: bool | str = "no"
    gradient_checkpointing: bool = False
    gradient_accumulation_steps: int = 1
    lr_warmup_steps: int = 1000
    max_train_steps: int = 10_000
    use_ema: bool = True
    ema_decay: float = 0.9999
    seed: int = 0
    condition_dropout: float = 0.1

    loss_type: str = "l2"
    huber_c: float = 0.001
    loss_weighting: str = _NOT_GIVEN
    snr_gamma: float | None = None
    p2_gamma: float = 1.0
    p2_k: float = 1.0
    vlb_weight: float = 0.001
    timestep_sampling: str = "uniform"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    timestep_shift: float = 1.0

    num_inference_steps: int = 50
    guidance_scale: float = 7.5
    eta: float = 0.0
    clip_denoised: bool = False

    use_attention_slicing: bool = False
    use_vae_slicing: bool = False
    use_memory_efficient_attention: bool = False
    use_xformers: bool = False
    use_cpu_offload: bool = False

    def __post_init__(self) -> None:
        # JSON has lists alone: a configuration that was read is then equal to the one written.
        for name in ("attention_resolutions", "channel_mult"):
            if isinstance(getattr(self, name), list):
                setattr(self, name, tuple(getattr(self, name)))

    def validate(self) -> DiffusionConfig:
        """Check all fields and return a copy in which every field has its value, both names of a pair the same one.

        The copy of a copy is equal to it.  `scheduler_type` of the copy is None for the schedules that only
        `beta_schedule` names.

        Raises:
            TypeError: a field has the wrong type.
            ValueError: a field is out of range or unknown, or two fields contradict each other.

        Warns:
            UserWarning: a field is outside of the range that the guide gives.
        """
        settled = replace(self)
        settled._settle_schedule()
        settled._settle_model()
        settled._settle_training()
        checked_integer(_OPERATION, "num_inference_steps", settled.num_inference_steps, 1)
        checked_float(_OPERATION, "guidance_scale", settled.guidance_scale, -math.inf)
        checked_float(_OPERATION, "eta", settled.eta, 0.0)
        for field in fields(settled):
            if field.type == "bool":
                checked_bool(_OPERATION, field.name, getattr(settled, field.name))
        settled.noise_scheduler_config()
        for name, (low, high) in _USUAL.items():
            value = getattr(settled, name)
            if not low <= value <= high and not (name == "context_dim" and not settled.use_spatial_transformer):
                expected, remedy = f"{low:g} to {high:g}", "stay in that range, or check that this is meant"
                warnings.warn(error_message(_OPERATION, name, f"is {value}", expected, remedy), stacklevel=2)
        return settled

    def noise_scheduler_config(self) -> NoiseSchedulerConfig:
        """Return the configuration of the noise schedule; of a settled configuration."""
        return NoiseSchedulerConfig(
            num_train_timesteps=self.num_train_timesteps,
            beta_start=self.beta_start,
            beta_end=self.beta_end,
            schedule_type=self.beta_schedule,
            clip_sample=self.clip_denoised,
        )

    @property
    def learned_variance(self) -> bool:
        """Whether the model's output has a second half for the variance; of a settled configuration."""
        return self.out_channels == 2 * self.in_channels

    @property
    def block_out_channels(self) -> tuple[int, ...]:
        """Channels of each level; of a settled configuration."""
        return tuple(self.model_channels * multiple for multiple in self.channel_mult)

    @property
    def attention_levels(self) -> tuple[bool, ...]:
        """Whether each level has attention; of a settled configuration."""
        return tuple(self.image_size // 2**i in self.attention_resolutions for i in range(len(self.channel_mult)))

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as values of standard JSON; `from_dict` makes an equal configuration of them."""
        return fields_to_json(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> DiffusionConfig:
        """Make a configuration of what `to_dict` gave.

        Raises:
            TypeError, ValueError: the values are no mapping, or a field is unknown.
        """
        return cls(**fields_from_json(cls, values))

    def to_json(self) -> str:
        """Return the fields as one object of standard JSON (RFC 8259)."""
        return json.dumps(self.to_dict(), allow_nan=False, indent=2)

    @classmethod
    def from_json(cls, text: str) -> DiffusionConfig:
        """Make a configuration of one object of JSON, such as `to_json` gave; fields may be left out.

        Raises:
            TypeError, ValueError: the text is no JSON object, or a field is unknown.
        """
        return cls.from_dict(parsed_object(cls.__name__, text))

    def _given(self, name: str) -> Any:
        """Return a field that may still be None, which its annotation does not say."""
        return getattr(self, name)

    def _agree(self, first: str, second: str, default: Any) -> None:
        """Give two names of one thing the value of whichever is given."""
        given = [value for value in (getattr(self, first), getattr(self, second)) if value is not None]
        if len(given) == 2 and given[0] != given[1]:
            raise _refused(second, f"is {given[1]!r}", f"{given[0]!r} like {first}", "leave one of the two out")
        value = given[0] if given else default
        setattr(self, first, value)
        setattr(self, second, value)

    def _settle_schedule(self) -> None:
        self._agree("num_timesteps", "num_train_timesteps", 1000)
        kind = self._schedule_kind()
        self.beta_schedule, self.scheduler_type = kind.value, _SCHEDULER_TYPES.get(kind)
        if self._given("v_prediction") is not None:
            checked_bool(_OPERATION, "v_prediction", self.v_prediction)
        if self._given("prediction_type") is not None:
            prediction = parse_choice(PredictionType, _OPERATION, "prediction_type", self.prediction_type)
            if prediction is PredictionType.EDM:
                known = [one.value for one in PredictionType if one is not PredictionType.EDM]
                raise unknown_name(_OPERATION, "prediction_type", self.prediction_type, known)
        elif self.v_prediction:
            prediction = PredictionType.V_PREDICTION
        else:
            flow = kind is NoiseScheduleType.FLOW
            prediction = PredictionType.FLOW_PREDICTION if flow else PredictionType.EPSILON
        is_v = prediction is PredictionType.V_PREDICTION
        if self.v_prediction not in (None, is_v):
            got, expected = f"is {self.v_prediction} beside prediction_type {prediction.value!r}", f"{is_v}"
            raise _refused("v_prediction", got, expected, "set both, or leave v_prediction out")
        self.prediction_type, self.v_prediction = prediction.value, is_v

    def _schedule_kind(self) -> NoiseScheduleType:
        """Return the noise schedule that `scheduler_type` and `beta_schedule` name."""
        for name, other, foreign in (
            ("scheduler_type", "beta_schedule", NoiseScheduleType),
            ("beta_schedule", "scheduler_type", SchedulerType),
        ):
            value = getattr(self, name)
            if isinstance(value, foreign) and value.value == "scaled_linear":
                got, expected = f"is {foreign.__name__}.{value.name}", f"that in {other}"
                raise _refused(name, got, expected, f"set {other}: the name means another schedule in {name}")
        by_beta = None
        if self._given("beta_schedule") is not None:
            by_beta = NoiseScheduleType.parse(self.beta_schedule, _OPERATION)
            if by_beta.value.startswith("custom"):
                known = [one.value for one in NoiseScheduleType if not one.value.startswith("custom")]
                raise unknown_name(_OPERATION, "beta_schedule", self.beta_schedule, known)
        if self.scheduler_type is None:
            return by_beta or NoiseScheduleType.LINEAR
        by_type = parse_choice(SchedulerType, _OPERATION, "scheduler_type", self.scheduler_type)
        same = by_beta is NoiseScheduleType.SCALED_LINEAR and by_type is SchedulerType.QUADRATIC  # one formula
        if by_beta not in (None, by_type.schedule) and not same:
            got, expected = f"is {self.beta_schedule!r}", f"{by_type.schedule.value!r} like scheduler_type"
            remedy = f"leave one of the two out: scheduler_type {by_type.value!r} is {by_type.schedule.value!r} here"
            raise _refused("beta_schedule", got, expected, remedy)
        return by_type.schedule

    def _settle_model(self) -> None:
        if self._given("out_channels") is None:
            self.out_channels = self.in_channels
        self._agree("hidden_size", "model_channels", 128)
        for name in ("image_size", "in_channels", "out_channels", "num_res_blocks", "num_heads", "transformer_depth"):
            setattr(self, name, checked_integer(_OPERATION, name, getattr(self, name), 1))
        self.context_dim = checked_integer(_OPERATION, "context_dim", self.context_dim, 1)
        width = self.model_channels = self.hidden_size = checked_integer(
            _OPERATION, "model_channels", self.model_channels, 4
        )
        if width % 2:
            raise _refused("model_channels", f"is {width}", "an even number", "the embedding of the timestep needs it")
        if self._given("num_layers") is not None:
            checked_integer(_OPERATION, "num_layers", self.num_layers, 1)
        if self._given("channel_mult") is None:
            self.channel_mult = (1,) + (2,) * ((self.num_layers or 4) - 1)
        self.channel_mult = _integers("channel_mult", self.channel_mult)
        if not self.channel_mult:
            raise _refused("channel_mult", "is empty", "one multiple a level", "(1, 2, 2, 2) is usual")
        levels = len(self.channel_mult)
        if self.num_layers not in (None, levels):
            got, expected = f"is {self.num_layers}", f"{levels}, the length of channel_mult"
            raise _refused("num_layers", got, expected, "leave one of the two out")
        self.num_layers = levels
        self.attention_resolutions = _integers("attention_resolutions", self.attention_resolutions)
        if self.out_channels not in (self.in_channels, 2 * self.in_channels):
            expected = f"{self.in_channels}, or {2 * self.in_channels} for a learned variance"
            raise _refused("out_channels", f"is {self.out_channels}", expected, "leave it out to take in_channels")
        if self.image_size % 2 ** (levels - 1):
            expected = f"a multiple of {2 ** (levels - 1)} for {levels} levels"
            raise _refused("image_size", f"is {self.image_size}", expected, "take another size, or fewer levels")
        for i, channels in enumerate(self.block_out_channels):
            if (self.attention_levels[i] or i == levels - 1) and channels % self.num_heads:
                expected = f"a divisor of the {channels} channels of level {i}"
                raise _refused("num_heads", f"is {self.num_heads}", expected, "take fewer heads or other channels")
        if self.attention_resolutions and not any(self.attention_levels):
            sides = ", ".join(str(self.image_size // 2**i) for i in range(levels))
            got, expected = f"is {self.attention_resolutions}", f"a side of a level, one of {sides}"
            remedy = "name one of them, or pass () for attention in the middle alone"
            warnings.warn(error_message(_OPERATION, "attention_resolutions", got, expected, remedy), stacklevel=3)

    def _settle_training(self) -> None:
        self._agree("gradient_clipping", "max_grad_norm", 1.0)
        for name in ("learning_rate", "huber_c", "p2_k", "logit_std", "timestep_shift"):
            checked_float(_OPERATION, name, getattr(self, name), 0.0, strict=True)
        for name in ("weight_decay", "max_grad_norm", "p2_gamma", "vlb_weight"):
            checked_float(_OPERATION, name, getattr(self, name), 0.0)
        checked_float(_OPERATION, "logit_mean", self.logit_mean, -math.inf)
        for name, at_one in (("ema_decay", False), ("condition_dropout", True), ("dropout", False)):
            share = checked_float(_OPERATION, name, getattr(self, name), 0.0)
            if share > 1 or (share == 1 and not at_one):
                expected = "a number from 0 to 1" + ("" if at_one else ", below 1")
                raise _refused(name, f"is {share}", expected, f"pass {name} in that range")
        for name, least in (
            ("gradient_accumulation_steps", 1),
            ("lr_warmup_steps", 0),
            ("max_train_steps", 1),
            ("seed", 0),
        ):
            checked_integer(_OPERATION, name, getattr(self, name), least)
        precision = _PRECISIONS.get(str(self.mixed_precision))
        if precision is None:
            raise unknown_name(_OPERATION, "mixed_precision", self.mixed_precision, _PRECISIONS)
        self.mixed_precision = precision
        if self.snr_gamma is not None:
            checked_float(_OPERATION, "snr_gamma", self.snr_gamma, 0.0, strict=True)
        if self._given("loss_weighting") is None:
            self.loss_weighting = "uniform" if self.snr_gamma is None else "min_snr"
        for name, known in (
            ("loss_type", LOSS_TYPES),
            ("loss_weighting", LOSS_WEIGHTINGS),
            ("timestep_sampling", TIMESTEP_SAMPLINGS),
        ):
            if getattr(self, name) not in known:
                raise unknown_name(_OPERATION, name, getattr(self, name), known)
        if self.loss_weighting == "min_snr":
            self.snr_gamma = 5.0 if self.snr_gamma is None else self.snr_gamma
        elif self.snr_gamma is not None:
            got, expected = f"is given beside loss_weighting {self.loss_weighting!r}", "min_snr"
            raise _refused("snr_gamma", got, expected, "leave one of the two out")


_OPERATION = DiffusionConfig.__name__


def _refused(argument: str, got: str, expected: str, remedy: str) -> ValueError:
    return ValueError(error_message(_OPERATION, argument, got, expected, remedy))


def _integers(name: str, values: Any) -> tuple[int, ...]:
    """Return a sequence of positive integers as a tuple."""
    if isinstance(values, (str, bytes)) or not isinstance(values, Sequence):
        got, remedy = f"is a {type(values).__name__}", "pass a tuple"
        raise TypeError(error_message(_OPERATION, name, got, "a sequence of integers", remedy))
    return tuple(checked_integer(_OPERATION, f"{name}[{i}]", value, 1) for i, value in enumerate(values))
