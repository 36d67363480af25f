# SPDX-License-Identifier: MIT
"""Pictures from prompts: by pipelines of diffusers and by models of the training."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
image_module = pytest.importorskip("PIL.Image")

from fastdiff.diffusers import FusedScheduler  # noqa: E402
from fastdiff.training import (  # noqa: E402
    AdvancedDiffusionPipeline,
    AdvancedDiffusionTrainer,
    AdvancedUNet,
    DiffusionConfig,
    DiffusionModel,
    SmallTextEncoder,
)
from fastdiff.training.pictures.conversion import from_picture, to_picture  # noqa: E402
from support.pipeline_cases import SIZE, stable_diffusion_3, unconditional, unet, vae  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:DiffusionConfig:UserWarning")  # sizes below the usual ones

PROMPTS = {"prompt": "a red cat", "negative_prompt": "fog"}
SHORT = {"num_inference_steps": 3, "guidance_scale": 4.0}


@pytest.fixture
def text_to_image(tmp_path):
    """Return a Stable Diffusion pipeline with a tokenizer of letters, all of it small and random."""
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: number for number, word in enumerate(words)}
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = transformers.CLIPTokenizer(
        str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"), model_max_length=16
    )
    torch.manual_seed(0)
    encoder = transformers.CLIPTextModel(
        transformers.CLIPTextConfig(
            vocab_size=len(words), hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
            max_position_embeddings=16, bos_token_id=len(words) - 2, eos_token_id=len(words) - 1,
        )
    )  # fmt: skip
    pipe = diffusers.StableDiffusionPipeline(
        vae=vae(), text_encoder=encoder, tokenizer=tokenizer, unet=unet(), safety_checker=None, feature_extractor=None,
        scheduler=diffusers.DDIMScheduler(clip_sample=False, steps_offset=1), requires_safety_checker=False,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def far(first: Any, second: Any) -> int:
    """Return the largest difference of two pictures, in levels of 255."""
    assert (first.size, first.mode) == (second.size, second.mode)
    return int(np.abs(np.asarray(first, dtype=np.int32) - np.asarray(second, dtype=np.int32)).max())


def test_pictures_of_pipeline_and_folder_are_those_of_diffusers(text_to_image, tmp_path):
    size = {"width": SIZE, "height": SIZE}
    seeded = lambda: torch.Generator().manual_seed(5)  # noqa: E731
    expected = text_to_image(**PROMPTS, **SHORT, **size, generator=seeded()).images[0]
    varying = diffusers.AutoPipelineForImage2Image.from_pipe(text_to_image)
    varying.set_progress_bar_config(disable=True)
    varied = varying(**PROMPTS, **SHORT, image=expected, strength=0.7, generator=seeded()).images[0]
    assert far(expected, varied) > 1
    text_to_image.save_pretrained(tmp_path / "pipe")
    loaded = AdvancedDiffusionPipeline(tmp_path / "pipe")
    loaded.pipe.set_progress_bar_config(disable=True)
    for pipeline in (loaded, AdvancedDiffusionPipeline(text_to_image)):
        assert isinstance(pipeline.pipe.scheduler, FusedScheduler)
        image = pipeline.generate_image(**PROMPTS, **SHORT, **size, seed=5)
        assert far(image, expected) <= 1  # one level: a fused step rounds once
        # From diffusers' own picture: a level there would be another input.
        assert far(pipeline.generate_variations(expected, strength=0.7, **PROMPTS, **SHORT, seed=5), varied) <= 1
    short = DiffusionConfig(num_inference_steps=3, guidance_scale=4.0)
    configured = AdvancedDiffusionPipeline(text_to_image, config=short)
    assert far(configured.generate_image(**PROMPTS, **size, seed=5), expected) <= 1


def processors(model: Any) -> set[str]:
    return {type(processor).__name__ for processor in model.attn_processors.values()}


def test_memory_options_reach_diffusers_or_are_refused(text_to_image):
    pipeline = AdvancedDiffusionPipeline(
        text_to_image, config=DiffusionConfig(use_attention_slicing=True, use_vae_slicing=True)
    )
    assert processors(text_to_image.unet) == {"SlicedAttnProcessor"}
    assert text_to_image.vae.use_slicing
    pipeline.enable_memory_efficient_attention()
    assert processors(text_to_image.unet) == {"AttnProcessor2_0"}
    text_to_image.vae.disable_slicing()
    missing = DiffusionConfig(use_attention_slicing=True, use_vae_slicing=True, use_xformers=True)
    with pytest.raises((ImportError, ValueError), match="AdvancedDiffusionPipeline: xFormers needs"):
        AdvancedDiffusionPipeline(text_to_image, config=missing)
    assert processors(text_to_image.unet) == {"AttnProcessor2_0"}  # nothing was turned on
    assert not text_to_image.vae.use_slicing
    if torch.accelerator.current_accelerator(check_available=True) is None:
        with pytest.raises(ValueError, match="CPU offload needs an accelerator"):
            pipeline.enable_cpu_offload()
    transformer = AdvancedDiffusionPipeline(
        stable_diffusion_3(diffusers.StableDiffusion3Pipeline)(diffusers.FlowMatchEulerDiscreteScheduler())
    )
    with pytest.raises(ValueError, match=r"attention slicing does not exist for a StableDiffusion3Pipeline"):
        transformer.enable_attention_slicing()
    transformer.enable_memory_efficient_attention()


def test_arguments_that_do_not_fit_are_refused(text_to_image):
    pipeline = AdvancedDiffusionPipeline(text_to_image)
    picture = image_module.new("RGB", (SIZE, SIZE))
    for error, message, call in (
        (ValueError, "generate_image: output_type is given", lambda: pipeline.generate_image("a", output_type="np")),
        (ValueError, "generate_image: fog is given", lambda: pipeline.generate_image("a", fog=1)),
        (TypeError, "generate_image: prompt is a list", lambda: pipeline.generate_image(["a", "b"])),
        (ValueError, "generate_variations: strength", lambda: pipeline.generate_variations(picture, "a", strength=0.0)),
        (TypeError, "generate_variations: image is a Tensor", lambda: pipeline.generate_variations(torch.ones(3), "a")),
        (ValueError, "takes no prompt", lambda: AdvancedDiffusionPipeline(
            unconditional(diffusers.DDPMPipeline)(diffusers.DDPMScheduler()))),
        (ValueError, "method is given", lambda: AdvancedDiffusionPipeline(text_to_image, method="ddim")),
        (TypeError, "source is a int", lambda: AdvancedDiffusionPipeline(3)),
        (FileNotFoundError, "which does not exist", lambda: AdvancedDiffusionPipeline("no/such/folder")),
    ):  # fmt: skip
        with pytest.raises(error, match=message):
            call()


class KnownImages(nn.Module):
    """The exact ε of one clean image a label: x0 is the image whatever the noise."""

    def __init__(self, images: Tensor, alphas_cumprod: Tensor) -> None:
        super().__init__()
        self.images, self.alphas_cumprod = nn.Parameter(images), alphas_cumprod

    def forward(self, sample: Tensor, timestep: Tensor, labels: Tensor | None = None) -> Tensor:
        clean = self.images[torch.zeros(len(sample), dtype=torch.int64) if labels is None else labels]
        signal = self.alphas_cumprod[timestep.to(torch.int64)].to(sample.dtype).reshape(-1, 1, 1, 1)
        return (sample - signal.sqrt() * clean) / (1 - signal).sqrt()


def test_model_picture_is_the_guided_image():
    """x0 of guided ε is u + w·(c − u), for the same sample under both conditions."""
    config = DiffusionConfig(image_size=8, num_layers=1, num_inference_steps=4)
    cond, uncond = torch.rand(2, 3, 8, 8) * 0.8 - 0.4
    alphas_cumprod = DiffusionModel(config, unet=nn.Identity()).scheduler.alphas_cumprod
    model = DiffusionModel(config, unet=KnownImages(torch.stack([uncond, cond]), alphas_cumprod))
    labels = lambda prompts: torch.tensor([prompt == "cond" for prompt in prompts]).to(torch.int64)  # noqa: E731
    guided = (uncond.double() + 1.5 * (cond.double() - uncond.double())).clamp(-1, 1)
    levels = ((guided + 1) * 127.5).round().permute(1, 2, 0).numpy()
    start = to_picture(torch.rand(3, 8, 8) * 2 - 1)
    for method in ("ddim", "dpm_solver"):
        pipeline = AdvancedDiffusionPipeline(model, text_encoder=labels, method=method)
        for image in (
            pipeline.generate_image("cond", guidance_scale=1.5),
            pipeline.generate_variations(start, "cond", guidance_scale=1.5, strength=0.5),
        ):
            # One level: float32 rounds at a half.
            assert np.abs(np.asarray(image, dtype=np.float64) - levels).max() <= 1
        # int(0.2·4) steps are none: the picture comes back.
        assert far(pipeline.generate_variations(start, "cond", strength=0.2), start) == 0
    with pytest.raises(ValueError, match="prompt is given to a model without a text encoder"):
        AdvancedDiffusionPipeline(model).generate_image("cond")
    with pytest.raises(ValueError, match="VAE slicing does not exist for the model"):
        pipeline.enable_vae_slicing()


@pytest.mark.parametrize("method", [None, "ddim", "ddpm"])
def test_learned_variance_is_that_of_ddpm_pictures(method):
    config = DiffusionConfig(
        image_size=8, in_channels=1, out_channels=2, model_channels=32, channel_mult=(1,), num_res_blocks=1,
        num_heads=4, attention_resolutions=(), num_inference_steps=3, sampling_method="ddpm",
    )  # fmt: skip
    model = DiffusionModel(config)
    pipeline = AdvancedDiffusionPipeline(model, method=method)
    expected = model.sample(1, method=method, seeds=[7], progress=False)[0]
    assert far(pipeline.generate_image(seed=7), to_picture(expected)) == 0
    assert pipeline.generate_variations(to_picture(expected), strength=0.7, seed=7).size == (8, 8)


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_pictures_and_samples_go_both_ways(channels):
    levels = torch.randint(256, (channels, 5, 7))
    picture = to_picture(levels / 127.5 - 1)
    assert np.array_equal(np.asarray(picture).reshape(5, 7, channels), levels.permute(1, 2, 0).numpy())
    assert torch.allclose(from_picture(picture, channels), levels / 127.5 - 1, atol=1e-6)  # rounding in float32


GUIDE = {
    "in_channels": 3, "out_channels": 3, "model_channels": 8, "num_res_blocks": 1, "attention_resolutions": (8,),
    "dropout": 0.1, "channel_mult": (1, 2), "num_heads": 2, "use_spatial_transformer": True, "transformer_depth": 1,
    "context_dim": 16, "num_train_timesteps": 1000, "beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear",
    "image_size": 16,
}  # fmt: skip


def test_configuration_alone_gives_pictures_of_random_weights(tmp_path):
    with pytest.warns(UserWarning, match="the weights are random"):
        pipeline = AdvancedDiffusionPipeline(DiffusionConfig(**GUIDE))
    image = pipeline.generate_image(
        prompt="a cat", negative_prompt="fog", num_inference_steps=2, guidance_scale=7.5, width=24, height=16
    )
    image.save(tmp_path / "image.png")
    assert image_module.open(tmp_path / "image.png").size == (24, 16)
    variation = pipeline.generate_variations(
        image=image, prompt="a dog", num_inference_steps=2, guidance_scale=7.5, strength=0.8
    )
    assert (variation.size, variation.mode) == ((24, 16), "RGB")
    pipeline.enable_attention_slicing()
    assert processors(pipeline.model.unet.unet) == {"SlicedAttnProcessor"}
    with pytest.raises(ValueError, match="CPU offload does not exist"):
        pipeline.enable_cpu_offload()


def test_trained_model_gives_pictures_from_trainer_and_checkpoint(tmp_path):
    config = DiffusionConfig(**GUIDE, num_inference_steps=2, guidance_scale=3.0)
    torch.manual_seed(0)
    trainer = AdvancedDiffusionTrainer(AdvancedUNet(config), config)
    trainer.train_step({"images": torch.rand(2, 3, 16, 16), "prompts": ["a cat", "a dog"]})
    trainer.save_checkpoint(tmp_path / "step-00000001")
    images = [AdvancedDiffusionPipeline(source).generate_image("a cat", seed=3) for source in (trainer, tmp_path)]
    assert far(*images) == 0
    with trainer.averaged_weights() as modules:
        encode = lambda text: modules.text_encoder([text]).detach()  # noqa: E731
        model = DiffusionModel(config, modules.model)
        samples = model.sample(1, prompt_embeds=encode("a cat"), negative_prompt_embeds=encode(""), seeds=[3])
    levels = ((samples[0].clamp(-1, 1) + 1) * 127.5).round().permute(1, 2, 0).numpy()
    assert np.array_equal(np.asarray(images[0]), levels)
    assert isinstance(trainer.modules.text_encoder, SmallTextEncoder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"has no state\.json"):
        AdvancedDiffusionPipeline(tmp_path / "empty")
