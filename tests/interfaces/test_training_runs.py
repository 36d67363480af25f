# SPDX-License-Identifier: MIT
"""The lines of trainers and checkpoints as people type them, at a small size."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from fastdiff.training import (
    AdvancedDiffusionTrainer,
    AdvancedUNet,
    DiffusionConfig,
    DiffusionModel,
    DiffusionTrainer,
    SchedulerType,
    load_checkpoint,
    save_checkpoint,
    validate_model,
)

pytest.importorskip("accelerate")
pytest.importorskip("diffusers")
device = torch.device("cpu")


def test_enhanced_guide() -> None:
    config = DiffusionConfig(
        image_size=8,
        hidden_size=32,
        num_layers=2,
        num_timesteps=1000,
        scheduler_type=SchedulerType.COSINE,
        prediction_type="epsilon",
        num_heads=4,
        attention_resolutions=(),
        num_res_blocks=1,
    )
    torch.manual_seed(0)
    model = DiffusionModel(config)
    before = [parameter.detach().clone() for parameter in model.unet.parameters()]
    batch = torch.rand(2, 3, 8, 8) * 2 - 1
    trainer = DiffusionTrainer(model, config)
    metrics = trainer.training_step(batch)
    assert float(metrics["loss"]) > 0
    assert metrics["step"] == 1
    dataloader = DataLoader(torch.rand(4, 3, 8, 8) * 2 - 1, batch_size=2)  # type: ignore[arg-type]
    reports = trainer.train(dataloader)
    assert reports[-1]["step"] == 3
    after = list(model.unet.parameters())
    changed = [not torch.equal(a, b) for a, b in zip(before, after, strict=True)]
    assert sum(changed) > 0.9 * len(changed)


def test_advanced_guide(tmp_path: Path) -> None:
    config = DiffusionConfig(
        image_size=8,
        in_channels=3,
        out_channels=3,
        model_channels=32,
        num_res_blocks=1,
        attention_resolutions=(4,),
        dropout=0.1,
        channel_mult=(1, 2),
        num_heads=4,
        use_spatial_transformer=True,
        transformer_depth=1,
        context_dim=256,
        learning_rate=1e-4,
        weight_decay=0.01,
        max_grad_norm=1.0,
        gradient_checkpointing=True,
        use_ema=True,
        ema_decay=0.9999,
        loss_type="l2",
        snr_gamma=5.0,
        v_prediction=False,
    )
    config.snr_gamma = 5.0
    config.v_prediction = True
    config.prediction_type = "v_prediction"
    torch.manual_seed(0)
    model = AdvancedUNet(config)
    trainer = AdvancedDiffusionTrainer(model, config)
    images = torch.rand(2, 3, 8, 8) * 2 - 1
    metrics = trainer.train_step({"images": images, "prompts": ["a cat", "a dog"]})
    assert float(metrics["loss"]) > 0
    assert metrics["learning_rate"] == 1e-4 / 1000  # after the first of 1000 steps of the warm-up
    val_dataloader = [{"images": images}]
    loss = validate_model(model, val_dataloader, device)
    assert loss == validate_model(model, val_dataloader, device) > 0

    optimizer = torch.optim.AdamW(model.parameters())
    path = save_checkpoint(model, optimizer, 4, loss, tmp_path / "checkpoint")
    other = AdvancedUNet(config)
    assert load_checkpoint(path, other, torch.optim.AdamW(other.parameters())) == {"epoch": 4, "loss": loss}
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
