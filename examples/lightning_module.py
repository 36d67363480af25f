# SPDX-License-Identifier: MIT
"""LightningModule that trains a digits model and samples from it, with one noise schedule for both.

Run it with ``python examples/lightning_module.py --max-steps 300``; it writes ``lightning_digits.png``.
Needs lightning and scikit-learn.
"""

from __future__ import annotations

import argparse

import lightning
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import fastdiff
from fastdiff import ops
from fastdiff.analysis.images import save_grid
from fastdiff.digits import NULL_CLASS, DigitUNet
from fastdiff.noise import sample_seeds
from fastdiff.training import digits_dataset, draw_timesteps


class DiffusionModule(lightning.LightningModule):
    """v-prediction on images and labels; samples one image of each class after each validation."""

    def __init__(self, steps: int = 20, dropped_labels: float = 0.1) -> None:
        super().__init__()
        self.model = DigitUNet()
        self.dropped_labels = dropped_labels
        self.sampling_manager = fastdiff.create_advanced_sampling_manager(
            schedule_type="cosine",
            method="dpm_solver",
            prediction_type="v_prediction",
            num_inference_steps=steps,
            guidance_scale=3.0,
        )
        self.samples: Tensor | None = None

    def loss(self, batch: list[Tensor], epoch: int) -> Tensor:
        images, labels, numbers = batch
        schedule = self.sampling_manager.scheduler
        # All draws belong to (seed, number of the digit, epoch): they are the same in any batch and on any device.
        seeds = sample_seeds(0, numbers, epoch)
        timesteps = draw_timesteps(len(images), schedule.num_train_timesteps, seeds=seeds)
        # Labels are dropped now and then, so that the model learns the unconditional output of guidance too.
        dropped = torch.rand(labels.shape, device=labels.device) < self.dropped_labels
        noisy = ops.add_noise(images, timesteps, schedule, seeds=seeds)
        output = self.model(noisy, timesteps, torch.where(dropped, NULL_CLASS, labels))
        # The noise is drawn again from the seeds in the pass of the loss, and neither it nor the target is stored.
        return ops.diffusion_loss(output, images, timesteps, schedule, "v_prediction", seeds=seeds)

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        loss = self.loss(batch, self.current_epoch)
        self.log("loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: list[Tensor], _: int) -> None:
        self.log("validation_loss", self.loss(batch, 2**32), prog_bar=True)  # an epoch that training does not reach

    def on_validation_epoch_end(self) -> None:
        labels = torch.arange(10, device=self.device)
        latents = fastdiff.randn((10, 1, 8, 8), fastdiff.spawn_seeds(0, 10), device=self.device)
        unlabelled = torch.full_like(labels, NULL_CLASS)
        self.samples = self.sampling_manager.sample(self.model, latents, labels, unlabelled, progress=False).samples

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=2e-3)


def loader(*, train: bool) -> DataLoader[tuple[Tensor, ...]]:
    """Return batches of 128 digits with labels and numbers."""
    images, labels = digits_dataset(train=train).tensors
    dataset = TensorDataset(images, labels, torch.arange(len(images)))
    return DataLoader(dataset, batch_size=128, shuffle=train, drop_last=train)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--max-steps", type=int, default=300)
    arguments = parser.parse_args()
    lightning.seed_everything(0, verbose=False)
    module = DiffusionModule()
    trainer = lightning.Trainer(
        max_steps=arguments.max_steps,
        accelerator="auto",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=arguments.max_steps > 50,
        num_sanity_val_steps=0,
        check_val_every_n_epoch=None,
        val_check_interval=min(100, arguments.max_steps),
    )
    trainer.fit(module, loader(train=True), loader(train=False))
    assert module.samples is not None
    save_grid(module.samples, "lightning_digits.png", columns=10, scale=6)
    print(f"validation loss {float(trainer.callback_metrics['validation_loss']):.4f}; wrote lightning_digits.png")


if __name__ == "__main__":
    main()
