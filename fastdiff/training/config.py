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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..json_fields import fields_from_json, fields_to_json, parsed_object
from ..schedules import NoiseSchedulerConfig
from .config_checks import (
    SchedulerType,
    settle_model,
    settle_sampling,
    settle_schedule,
    settle_training,
    warn_of_unusual_values,
)

__all__ = ["DiffusionConfig", "SchedulerType"]

#: A field that was left out; typed so that users of a settled configuration need no checks for None.
_NOT_GIVEN: Any = None


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
        timestep_spacing: timesteps that samplers visit, a name that `NoiseSchedulerConfig` takes; ``leading`` if left
            out, and ``trailing`` on a flow schedule.
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
        sampling_method: a name of `fastdiff.SamplingMethod`, the default of samples that are drawn from the model.
            ``fastdiff train --distill`` sets that of the student.
        num_inference_steps, guidance_scale, eta: of sampling; the guidance scale applies where there is a condition,
            and eta where the method is DDIM.
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
    timestep_spacing: str = _NOT_GIVEN

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

    sampling_method: str = "ddim"
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
        settle_schedule(settled)
        settle_model(settled)
        settle_training(settled)
        settle_sampling(settled)
        warn_of_unusual_values(settled)
        return settled

    def noise_scheduler_config(self) -> NoiseSchedulerConfig:
        """Return the configuration of the noise schedule; of a settled configuration."""
        return NoiseSchedulerConfig(
            num_train_timesteps=self.num_train_timesteps,
            beta_start=self.beta_start,
            beta_end=self.beta_end,
            schedule_type=self.beta_schedule,
            clip_sample=self.clip_denoised,
            timestep_spacing=self.timestep_spacing,
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
