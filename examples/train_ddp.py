# SPDX-License-Identifier: MIT
"""Training on several processes with torch's DistributedDataParallel, in a loop of one's own.

    torchrun --nproc-per-node 2 examples/train_ddp.py       # two processes with batches of 64
    python examples/train_ddp.py                            # one process with batches of 128: the same losses

Noise, timesteps and dropped labels belong to (seed, number of the sample, epoch), not to a process, so that both
lines train on the same numbers: the losses differ by the rounding of sums alone.  On GPUs the backend is nccl.
`fastdiff.training.Trainer` does all of this by itself: ``torchrun --nproc-per-node 2 -m fastdiff train ...``.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import torch
from torch import Tensor, distributed
from torch.nn.parallel import DistributedDataParallel

import fastdiff
from fastdiff import ops
from fastdiff.digits import NULL_CLASS, DigitUNet
from fastdiff.noise import sample_seeds
from fastdiff.training import digits_dataset, draw_timesteps

SEED = 0


def batches(count: int, size: int, rank: int, world: int, epoch: int) -> list[Tensor]:
    """Return the numbers of this process' samples in each batch of an epoch, whose order all processes share."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(SEED + epoch))
    whole = order[: count // size * size].view(-1, size)
    return [numbers.chunk(world)[rank] for numbers in whole]


def train(rank: int, world: int, steps: int, batch: int, device: torch.device) -> list[float]:
    """Train and return the mean loss of each step over all processes."""
    torch.manual_seed(SEED)  # the same weights everywhere
    model = DistributedDataParallel(DigitUNet(dropout=0.0).to(device))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    schedule = fastdiff.create_noise_scheduler("cosine")
    images, labels = digits_dataset().tensors
    losses: list[Tensor] = []
    epoch = 0
    while len(losses) < steps:
        for ids in batches(len(images), batch, rank, world, epoch)[: steps - len(losses)]:
            seeds = sample_seeds(SEED, ids, epoch)
            t = draw_timesteps(len(ids), 1000, seeds=seeds).to(device)
            # One label in ten is dropped, so that the model learns the unconditional output of guidance too.
            condition = torch.where(seeds % 10 == 0, NULL_CLASS, labels[ids]).to(device)
            x0, seeds = images[ids].to(device), seeds.to(device)
            output = model(ops.add_noise(x0, t, schedule, seeds=seeds), t, condition)
            loss = ops.diffusion_loss(output, x0, t, schedule, "v_prediction", seeds=seeds)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # gradients are averaged over the processes here
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            losses.append(loss.detach())
        epoch += 1
    means = torch.stack(losses)
    distributed.all_reduce(means)
    return (means / world).tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=128, help="samples a step over all processes")
    parser.add_argument("--losses", type=Path, help="write the loss of each step to this JSON file")
    arguments = parser.parse_args()

    # Without torchrun this is a group of one process.
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if arguments.batch % world:
        parser.error(f"--batch {arguments.batch} is no multiple of {world} processes")
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    store = None if "MASTER_ADDR" in os.environ else distributed.HashStore()
    backend = "gloo" if device.type == "cpu" else "nccl"
    distributed.init_process_group(backend, rank=rank, world_size=world, store=store)
    try:
        losses = train(rank, world, arguments.steps, arguments.batch, device)
    finally:
        distributed.destroy_process_group()
    if rank == 0:
        if arguments.losses:
            arguments.losses.write_text(json.dumps(losses), encoding="utf-8")
        print(f"{world} processes, {arguments.steps} steps: loss {losses[0]:.4f} to {losses[-1]:.4f}")


if __name__ == "__main__":
    main()
