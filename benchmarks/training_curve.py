# SPDX-License-Identifier: MIT
"""The trainer beside a training loop in plain torch, on the digits, for several seeds.

The loop below uses nothing of fastdiff but the network and the digits: its noise, timesteps, order of data, dropout of
conditions, schedule, learning rate and averages are torch's or written out.  Network, batch size and hyperparameters
are the trainer's; all random numbers differ, between the two as between seeds.  Both are measured on the held-out
digits, with noise that is the same for all, and by samples of plain DDIM.

Run it with ``python -m benchmarks.training_curve --seeds 3 --steps 600``: two minutes a run on one thread.  The exit
status is 1 where the mean losses differ by more than three standard errors of their difference.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import math
import statistics
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

T, BATCH, LEARNING_RATE, DECAY, AVERAGE, DROPPED = 1000, 128, 1e-3, 0.01, 0.999, 0.1


@functools.cache
def signal_and_noise() -> tuple[Tensor, Tensor]:
    """Return α and σ of the cosine schedule, float64 ``[T]`` (arXiv 2102.09672, eq. 17)."""
    u = torch.arange(T + 1, dtype=torch.float64) / T
    bar = torch.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
    kept = (1 - (1 - bar[1:] / bar[:-1]).clamp(max=0.999)).cumprod(0)
    return kept.sqrt(), (1 - kept).sqrt()


def velocity_error(model: nn.Module, images: Tensor, labels: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """Return the mean squared error of the velocity (arXiv 2202.00512)."""
    alpha, sigma = (scale.float()[t].reshape(-1, 1, 1, 1) for scale in signal_and_noise())
    predicted = model(alpha * images + sigma * noise, t, labels)
    return nn.functional.mse_loss(predicted, alpha * noise - sigma * images)


def plain_loop(seed: int, steps: int, warmup: int) -> nn.Module:
    """Train by DDPM's algorithm 1 (arXiv 2006.11239) in plain torch and return the averaged model."""
    from fastdiff.digits import NULL_CLASS, DigitUNet
    from fastdiff.digits.data import load_digits, to_images

    torch.manual_seed(1000 + seed)
    digits = load_digits()
    images, classes = to_images(digits.train_pixels), torch.from_numpy(digits.train_labels).long()
    model = DigitUNet(dropout=0.1)
    decayed = [p for name, p in model.named_parameters() if p.dim() > 1]
    others = [p for name, p in model.named_parameters() if p.dim() <= 1]
    groups: list[dict[str, Any]] = [{"params": decayed, "weight_decay": DECAY}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE)
    averaged = copy.deepcopy(model)
    order: list[Tensor] = []
    for step in range(steps):
        if not order:
            order = [rows for rows in torch.randperm(len(images)).split(BATCH) if len(rows) == BATCH]
        rows = order.pop()
        ramp = step / warmup if step < warmup else 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * ramp
        labels = torch.where(torch.rand(BATCH) < DROPPED, NULL_CLASS, classes[rows])
        t, noise = torch.randint(T, (BATCH,)), torch.randn(images[rows].shape)
        optimizer.zero_grad()
        velocity_error(model, images[rows], labels, t, noise).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        keep = min(AVERAGE, (1 + step) / (10 + step))
        with torch.no_grad():
            for mean, value in zip(averaged.parameters(), model.parameters(), strict=True):
                mean.lerp_(value, 1 - keep)
    return averaged.eval()


def trainer_run(seed: int, steps: int, warmup: int) -> nn.Module:
    """Train by `fastdiff.training.Trainer` and return the averaged model."""
    from torch.utils.data import DataLoader

    from fastdiff.digits import NULL_CLASS, DigitUNet
    from fastdiff.training import DiffusionConfig, RunOptions, Trainer, digits_dataset

    config = DiffusionConfig(
        image_size=8,
        in_channels=1,
        beta_schedule="cosine",
        prediction_type="v_prediction",
        learning_rate=LEARNING_RATE,
        weight_decay=DECAY,
        lr_warmup_steps=warmup,
        max_train_steps=steps,
        ema_decay=AVERAGE,
        condition_dropout=DROPPED,
        dropout=0.1,
        seed=seed,
    )
    torch.manual_seed(seed)
    trainer = Trainer(DigitUNet(dropout=0.1), config, RunOptions(log_every=steps, cpu=True), null_label=NULL_CLASS)
    trainer.train(DataLoader(digits_dataset(), BATCH, shuffle=True, drop_last=True), max_steps=steps)
    with trainer.averaged_weights() as modules:
        return copy.deepcopy(modules.model).eval()


@torch.no_grad()
def measure(model: nn.Module, per_class: int, sampling_steps: int) -> dict[str, float]:
    """Return the loss on the held-out digits, and recognised share and variance ratio of samples at guidance 2."""
    from fastdiff.digits import data
    from fastdiff.digits.train import ddim_sampler

    digits = data.load_digits()
    images = data.to_images(digits.held_out_pixels).repeat(16, 1, 1, 1)
    labels = torch.from_numpy(digits.held_out_labels).long().repeat(16)
    generator = torch.Generator().manual_seed(1)
    t = torch.randint(T, labels.shape, generator=generator)
    noise = torch.randn(images.shape, generator=generator)
    losses = [
        velocity_error(model, *part) for part in zip(*(x.split(360) for x in (images, labels, t, noise)), strict=True)
    ]
    figures = {"loss": float(torch.stack(losses).mean())}
    if per_class:
        classes = torch.arange(10).repeat_interleave(per_class)
        samples = ddim_sampler(model, sampling_steps)(classes, 2.0, 0)  # type: ignore[arg-type]
        classifier, _ = data.train_classifier()
        figures["recognised"] = data.recognised(classifier, samples, classes)
        figures["variance_ratio"] = float(data.variance_ratio(samples, classes).mean())
    return figures


def main(arguments: list[str] | None = None) -> int:
    """Train, print a line a run and the difference of the means; return 1 where it is beyond three standard errors."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--per-class", type=int, default=50, help="samples of each digit; 0 for none")
    parser.add_argument("--sampling-steps", type=int, default=50)
    parser.add_argument("--json", type=Path, help="where to write the figures")
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    warmup = min(100, options.steps // 10)
    found: dict[str, list[dict[str, float]]] = {"fastdiff": [], "plain torch": []}
    for seed in range(options.seeds):
        for name, run in (("fastdiff", trainer_run), ("plain torch", plain_loop)):
            began = time.perf_counter()
            model = run(seed, options.steps, warmup)
            figures = {"seconds": round(time.perf_counter() - began, 1)}
            figures |= measure(model, options.per_class, options.sampling_steps)
            found[name].append(figures)
            print(
                f"{name:12} seed {seed}  " + "  ".join(f"{key} {value:.4f}" for key, value in figures.items()),
                flush=True,
            )
    losses = [[figures["loss"] for figures in runs] for runs in found.values()]
    difference = statistics.mean(losses[0]) - statistics.mean(losses[1])
    error = math.sqrt(sum(statistics.variance(values) / len(values) for values in losses)) if options.seeds > 1 else 0.0
    print(f"difference of the mean losses {difference:+.5f}, standard error {error:.5f}")
    if options.json is not None:
        options.json.write_text(json.dumps({"steps": options.steps, **found}, indent=2) + "\n", encoding="utf-8")
    return int(options.seeds > 1 and abs(difference) > 3 * error)


if __name__ == "__main__":
    raise SystemExit(main())
