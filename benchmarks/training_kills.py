# SPDX-License-Identifier: MIT
"""Training under kill -9: resumed runs end in the bits of an undisturbed one.  And two processes beside one.

Run with ``python -m benchmarks.training_kills --kills 20``.  Each trial trains a small model on the CPU, with dropout,
accumulation, averaged weights and a checkpoint after each step, is killed at a random instant, resumed, killed again,
and so on, until a run ends by itself.  Its last checkpoint is compared with the undisturbed run's byte by byte, its
history line by line.

Runs are children of one process, forked after the imports and before any computation, so that a run takes a second.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

STEPS, SAMPLES = 24, 40
FILES = ("model", "ema", "optimizer")


class SmallModel(nn.Module):
    """Two convolutions and dropout, steered by time and label."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.enter, self.leave = nn.Conv2d(1, 16, 3, padding=1), nn.Conv2d(16, 1, 3, padding=1)
        self.time, self.label = nn.Embedding(100, 16), nn.Embedding(11, 16)
        self.norm, self.dropout = nn.GroupNorm(4, 16), nn.Dropout(dropout)

    def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        steer = (self.time(t) + self.label(labels))[:, :, None, None]
        return self.leave(self.dropout(torch.tanh(self.norm(torch.tanh(self.enter(x)) + steer))))


def train(folder: Path, batch: int, *, dropout: float, accumulation: int, checkpoint_every: int) -> None:
    """Train from the latest checkpoint of a folder, or from the start."""
    from torch.utils.data import DataLoader, TensorDataset

    from fastdiff.training import DiffusionConfig, RunOptions, Trainer
    from fastdiff.training.checkpoints import latest_checkpoint

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = DiffusionConfig(
        image_size=8,
        in_channels=1,
        num_timesteps=100,
        learning_rate=1e-2,
        lr_warmup_steps=3,
        max_train_steps=STEPS,
        gradient_accumulation_steps=accumulation,
        ema_decay=0.9,
    )
    options = RunOptions(
        output_dir=str(folder), log_every=1, checkpoint_every=checkpoint_every, keep_checkpoints=2, cpu=True
    )
    trainer = Trainer(SmallModel(dropout), config, options, null_label=10)
    if latest_checkpoint(folder / "checkpoints") is not None:
        trainer.load_checkpoint()
    generator = torch.Generator().manual_seed(1)
    images = torch.rand((SAMPLES, 1, 8, 8), generator=generator) * 2 - 1
    data = TensorDataset(images, torch.arange(SAMPLES) % 10)
    trainer.train(DataLoader(data, batch, shuffle=True, drop_last=True), max_steps=STEPS)


def fork(run: Callable[[], None], **environment: str) -> int:
    """Start a child that runs a function; return its process id."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.environ.update(environment)
        run()
        code = 0
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
    finally:
        os._exit(code)


def wait(child: int) -> None:
    """Wait for a child.

    Raises:
        RuntimeError: it failed.
    """
    _, status = os.waitpid(child, 0)
    if os.waitstatus_to_exitcode(status):
        raise RuntimeError(f"training ended with {os.waitstatus_to_exitcode(status)}")


def outcome(folder: Path) -> dict[str, bytes]:
    """Return what is compared: the tensors of the last checkpoint, and the history."""
    last = folder / "checkpoints" / f"step-{STEPS:08d}"
    files = {name: (last / f"{name}.safetensors").read_bytes() for name in FILES}
    return {**files, "history": (folder / "history.jsonl").read_bytes()}


def kill_trials(kills: int, seed: int, work: Path) -> dict[str, Any]:
    """Kill so many runs at random instants and compare each end; return a report."""

    def job(folder: Path) -> Callable[[], None]:
        return lambda: train(folder, 4, dropout=0.2, accumulation=2, checkpoint_every=1)

    began = time.perf_counter()
    wait(fork(job(work / "whole")))
    seconds = time.perf_counter() - began
    expected = outcome(work / "whole")
    draw, done, equal, trials = random.Random(seed), 0, 0, 0
    instants: list[float] = []
    while done < kills:
        folder = work / f"trial{trials}"
        trials += 1
        while True:
            child = fork(job(folder))
            if done < kills:
                time.sleep(draw.uniform(0, seconds))
                if os.waitpid(child, os.WNOHANG) != (0, 0):
                    break
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                done += 1
                history = folder / "history.jsonl"
                instants.append(len(history.read_text().splitlines()) if history.is_file() else 0)
            else:
                wait(child)
                break
        found = outcome(folder)
        equal += found == expected
        shutil.rmtree(folder)
    return {
        "kills": done,
        "trials": trials,
        "equal": equal,
        "killed_after_step": instants,
        "seconds_undisturbed": round(seconds, 2),
    }


def two_processes(work: Path) -> dict[str, Any]:
    """Train on two processes (gloo) and on one with twice the batch; return both loss curves and their distance."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}

    def job(folder: Path, batch: int) -> Callable[[], None]:
        # The model's dropout has masks for each process, so it is off.
        return lambda: train(folder, batch, dropout=0.0, accumulation=1, checkpoint_every=0)

    children = [fork(job(work / "two", 4), **shared, RANK=str(rank), LOCAL_RANK=str(rank)) for rank in range(2)]
    wait(fork(job(work / "one", 8)))
    for child in children:
        wait(child)
    curves = {}
    for name in ("one", "two"):
        lines = (work / name / "history.jsonl").read_text().splitlines()
        curves[name] = [json.loads(line)["loss"] for line in lines]
    pairs = list(zip(curves["one"], curves["two"], strict=True))
    return {**curves, "largest_relative_distance": max(abs(a - b) / a for a, b in pairs)}


def main(argv: list[str] | None = None) -> int:
    """Run the trials and print a report as JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--two-processes", action="store_true", help="also train on two processes")
    args = parser.parse_args(argv)
    # Before the fork, so that a child computes at once.
    import accelerate
    import diffusers.optimization
    import diffusers.training_utils
    import safetensors.torch  # noqa: F401

    import fastdiff.training.trainer.trainer  # noqa: F401

    del accelerate, diffusers
    work = Path(tempfile.mkdtemp(prefix="fastdiff-kills-"))
    try:
        report: dict[str, Any] = {}
        if args.kills:
            report["kills"] = kill_trials(args.kills, args.seed, work)
        if args.two_processes:
            report["two_processes"] = two_processes(work)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    print(json.dumps(report))
    return 0 if not args.kills or report["kills"]["equal"] == report["kills"]["trials"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
