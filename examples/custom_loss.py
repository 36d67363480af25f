# SPDX-License-Identifier: MIT
"""A loss of one's own for the trainer: v-prediction with a term on the edges of the predicted image.

    python examples/custom_loss.py                # a minute on the digits

An objective is any callable from (predict, batch) to a loss a sample.  It draws from ``batch.seeds`` alone, so that
a resumed run and a run on several processes still have the same bits.  Needs accelerate, diffusers and scikit-learn.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from fastdiff import ops
from fastdiff.digits import NULL_CLASS, DigitUNet
from fastdiff.training import (
    DiffusionConfig,
    LossTerms,
    Trainer,
    TrainingBatch,
    digits_dataset,
    draw_timesteps,
    huber_loss,
    validate_model,
)


def edges(images: Tensor) -> Tensor:
    """Return differences of neighbouring pixels, ``[B, n]``."""
    return torch.cat([images.diff(dim=-1).flatten(1), images.diff(dim=-2).flatten(1)], dim=1)


class EdgeObjective:
    """Pseudo-Huber loss of the velocity, plus the squared error of the edges of the image that it implies.

    Args:
        schedule: the noise schedule.
        weight: of the edges.  They count by ᾱ: nothing is known about them in pure noise.
    """

    def __init__(self, schedule: Any, weight: float = 0.1) -> None:
        self.schedule, self.weight = schedule, weight

    def __call__(self, predict: Any, batch: TrainingBatch) -> LossTerms:
        t = draw_timesteps(len(batch.images), self.schedule.num_train_timesteps, seeds=batch.seeds)
        # The noise is drawn inside; noisy images and target come from one pass over memory.
        noisy, target = ops.noise_and_target(batch.images, t, self.schedule, "v_prediction", seeds=batch.seeds)
        output = predict(noisy, t, batch.condition)
        losses = huber_loss(output, target, c=0.1, reduction="none")

        alpha_bar = self.schedule.alphas_cumprod.to(noisy)[t]
        alpha, sigma = alpha_bar.sqrt().view(-1, 1, 1, 1), (1 - alpha_bar).sqrt().view(-1, 1, 1, 1)
        predicted = alpha * noisy - sigma * output
        errors = (edges(predicted) - edges(batch.images)).square().mean(dim=1)
        return LossTerms(losses + self.weight * alpha_bar * errors, t)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--weight", type=float, default=0.1)
    arguments = parser.parse_args()
    config = DiffusionConfig(
        image_size=8,
        in_channels=1,
        beta_schedule="cosine",
        prediction_type="v_prediction",
        learning_rate=1e-3,
        lr_warmup_steps=arguments.steps // 10,
        max_train_steps=arguments.steps,
        ema_decay=0.99,
    )
    torch.manual_seed(config.seed)
    model = DigitUNet()
    trainer = Trainer(model, config, null_label=NULL_CLASS)
    trainer.objective = EdgeObjective(trainer.schedule, arguments.weight)
    loader = DataLoader(digits_dataset(), batch_size=128, shuffle=True, drop_last=True)
    held_out = DataLoader(digits_dataset(train=False), batch_size=360)

    def usual_loss() -> float:
        """Return the mean squared error of the velocity, which is the usual objective, on held-out digits."""
        return validate_model(model, held_out, config=config, null_label=NULL_CLASS)

    before = usual_loss()
    reports = trainer.train(loader, max_steps=arguments.steps)
    with trainer.averaged_weights():
        after = usual_loss()
    print(f"loss with edges {reports[-1]['loss']:.4f}; usual loss on held-out digits {before:.4f} to {after:.4f}")


if __name__ == "__main__":
    main()
