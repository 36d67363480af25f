# SPDX-License-Identifier: MIT
"""Models of a `DiffusionConfig`: diffusers' U-Nets with its sizes, and one with its scheduler that samples."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...errors import checked_integer, checked_type, error_message, require
from ...noise.generators import Generators, draw
from ...ops import randn
from ...philox import as_seeds
from ...row_layout import compute_dtype
from ...samplers import BaseSampler
from ...schedules.betas import check_floating
from ..config import DiffusionConfig
from .sampling import model_for_sampler
from .scheduler import DiffusionScheduler

__all__ = ["AdvancedUNet", "DiffusionModel"]

_NORMS = (nn.GroupNorm, nn.LayerNorm)


class AdvancedUNet(nn.Module):
    """A U-Net of diffusers with the sizes of a configuration.

    With `use_spatial_transformer` it is a `UNet2DConditionModel`, conditioned on embeddings by cross-attention; else a
    `UNet2DModel`.  Group norms have at least 4 channels a group, at most 32 groups.

    Memory options of the configuration are passed to diffusers: gradient checkpointing, attention slicing,
    memory-efficient attention (torch's), xFormers; where several of the last three are set, the last named computes the
    attention.  VAE slicing and CPU offload belong to a pipeline.

    Args:
        config: settled here; later changes of it do not reach the model.

    Attributes:
        config: the settled configuration.
        unet: diffusers' model.

    Raises:
        ImportError: diffusers, or xFormers where it is asked for, is missing.
        TypeError, ValueError: the configuration is refused, or a memory option does not exist for this U-Net.
    """

    def __init__(self, config: DiffusionConfig) -> None:
        super().__init__()
        checked_type(
            "AdvancedUNet", "config", config, DiffusionConfig, "a DiffusionConfig", "pass DiffusionConfig(...)"
        )
        self.config = config.validate()
        self.unet = _make_unet(self.config)
        self._init_weights()
        if self.config.gradient_checkpointing:
            self.unet.enable_gradient_checkpointing()
        _choose_attention(self.unet, self.config)

    def _init_weights(self) -> None:
        """Initialize: Xavier for linear layers, Kaiming for convolutions, ones for norms, zeros for biases."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
            elif isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            elif isinstance(module, _NORMS) and module.weight is not None:
                nn.init.ones_(module.weight)
            else:
                continue
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(
        self, sample: Tensor, timestep: Tensor | float, encoder_hidden_states: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Predict.

        Args:
            sample: noisy samples ``[B, in_channels, H, W]``, H and W divisible like `image_size`.
            timestep: one number, or ``[B]``.
            encoder_hidden_states: the condition ``[B, tokens, context_dim]`` of a spatial transformer.  None is the
                null condition, zeros, whose result does not depend on the number of tokens.

        Returns:
            ``{"sample": prediction}``, ``[B, out_channels, H, W]``.

        Raises:
            TypeError, ValueError: a tensor does not fit.
        """
        config = self.config
        check_floating("AdvancedUNet", "sample", sample)
        multiple = 2 ** (len(config.channel_mult) - 1)
        if sample.dim() != 4 or sample.shape[1] != config.in_channels or any(s % multiple for s in sample.shape[2:]):
            got = f"has shape {list(sample.shape)}"
            expected = f"[B, {config.in_channels}, H, W] with H and W multiples of {multiple}"
            raise ValueError(error_message("AdvancedUNet", "sample", got, expected, "reshape or pad it"))
        if not config.use_spatial_transformer:
            if encoder_hidden_states is not None:
                remedy = "set use_spatial_transformer=True, or leave it out"
                expected = "None: this U-Net has no cross-attention"
                raise ValueError(error_message("AdvancedUNet", "encoder_hidden_states", "is given", expected, remedy))
            return {"sample": self.unet(sample, timestep).sample}
        if encoder_hidden_states is None:
            encoder_hidden_states = sample.new_zeros(len(sample), 1, config.context_dim)
        shape = list(encoder_hidden_states.shape)
        if len(shape) != 3 or shape[0] != len(sample) or shape[2] != config.context_dim:
            expected = f"[{len(sample)}, tokens, {config.context_dim}]"
            remedy = "pass the text encoder's hidden states, or set context_dim to their width"
            raise ValueError(
                error_message("AdvancedUNet", "encoder_hidden_states", f"has shape {shape}", expected, remedy)
            )
        return {"sample": self.unet(sample, timestep, encoder_hidden_states=encoder_hidden_states).sample}


def _make_unet(config: DiffusionConfig) -> Any:
    """Make diffusers' model of a settled configuration."""
    models = require("diffusers", "diffusers", "AdvancedUNet")
    cross = config.use_spatial_transformer
    attended = "CrossAttn{}Block2D" if cross else "Attn{}Block2D"
    down = tuple(attended.format("Down") if level else "DownBlock2D" for level in config.attention_levels)
    up = tuple(attended.format("Up") if level else "UpBlock2D" for level in reversed(config.attention_levels))
    widths = config.block_out_channels
    shared = {
        "sample_size": config.image_size,
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "block_out_channels": widths,
        "layers_per_block": config.num_res_blocks,
        "dropout": config.dropout,
        "norm_num_groups": _norm_groups(config.model_channels),
    }
    if cross:
        return models.UNet2DConditionModel(
            **shared,
            down_block_types=down,
            up_block_types=up,
            cross_attention_dim=config.context_dim,
            transformer_layers_per_block=config.transformer_depth,
            attention_head_dim=config.num_heads,  # diffusers takes the number of heads under this name
        )
    # The size of a head, one for all levels: the number of heads is that of the narrowest level with attention.
    with_attention = [width for width, level in zip(widths, config.attention_levels, strict=True) if level]
    narrowest = min([*with_attention, widths[-1]])
    return models.UNet2DModel(
        **shared, down_block_types=down, up_block_types=up, attention_head_dim=narrowest // config.num_heads
    )


def _norm_groups(channels: int) -> int:
    """Return the largest number of groups up to 32, a power of 2, that gives each at least 4 channels."""
    return next(groups for groups in (32, 16, 8, 4, 2, 1) if channels % groups == 0 and channels // groups >= 4)


def attention_layers(part: nn.Module) -> list[Any]:
    """Return the attention layers of a model of diffusers; a `UNet2DModel` has no `set_attn_processor` for them all."""
    return [module for module in part.modules() if hasattr(module, "set_processor")]


def _choose_attention(unet: Any, config: DiffusionConfig) -> None:
    """Pass the configuration's attention options to diffusers' own methods."""
    if config.use_attention_slicing:
        if not hasattr(unet, "set_attention_slice"):
            got = f"is set for a {type(unet).__name__}, which has no set_attention_slice"
            remedy = "set use_memory_efficient_attention instead"
            raise ValueError(
                error_message("AdvancedUNet", "use_attention_slicing", got, "use_spatial_transformer=True", remedy)
            )
        unet.set_attention_slice("auto")
    if config.use_memory_efficient_attention:
        processors = require("diffusers.models.attention_processor", "diffusers", "AdvancedUNet")
        for layer in attention_layers(unet):
            layer.set_processor(processors.AttnProcessor2_0())
    if config.use_xformers:
        try:
            unet.enable_xformers_memory_efficient_attention()
        except (ImportError, ValueError) as error:
            got, remedy = (
                f"is refused by diffusers ({error})",
                "install xformers, or set use_memory_efficient_attention",
            )
            message = error_message("AdvancedUNet", "use_xformers", got, "the package xformers and a GPU", remedy)
            raise type(error)(message) from error


class DiffusionModel(nn.Module):
    """A U-Net with its noise schedule, which samples.

    Args:
        config: settled here.
        unet: a model of one's own instead of an `AdvancedUNet`: called as that is, and returning a tensor, a tuple, a
            dict with "sample" or an object with ``.sample``.

    Attributes:
        config: the settled configuration.
        unet: the model.
        scheduler: a `DiffusionScheduler`.

    Raises:
        ImportError, TypeError, ValueError: as `AdvancedUNet`.
    """

    def __init__(self, config: DiffusionConfig, unet: nn.Module | None = None) -> None:
        super().__init__()
        self.scheduler = DiffusionScheduler(config)
        self.config = self.scheduler.config
        self.unet = AdvancedUNet(self.config) if unet is None else unet

    def forward(self, sample: Tensor, timestep: Tensor | float, encoder_hidden_states: Tensor | None = None) -> Any:
        """Call the U-Net; see `AdvancedUNet.forward`."""
        if encoder_hidden_states is None:
            return self.unet(sample, timestep)
        return self.unet(sample, timestep, encoder_hidden_states)

    def for_sampler(self, sampler: BaseSampler) -> nn.Module:
        """Return the model with the output that a sampler takes; see `model_for_sampler`."""
        return model_for_sampler(self, self.config, sampler)

    def sample(
        self,
        batch_size: int = 1,
        num_inference_steps: int | None = None,
        use_ddim: bool | None = None,
        guidance_scale: float | None = None,
        *,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        method: str | None = None,
        generator: Generators = None,
        seeds: Any = None,
        progress: bool | None = None,
    ) -> Tensor:
        """Draw samples, in evaluation mode and without gradients.

        Args:
            batch_size: B.
            num_inference_steps: the configuration's where None.
            use_ddim: True for DDIM, False for DDPM, None for the configuration's `sampling_method`; see
                `fastdiff.training.model.sampling.configured_sampler`.
            guidance_scale: the configuration's where None.  It applies where there are `prompt_embeds`; samples without
                a condition are not guided.
            prompt_embeds: the condition ``[B, tokens, context_dim]``.
            negative_prompt_embeds: of the unconditional call of guidance; zeros where None, the null condition.
            method: a name of `fastdiff.SamplingMethod` instead of `use_ddim`.
            generator: of all noise, one or one a sample.
            seeds: instead of it, a seed for each sample: it then comes out the same in any batch.
            progress: show a progress bar; None shows it where tqdm is installed.

        Returns:
            ``[B, in_channels, image_size, image_size]``, float32 (float64 for a float64 model).

        Raises:
            TypeError, ValueError: an argument does not fit.
        """
        checked_integer("DiffusionModel.sample", "batch_size", batch_size, 1)
        if method is None and use_ddim is not None:
            method = "ddim" if use_ddim else "ddpm"
        config, sampler = self.config, self.scheduler.sampler(method, num_inference_steps)
        place = next(self.parameters())
        dtype = compute_dtype(place.dtype)
        shape = batch_size, config.in_channels, config.image_size, config.image_size
        if seeds is not None:
            seeds = as_seeds(seeds, batch_size, place.device)
            latents = randn(shape, seeds, dtype=dtype)
        else:
            latents = draw(shape, generator, dtype=dtype, device=place.device)
        if prompt_embeds is not None and negative_prompt_embeds is None:
            negative_prompt_embeds = torch.zeros_like(prompt_embeds)
        return sampler.sample(
            self.for_sampler(sampler),
            latents * sampler.init_noise_sigma,
            prompt_embeds,
            negative_prompt_embeds,
            guidance_scale=guidance_scale,
            generator=generator,
            seeds=seeds,
            progress=progress,
            model_dtype=None if place.dtype == dtype else place.dtype,
        ).samples
