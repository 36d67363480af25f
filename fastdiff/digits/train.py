# SPDX-License-Identifier: MIT
"""Train the digit model: ``python -m fastdiff.digits.train --epochs 400 --out DIRECTORY``.

The model learns the velocity of Salimans and Ho, "Progressive Distillation" (2022), on the cosine schedule of Nichol
and Dhariwal, "Improved DDPM" (2021), with 1000 timesteps, from the training split alone. Some labels are replaced by
the null class, so that the one network serves both halves of classifier-free guidance (Ho and Salimans, 2022).
"""

from __future__ import annotations

import argparse
import copy
import datetime
import json
import math
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..command import CommandParser, run_command
from ..errors import error_message, require
from ..files import check_writable, write_whole
from ..schedules import BaseNoiseScheduler, create_noise_scheduler
from . import data
from .unet import IMAGE_SHAPE, NULL_CLASS, NUM_CLASSES, DigitUNet

TIMESTEPS = 1000
GUIDANCES = (1.5, 2.0, 3.0)

# (labels [N], guidance_scale, seed) -> images [N, 1, 8, 8]
SampleFn = Callable[[Tensor, float, int], Tensor]


def _schedule() -> BaseNoiseScheduler:
    return create_noise_scheduler("cosine", num_train_timesteps=TIMESTEPS)


def ddim_sampler(model: DigitUNet, steps: int = 50, batch: int = 200) -> SampleFn:
    """Plain DDIM (Song et al., 2020, eta 0) with classifier-free guidance, coefficients in float64.

    Written out here on purpose: the figures then judge the model, and not the samplers of this package.
    """
    bar = _schedule().alphas_cumprod.to(torch.float64)
    # From the very last timestep down, at even distances, as the noise that sampling starts from has no signal in it.
    stops = torch.linspace(TIMESTEPS - 1, 0, steps + 1, dtype=torch.float64).round().to(torch.int64)[:-1].tolist()

    @torch.no_grad()
    def sample(labels: Tensor, guidance_scale: float, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn((len(labels), *IMAGE_SHAPE), generator=generator)
        pairs = zip(torch.split(noise, batch), torch.split(labels, batch), strict=True)
        return torch.cat([denoise(x, y, guidance_scale) for x, y in pairs])

    def denoise(x: Tensor, labels: Tensor, guidance_scale: float) -> Tensor:
        null = torch.full_like(labels, NULL_CLASS)
        for i, stop in enumerate(stops):
            following = float(bar[stops[i + 1]]) if i + 1 < steps else 1.0
            alpha, sigma = float(bar[stop]) ** 0.5, (1.0 - float(bar[stop])) ** 0.5
            t = torch.tensor(stop)
            free = model(x, t, null)
            v = free + guidance_scale * (model(x, t, labels) - free)
            x0, eps = alpha * x - sigma * v, sigma * x + alpha * v
            x = following**0.5 * x0 + (1.0 - following) ** 0.5 * eps
        return x

    return sample


def evaluate(sample_fn: SampleFn, guidance_scale: float, per_class: int = 100, seed: int = 0) -> dict[str, Any]:
    """Measure ``per_class`` generated digits of each class.

    Returns:
        ``guidance``, ``recognised`` (share read as the digit asked for), ``variance_ratio`` (ten numbers, generated
        over real), ``variance_ratio_min``, ``nearest_train_generated`` and ``nearest_train_held_out`` (median
        distances, see ``data.nearest_distance``).
    """
    classifier, _ = data.train_classifier()
    labels = torch.arange(NUM_CLASSES).repeat_interleave(per_class)
    images = sample_fn(labels, guidance_scale, seed)
    ratios = data.variance_ratio(images, labels)
    nearest = data.nearest_distance(images)
    return {
        "guidance": guidance_scale,
        "recognised": round(data.recognised(classifier, images, labels), 4),
        "variance_ratio": [round(float(ratio), 3) for ratio in ratios],
        "variance_ratio_min": round(float(ratios.min()), 3),
        "nearest_train_generated": round(nearest.generated, 2),
        "nearest_train_held_out": round(nearest.held_out, 2),
    }


def jitter(images: Tensor, share: float) -> Tensor:
    """Turn, scale and shift a ``share`` of ``images [B, 1, 8, 8]`` by a little, as another hand might write them.

    At most 7 degrees, 6 % and 0.4 of a pixel, so that the images stay within what the real ones look like. Cubic
    interpolation keeps strokes from blurring; paper (-1) is beyond the border.
    """
    batch = len(images)
    turn = (torch.rand(batch) * 2 - 1) * math.radians(7.0)
    scale = 1 + (torch.rand(batch, 2) * 2 - 1) * 0.06
    shift = (torch.rand(batch, 2) * 2 - 1) * (0.4 * 2 / IMAGE_SHAPE[-1])
    across = torch.stack([turn.cos() * scale[:, 0], -turn.sin() * scale[:, 0], shift[:, 0]], dim=1)
    down = torch.stack([turn.sin() * scale[:, 1], turn.cos() * scale[:, 1], shift[:, 1]], dim=1)
    grid = functional.affine_grid(torch.stack([across, down], dim=1), list(images.shape), align_corners=False)
    moved = functional.grid_sample(images + 1, grid, mode="bicubic", align_corners=False) - 1
    chosen = (torch.rand(batch) < share).view(-1, 1, 1, 1)
    return torch.where(chosen, moved.clamp(-1, 1), images)


def velocity_loss(
    model: DigitUNet, images: Tensor, labels: Tensor, t: Tensor, noise: Tensor, schedule: BaseNoiseScheduler
) -> Tensor:
    """Mean squared error of the predicted velocity of ``images [B, 1, 8, 8]``, noised to ``t [B]``."""
    predicted = model(schedule.add_noise(images, noise, t), t, labels)
    return functional.mse_loss(predicted, schedule.get_velocity(images, noise, t))


@torch.no_grad()
def held_out_loss(model: DigitUNet, schedule: BaseNoiseScheduler, repeats: int = 8) -> float:
    """Compute the loss on the held-out digits, with their labels, on noise that is the same at each call."""
    digits = data.load_digits()
    images = data.to_images(digits.held_out_pixels).repeat(repeats, 1, 1, 1)
    labels = torch.from_numpy(digits.held_out_labels).repeat(repeats)
    generator = torch.Generator().manual_seed(1)
    t = torch.randint(0, TIMESTEPS, (len(images),), generator=generator)
    noise = torch.randn(images.shape, generator=generator)
    was_training = model.training
    loss = float(velocity_loss(model.eval(), images, labels, t, noise, schedule))
    model.train(was_training)
    return loss


def train(args: argparse.Namespace) -> tuple[DigitUNet, dict[str, Any]]:
    """Train and return the averaged model, with ``training_seconds``, ``final_loss`` and ``held_out_loss``."""
    torch.manual_seed(args.seed)
    digits = data.load_digits()
    images, labels = data.to_images(digits.train_pixels), torch.from_numpy(digits.train_labels)
    schedule = _schedule()
    model = DigitUNet(dropout=args.dropout).train()
    averaged = copy.deepcopy(model).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=args.weight_decay, betas=(0.9, 0.99))
    per_epoch = len(images) // args.batch
    total: int = args.epochs * per_epoch
    warm_up: int = min(500, total // 10 + 1)

    def rate(step: int) -> float:
        if step < warm_up:
            return (step + 1) / warm_up
        return 0.5 * (1.0 + math.cos(math.pi * (step - warm_up) / max(1, total - warm_up)))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    began = time.perf_counter()
    step, epoch_loss = 0, math.nan
    for epoch in range(1, args.epochs + 1):
        running = 0.0
        for rows in torch.randperm(len(images))[: per_epoch * args.batch].view(per_epoch, args.batch):
            # One timestep from each of `batch` equal slices of 0..999: the loss of a step then varies less.
            t = ((torch.arange(args.batch) + torch.rand(args.batch)) * (TIMESTEPS / args.batch)).long()
            t = t.clamp(max=TIMESTEPS - 1)
            dropped = torch.rand(args.batch) < args.label_dropout
            asked = torch.where(dropped, NULL_CLASS, labels[rows])
            clean = jitter(images[rows], args.jitter)
            loss = velocity_loss(model, clean, asked, t, torch.randn(args.batch, *IMAGE_SHAPE), schedule)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            step += 1
            # Averaging over a tenth of the steps so far keeps the random start out of the mean.
            decay = min(args.ema, step / (step + 9))
            with torch.no_grad():
                torch._foreach_lerp_(list(averaged.parameters()), list(model.parameters()), 1 - decay)
            running += float(loss.detach())
        epoch_loss = running / per_epoch
        if epoch % args.log_every == 0 or epoch == args.epochs:
            print(
                f"epoch {epoch}: loss {epoch_loss:.4f}, averaged model on held-out digits "
                f"{held_out_loss(averaged, schedule):.4f}, {time.perf_counter() - began:.0f} s",
                flush=True,
            )
    return averaged, {
        "training_seconds": round(time.perf_counter() - began, 1),
        "final_loss": round(epoch_loss, 5),
        "held_out_loss": round(held_out_loss(averaged, schedule), 5),
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def check_arguments(args: argparse.Namespace) -> None:
    """Refuse what cannot be trained with.

    Raises:
        ValueError: a number is out of range; the message names the option.
    """
    count = len(data.load_digits().train_pixels)
    for name, low, high in (
        ("epochs", 1, 10**6),
        ("batch", 1, count),
        ("log_every", 1, 10**6),
        ("seed", 0, 2**63 - 1),
        ("lr", 0.0, 1.0),
        ("weight_decay", 0.0, 1.0),
        ("dropout", 0.0, 1.0),
        ("label_dropout", 0.0, 1.0),
        ("jitter", 0.0, 1.0),
        ("ema", 0.0, 1.0),
    ):
        value = getattr(args, name)
        if not low <= value <= high:  # NaN is refused, too
            option = f"--{name.replace('_', '-')}"
            raise ValueError(error_message("train", option, f"is {value}", f"{low} to {high}", "stay in that range"))


def main(argv: list[str] | None = None) -> int:
    """Train, measure, and write ``weights.safetensors`` and ``figures.json``."""
    parser = CommandParser(prog="python -m fastdiff.digits.train", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for weights.safetensors and figures.json")
    parser.add_argument("--epochs", type=int, default=400)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--weight-decay", type=float, default=0.01)
    parser.add_argument("--dropout", type=float, default=0.1, help="share of features dropped in each residual block")
    parser.add_argument("--label-dropout", type=float, default=0.1, help="share of labels replaced by the null class")
    parser.add_argument("--jitter", type=float, default=0.5, help="share of images turned, scaled and shifted a little")
    parser.add_argument("--ema", type=float, default=0.999, help="decay of the averaged weights, per step")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log-every", type=int, default=50, help="epochs between two lines of the log")
    args = parser.parse_args(argv)
    check_arguments(args)
    safetensors = require("safetensors.torch", "training", "train")
    weights, report = args.out / "weights.safetensors", args.out / "figures.json"
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        got = f"is {str(args.out)!r}, which cannot be made: {error.strerror}"
        raise ValueError(
            error_message("train", "--out", got, "a folder that can be written to", "choose another")
        ) from error
    for path in (weights, report):  # hours before they are written
        check_writable(path, operation="train", argument="--out")

    given = ["DIRECTORY" if Path(word) == args.out else word for word in (sys.argv[1:] if argv is None else argv)]
    command = " ".join(["python -m fastdiff.digits.train", *given])
    model, trained = train(args)
    metadata = {
        "prediction_type": "v_prediction",
        "schedule": "cosine (squaredcos_cap_v2)",
        "T": str(TIMESTEPS),
        "command": command,
    }
    # Written as bytes: safetensors' own writer makes files that only their owner can read; this one is packaged.
    write_whole(weights, safetensors.save(model.state_dict(), metadata=metadata), operation="train", argument="--out")

    _, held_out = data.train_classifier()
    sample_fn = ddim_sampler(model)
    figures = {
        "command": command,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "epochs": args.epochs,
        **trained,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cpu": _cpu_name(),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "classifier_held_out_accuracy": round(held_out, 4),
        "sampler": "DDIM, 50 steps, eta 0, 100 digits a class",
        "evaluation": [evaluate(sample_fn, guidance) for guidance in GUIDANCES],
    }
    text = json.dumps(figures, indent=2) + "\n"
    write_whole(report, text.encode(), operation="train", argument="--out")
    print(json.dumps(figures, indent=2))
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command("train", main))
