# SPDX-License-Identifier: MIT
"""Train a model of handwritten digits from nothing, and measure it as the packaged one is measured.

    python examples/train_digits.py               # a few minutes on two cores
    python examples/train_digits.py --resume      # goes on after an interruption, to the same bits

It writes checkpoints, the loss curve and ``samples.png`` into ``train_digits/``.  The measure is the share of samples
that a classifier, trained on the real digits, reads as the digit that was asked for.
Needs accelerate, diffusers, scikit-learn, safetensors and Pillow.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader

import fastdiff
from fastdiff.analysis.images import save_grid
from fastdiff.digits import NULL_CLASS, DigitUNet
from fastdiff.digits.train import evaluate
from fastdiff.training import DiffusionConfig, Jitter, RunOptions, Trainer, digits_dataset


def make_trainer(steps: int, folder: Path) -> Trainer:
    """Return a trainer whose model, loss and draws follow from the configuration."""
    config = DiffusionConfig(
        image_size=8,
        in_channels=1,
        beta_schedule="cosine",
        prediction_type="v_prediction",
        learning_rate=1e-3,
        lr_warmup_steps=min(100, steps // 10),
        max_train_steps=steps,
        ema_decay=0.999,
        condition_dropout=0.1,  # so that the model learns the unconditional output of guidance too
    )
    options = RunOptions(
        output_dir=str(folder),
        log_every=50,
        checkpoint_every=250,
        validate_every=500,
        progress=True,
    )
    torch.manual_seed(config.seed)
    return Trainer(
        DigitUNet(dropout=config.dropout),
        config,
        options,
        null_label=NULL_CLASS,
        augment=Jitter(0.5),  # half of the images are turned and moved a little
        val_dataloader=DataLoader(digits_dataset(train=False), batch_size=360),
    )


def sample(trainer: Trainer, labels: Tensor, guidance_scale: float, seed: int, steps: int) -> Tensor:
    """Return an image ``[1, 8, 8]`` for each label, by DDIM with the averaged weights."""
    sampler = fastdiff.create_sampler(
        trainer.config.beta_schedule,
        "ddim",
        num_inference_steps=steps,
        timestep_spacing="trailing",
        prediction_type=trainer.config.prediction_type,
        guidance_scale=guidance_scale,
    )
    latents = fastdiff.randn((len(labels), 1, 8, 8), fastdiff.spawn_seeds(seed, len(labels)))
    unlabelled = torch.full_like(labels, NULL_CLASS)
    with trainer.averaged_weights() as model:
        return sampler.sample(model, latents, labels, unlabelled, progress=False).samples


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2500, help="optimizer steps of 128 digits")
    parser.add_argument("--per-class", type=int, default=100, help="samples a digit that are measured")
    parser.add_argument("--guidance", type=float, default=2.0)
    parser.add_argument("--sampling-steps", type=int, default=50)
    parser.add_argument("--out", type=Path, default=Path("train_digits"))
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --out")
    arguments = parser.parse_args()

    trainer = make_trainer(arguments.steps, arguments.out)
    if arguments.resume:
        trainer.load_checkpoint()
    began = time.perf_counter()
    loader = DataLoader(digits_dataset(), batch_size=128, shuffle=True, drop_last=True)
    trainer.train(loader, max_steps=arguments.steps)
    seconds = time.perf_counter() - began

    def draw(labels: Tensor, guidance_scale: float, seed: int) -> Tensor:
        return sample(trainer, labels, guidance_scale, seed, arguments.sampling_steps)

    # `evaluate` is what measured the packaged weights (fastdiff/digits/figures.json).
    figures = evaluate(draw, arguments.guidance, arguments.per_class)
    figures |= {"steps": trainer.step, "training_seconds": round(seconds, 1), "threads": torch.get_num_threads()}
    figures["held_out_loss"] = round(trainer.validate(DataLoader(digits_dataset(train=False), batch_size=360)), 4)
    (arguments.out / "figures.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    columns = min(10, arguments.per_class)
    images = draw(torch.arange(10).repeat_interleave(columns), arguments.guidance, seed=1)
    save_grid(images, arguments.out / "samples.png", columns=columns, scale=4)
    print(f"recognised {figures['recognised']:.3f} after {trainer.step} steps in {seconds:.0f} s: {arguments.out}")


if __name__ == "__main__":
    main()
