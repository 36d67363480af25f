# SPDX-License-Identifier: MIT
"""The lines of training as people type them: configuration, model, scheduler and losses, against formulas in float64.

Models of the sizes in these lines are made on the meta device; calls run on the same lines at a small size.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fastdiff.training import (
    AdvancedLossFunctions,
    AdvancedScheduler,
    AdvancedUNet,
    DiffusionConfig,
    DiffusionModel,
    SchedulerType,
)

device = torch.device("cpu")


def enhanced() -> DiffusionConfig:
    return DiffusionConfig(
        image_size=64,
        hidden_size=128,
        num_layers=4,
        num_timesteps=1000,
        scheduler_type=SchedulerType.COSINE,
        prediction_type="epsilon",
    )


def advanced() -> DiffusionConfig:
    return DiffusionConfig(
        in_channels=3,
        out_channels=3,
        model_channels=128,
        num_res_blocks=2,
        attention_resolutions=(8, 16),
        dropout=0.1,
        channel_mult=(1, 2, 4, 8),
        num_heads=8,
        use_spatial_transformer=True,
        transformer_depth=1,
        context_dim=768,
        num_train_timesteps=1000,
        beta_start=0.0001,
        beta_end=0.02,
        beta_schedule="linear",
        prediction_type="epsilon",
        learning_rate=1e-4,
        weight_decay=0.01,
        max_grad_norm=1.0,
        mixed_precision=True,
        gradient_checkpointing=True,
        use_ema=True,
        ema_decay=0.9999,
        loss_type="l2",
        snr_gamma=5.0,
        v_prediction=False,
        num_inference_steps=50,
        guidance_scale=7.5,
        eta=0.0,
    )


def cosine_alphas_cumprod() -> Tensor:
    u = torch.arange(1001, dtype=torch.float64) / 1000
    bar = torch.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
    return (1 - (1 - bar[1:] / bar[:-1]).clamp(max=0.999)).cumprod(0)


def linear_alphas_cumprod() -> Tensor:
    return (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("config", [enhanced(), advanced()], ids=["enhanced", "advanced"])
def test_models_of_full_size(config: DiffusionConfig) -> None:
    with torch.device("meta"):
        model = AdvancedUNet(config)
    assert isinstance(model.unet.down_blocks, nn.ModuleList)
    assert len(model.unet.down_blocks) == 4
    assert isinstance(model.unet.mid_block, nn.Module)
    wide = {"enhanced": (128, 256, 256, 256), "advanced": (128, 256, 512, 1024)}
    assert model.unet.config.block_out_channels == wide["advanced" if config.channel_mult else "enhanced"]
    sides = [hasattr(block, "attentions") for block in model.unet.down_blocks]
    assert sides == [False, False, True, True]  # of 64, 32, 16 and 8 pixels


def test_model_samples_with_its_scheduler() -> None:
    config = replace(enhanced(), image_size=8, hidden_size=32, num_layers=2, num_res_blocks=1)
    model = DiffusionModel(config).double()
    start = torch.Generator().manual_seed(1)
    samples = model.sample(batch_size=4, num_inference_steps=50, use_ddim=True, guidance_scale=7.5, generator=start)
    bars = cosine_alphas_cumprod()
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    visited = list(range(980, -1, -20))
    model.eval()
    with torch.no_grad():
        for t, s in zip(visited, [*visited[1:], None], strict=True):  # arXiv 2010.02502, eq. 12 with η = 0
            here, there = bars[t], torch.tensor(1.0).double() if s is None else bars[s]
            eps = model(x, torch.full((4,), t))["sample"]
            x0 = (x - (1 - here).sqrt() * eps) / here.sqrt()
            x = there.sqrt() * x0 + (1 - there).sqrt() * eps
    assert samples.shape == (4, 3, 8, 8)
    # The U-Net computes its time embedding in float32 and amplifies a step's rounding.
    torch.testing.assert_close(samples, x, rtol=1e-6, atol=1e-6 * float(x.abs().max()))

    images, timesteps = torch.randn(4, 3, 8, 8, dtype=torch.float64), torch.tensor([0, 10, 500, 999])
    noisy, noise = model.scheduler.add_noise(images, timesteps)
    bar = bars[timesteps].reshape(-1, 1, 1, 1)
    torch.testing.assert_close(noisy, bar.sqrt() * images + (1 - bar).sqrt() * noise, rtol=1e-9, atol=1e-9)
    velocity = model.scheduler.get_velocity(x_start=images, noise=noise, timesteps=timesteps)
    torch.testing.assert_close(velocity, bar.sqrt() * noise - (1 - bar).sqrt() * images, rtol=1e-9, atol=1e-9)


def test_advanced_model_and_scheduler() -> None:
    config = replace(advanced(), image_size=16, model_channels=32, channel_mult=(1, 2), num_res_blocks=1)
    model = AdvancedUNet(config)
    sample, timestep, encoder_hidden_states = torch.randn(2, 3, 16, 16), torch.tensor([3, 700]), torch.randn(2, 7, 768)
    output = model(sample, timestep, encoder_hidden_states)["sample"]
    assert output.shape == sample.shape
    assert output.requires_grad
    model._init_weights()

    scheduler = AdvancedScheduler(config)
    samples, timesteps = torch.randn(2, 3, 16, 16), torch.tensor([500, 500])
    noisy = scheduler.add_noise(samples, timesteps)
    assert noisy.shape == samples.shape
    bars = linear_alphas_cumprod()
    # Noise of mean 0 and variance 1, 1536 numbers of it.
    noise = (noisy - bars[500].sqrt() * samples) / (1 - bars[500]).sqrt()
    assert float(noise.std()) == pytest.approx(1.0, abs=0.15)
    output = torch.randn_like(noisy)
    found = scheduler.step(output, 500, noisy).prev_sample  # to 499
    x0 = (noisy - (1 - bars[500]).sqrt() * output) / bars[500].sqrt()
    expected = bars[499].sqrt() * x0 + (1 - bars[499]).sqrt() * output
    torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-5)  # float32 beside float64

    scheduler.set_timesteps(50, device=device)
    latents = torch.randn(1, 3, 4, 4, dtype=torch.float64)
    latents = latents * scheduler.init_noise_sigma
    x = latents
    for t in scheduler.timesteps:
        noise_pred = 0.1 * latents
        latents = scheduler.step(noise_pred, t, latents).prev_sample
    visited = list(range(980, -1, -20))
    assert scheduler.timesteps.tolist() == visited
    for now, then in zip(visited, [*visited[1:], None], strict=True):
        here, there = bars[now], torch.tensor(1.0).double() if then is None else bars[then]
        x = there.sqrt() * (x - (1 - here).sqrt() * 0.1 * x) / here.sqrt() + (1 - there).sqrt() * 0.1 * x
    torch.testing.assert_close(latents, x, rtol=1e-9, atol=1e-9)


def test_losses() -> None:
    pred, target, noise = torch.randn(3, 4, 3, 8, 8, dtype=torch.float64).unbind()
    timesteps = torch.tensor([0, 100, 500, 999])
    residual = pred - target
    assert float(AdvancedLossFunctions.l2_loss(pred, target)) == pytest.approx(float((residual**2).mean()))
    assert float(AdvancedLossFunctions.l1_loss(pred, target)) == pytest.approx(float(residual.abs().mean()))
    huber = ((residual**2 + 0.001**2).sqrt() - 0.001).mean()
    assert float(AdvancedLossFunctions.huber_loss(pred, target, c=0.001)) == pytest.approx(float(huber))
    alpha_bar = linear_alphas_cumprod()[timesteps]
    snr = alpha_bar / (1 - alpha_bar)
    weighted = (snr.clamp(max=5.0) / snr * (residual**2).mean((1, 2, 3))).mean()
    with pytest.warns(UserWarning, match="DDPM's is assumed"):
        found = AdvancedLossFunctions.snr_loss(pred, target, noise, timesteps, gamma=5.0)
    assert float(found) == pytest.approx(float(weighted))
    found = AdvancedLossFunctions.v_prediction_loss(pred, target, alpha_bar)
    assert float(found) == pytest.approx(float((residual**2).mean()))  # the target is v
    found = AdvancedLossFunctions.v_prediction_loss(pred, target, alpha_bar, noise)
    bar = alpha_bar.reshape(-1, 1, 1, 1)
    v = bar.sqrt() * noise - (1 - bar).sqrt() * target
    assert float(found) == pytest.approx(float(((pred - v) ** 2).mean()))


def test_configuration_changes_and_goes_to_json(tmp_path: Path) -> None:
    config = advanced()
    config.snr_gamma = 5.0
    config.v_prediction = True
    with pytest.raises(ValueError, match="v_prediction is True beside prediction_type 'epsilon'"):
        config.validate()
    config.prediction_type = "v_prediction"
    with (tmp_path / "config.json").open("w") as file:
        json.dump(asdict(config), file)
    with (tmp_path / "config.json").open() as file:
        read = DiffusionConfig(**json.load(file))
    assert read == config
    assert read.validate() == config.validate()
    assert AdvancedScheduler(read).config.prediction_type == "v_prediction"
    enhanced_again = DiffusionConfig(**json.loads(json.dumps(asdict(enhanced()))))
    assert enhanced_again.validate().scheduler_type is SchedulerType.COSINE
