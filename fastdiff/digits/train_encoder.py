# SPDX-License-Identifier: MIT
"""Train the digit encoder: ``python -m fastdiff.digits.train_encoder --epochs 60 --out DIRECTORY``.

It learns the class of the digits of the training split, turned, scaled and shifted a little, by cross entropy with
label smoothing.  The accuracy on the held-out split is written into the file's metadata.
"""

from __future__ import annotations

import math
import sys
import time
from pathlib import Path

import torch
from torch.nn import functional

from ..command import CommandParser, run_command
from ..errors import error_message, require
from ..files import check_writable, write_whole
from . import data
from .encoder import DigitEncoder
from .train import jitter


@torch.no_grad()
def held_out_accuracy(encoder: DigitEncoder) -> float:
    """Return the share of held-out real digits that the encoder classifies correctly."""
    digits = data.load_digits()
    predicted = encoder.classify(data.to_images(digits.held_out_pixels)).argmax(1)
    return float((predicted == torch.from_numpy(digits.held_out_labels)).double().mean())


def train(epochs: int, batch: int, lr: float, seed: int) -> DigitEncoder:
    """Train an encoder on the training split; return it in evaluation mode."""
    torch.manual_seed(seed)
    digits = data.load_digits()
    images, labels = data.to_images(digits.train_pixels), torch.from_numpy(digits.train_labels)
    encoder = DigitEncoder()
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=lr, weight_decay=0.01)
    total = epochs * math.ceil(len(images) / batch)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=lr, total_steps=total)
    for _ in range(epochs):
        for rows in torch.split(torch.randperm(len(images)), batch):
            logits = encoder.classify(jitter(images[rows], 0.7))
            loss = functional.cross_entropy(logits, labels[rows], label_smoothing=0.05)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            scheduler.step()
    return encoder.eval().requires_grad_(False)


def main(argv: list[str] | None = None) -> int:
    """Train, measure, and write ``encoder.safetensors``."""
    parser = CommandParser(prog="python -m fastdiff.digits.train_encoder", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for encoder.safetensors")
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    for name, low, high in (("epochs", 1, 10**6), ("batch", 1, 1437), ("lr", 0.0, 1.0), ("seed", 0, 2**63 - 1)):
        value = getattr(args, name)
        if not low <= value <= high:  # NaN is refused, too
            got, remedy = f"is {value}", "stay in that range"
            raise ValueError(error_message("train_encoder", f"--{name}", got, f"{low} to {high}", remedy))
    safetensors = require("safetensors.torch", "training", "train_encoder")
    path = args.out / "encoder.safetensors"
    check_writable(path, operation="train_encoder", argument="--out")
    given = ["DIRECTORY" if Path(word) == args.out else word for word in (sys.argv[1:] if argv is None else argv)]
    began = time.perf_counter()
    encoder = train(args.epochs, args.batch, args.lr, args.seed)
    accuracy = held_out_accuracy(encoder)
    metadata = {
        "command": " ".join(["python -m fastdiff.digits.train_encoder", *given]),
        "held_out_accuracy": f"{accuracy:.4f}",
        "torch": torch.__version__,
    }
    write_whole(
        path, safetensors.save(encoder.state_dict(), metadata=metadata), operation="train_encoder", argument="--out"
    )
    print(f"held-out accuracy {accuracy:.4f} after {time.perf_counter() - began:.0f} s; {path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command("train_encoder", main))
