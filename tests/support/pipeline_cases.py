# SPDX-License-Identifier: MIT
"""Pipelines of diffusers with small random weights, and the arguments that they are called with."""

import functools

import diffusers
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)

SIZE = 32


def embeddings(*shapes, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def picture():
    """Return a picture of the given size, in [0, 1]."""
    return torch.rand(1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(3))


def vae(**config):
    settings = {"latent_channels": 4, "block_out_channels": (4, 8), "norm_num_groups": 2, "sample_size": SIZE}
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, **(settings | config)
    )


def unconditional(pipeline):
    return lambda scheduler: pipeline(
        diffusers.UNet2DModel(
            sample_size=16, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        ),
        scheduler,
    )  # fmt: skip


def unet(in_channels=4, **config):
    settings = {"block_out_channels": (4, 8), "layers_per_block": 1, "norm_num_groups": 2, "cross_attention_dim": 32}
    return diffusers.UNet2DConditionModel(
        sample_size=SIZE // 2, in_channels=in_channels, out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        **(settings | config),
    )  # fmt: skip


def stable_diffusion(pipeline, in_channels=4):
    return lambda scheduler: pipeline(
        vae=vae(), text_encoder=None, tokenizer=None, unet=unet(in_channels), scheduler=scheduler, safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def text(**more):
    """Return the arguments for a pipeline like Stable Diffusion's, without a tokenizer."""
    prompt, negative = embeddings((1, 7, 32), (1, 7, 32))
    return {"prompt_embeds": prompt, "negative_prompt_embeds": negative, "guidance_scale": 6.0} | more


def stable_diffusion_xl(scheduler):
    model = unet(
        cross_attention_dim=64, attention_head_dim=(2, 4), use_linear_projection=True, addition_embed_type="text_time",
        addition_time_embed_dim=8, transformer_layers_per_block=(1, 2), projection_class_embeddings_input_dim=80,
    )  # fmt: skip
    return diffusers.StableDiffusionXLPipeline(
        vae=vae(), text_encoder=None, text_encoder_2=None, tokenizer=None, tokenizer_2=None, unet=model,
        scheduler=scheduler, add_watermarker=False,
    )  # fmt: skip


def pooled(length, width, **more):
    prompt, negative, of_prompt, of_negative = embeddings((1, 7, width), (1, 7, width), (1, length), (1, length))
    return {
        "prompt_embeds": prompt, "negative_prompt_embeds": negative, "pooled_prompt_embeds": of_prompt,
        "negative_pooled_prompt_embeds": of_negative, "guidance_scale": 5.0, "height": SIZE, "width": SIZE,
    } | more  # fmt: skip


def stable_diffusion_3(pipeline):
    def make(scheduler):
        transformer = diffusers.SD3Transformer2DModel(
            sample_size=SIZE // 2, patch_size=1, in_channels=4, num_layers=1, attention_head_dim=8,
            num_attention_heads=4, caption_projection_dim=32, joint_attention_dim=32, pooled_projection_dim=64,
            out_channels=4,
        )  # fmt: skip
        return pipeline(
            transformer=transformer, scheduler=scheduler, vae=vae(shift_factor=0.06, scaling_factor=1.5),
            text_encoder=None, tokenizer=None, text_encoder_2=None, tokenizer_2=None, text_encoder_3=None,
            tokenizer_3=None,
        )  # fmt: skip

    return make


def flux(scheduler):
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8), guidance_embeds=True,
    )  # fmt: skip
    return diffusers.FluxPipeline(
        scheduler=scheduler, vae=vae(latent_channels=1, shift_factor=0.0, scaling_factor=1.5), text_encoder=None,
        tokenizer=None, text_encoder_2=None, tokenizer_2=None, transformer=transformer,
    )  # fmt: skip


def flux_text():
    prompt, of_prompt = embeddings((1, 7, 32), (1, 32))
    return {"prompt_embeds": prompt, "pooled_prompt_embeds": of_prompt, "height": SIZE, "width": SIZE}


def wan(scheduler):
    transformer = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=16, out_channels=16,
        text_dim=32, freq_dim=32, ffn_dim=32, num_layers=1, cross_attn_norm=True, rope_max_seq_len=32,
    )  # fmt: skip
    autoencoder = diffusers.AutoencoderKLWan(
        base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    )
    return diffusers.WanPipeline(
        tokenizer=None, text_encoder=None, vae=autoencoder, scheduler=scheduler, transformer=transformer
    )


def video_text():
    return text() | {"height": SIZE, "width": SIZE, "num_frames": 9}


def mask():
    """Return a mask that selects the right half for inpainting."""
    half = torch.zeros(1, 1, SIZE, SIZE)
    half[..., SIZE // 2 :] = 1.0
    return half


_SD = diffusers.StableDiffusionPipeline
_IMAGE = diffusers.StableDiffusionImg2ImgPipeline
_PAINT = diffusers.StableDiffusionInpaintPipeline
_FLOW = functools.partial(FlowMatchEulerDiscreteScheduler, shift=3.0)
_SOLVER = functools.partial(DPMSolverMultistepScheduler, algorithm_type="sde-dpmsolver++", use_karras_sigmas=True)
_UNI = functools.partial(
    UniPCMultistepScheduler, prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
)

#: How a pipeline is made from a scheduler, with which scheduler, and what it is called with.
CASES = {
    "DDPM": (unconditional(diffusers.DDPMPipeline), DDPMScheduler, {"num_inference_steps": 12}),
    "DDIM": (unconditional(diffusers.DDIMPipeline), DDIMScheduler, {"num_inference_steps": 12}),
    "DDIM eta 0.7": (
        unconditional(diffusers.DDIMPipeline), DDIMScheduler, {"num_inference_steps": 12, "eta": 0.7},
    ),
    "StableDiffusion PNDM": (stable_diffusion(_SD), functools.partial(PNDMScheduler, skip_prk_steps=True), text()),
    "StableDiffusion DPM++ 2M": (stable_diffusion(_SD), DPMSolverMultistepScheduler, text(guidance_rescale=0.5)),
    "StableDiffusion DPM++ SDE": (stable_diffusion(_SD), _SOLVER, text()),
    "StableDiffusion UniPC": (stable_diffusion(_SD), UniPCMultistepScheduler, text()),
    "StableDiffusion LCM": (stable_diffusion(_SD), LCMScheduler, text(num_inference_steps=4, guidance_scale=1.0)),
    "StableDiffusionXL Euler": (stable_diffusion_xl, EulerDiscreteScheduler, pooled(32, 64)),
    "StableDiffusionXL Euler-a": (stable_diffusion_xl, EulerAncestralDiscreteScheduler, pooled(32, 64)),
    "StableDiffusion3": (stable_diffusion_3(diffusers.StableDiffusion3Pipeline), _FLOW, pooled(64, 32)),
    "StableDiffusion3 Heun": (
        stable_diffusion_3(diffusers.StableDiffusion3Pipeline), FlowMatchHeunDiscreteScheduler, pooled(64, 32),
    ),
    "StableDiffusion3 img2img": (
        stable_diffusion_3(diffusers.StableDiffusion3Img2ImgPipeline), _FLOW,
        pooled(64, 32, image=picture(), strength=0.7),
    ),
    "Flux": (flux, _FLOW, flux_text()),
    "StableDiffusion img2img": (
        stable_diffusion(_IMAGE), DPMSolverMultistepScheduler, text(image=picture(), strength=0.8),
    ),
    "StableDiffusion inpaint": (
        stable_diffusion(_PAINT), DDIMScheduler, text(image=picture(), mask_image=mask(), height=SIZE, width=SIZE),
    ),
    "StableDiffusion inpaint, 9 channels": (
        stable_diffusion(_PAINT, in_channels=9), UniPCMultistepScheduler,
        text(image=picture(), mask_image=mask(), height=SIZE, width=SIZE),
    ),
    "Wan": (wan, _UNI, video_text()),
    "Wan, flow Euler": (wan, _FLOW, video_text()),
}  # fmt: skip
