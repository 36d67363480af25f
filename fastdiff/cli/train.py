# SPDX-License-Identifier: MIT
"""``fastdiff train``: a diffusion model from digits, a folder of images, or a configuration of one's own."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from ..command import FAILED
from ..errors import checked_integer, error_message
from .app import app


@app.command()
def train(
    data: Annotated[
        str, typer.Option(help="digits, a folder of images (classes as subfolders), or one with MNIST's idx files.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for checkpoints, samples and history.jsonl.")],
    config: Annotated[Path | None, typer.Option(help="JSON with fields of DiffusionConfig.")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps in all, also the length of the schedule.")] = None,
    batch: Annotated[int, typer.Option(help="Samples a batch, of each process.")] = 128,
    resume: Annotated[bool, typer.Option(help="Continue from the latest checkpoint in --out.")] = False,
    seed: Annotated[int | None, typer.Option(help="Seed of weights, data order, noise and dropout.")] = None,
    jitter: Annotated[float, typer.Option(help="Share of the images that are turned and moved a little.")] = 0.0,
    workers: Annotated[int, typer.Option(help="Processes that read images.")] = 0,
    log_every: Annotated[int, typer.Option(help="Steps between two reports.")] = 50,
    checkpoint_every: Annotated[int, typer.Option(help="Steps between two checkpoints.")] = 500,
    validate_every: Annotated[int, typer.Option(help="Steps between two validations; 0 for none.")] = 0,
    sample_every: Annotated[int, typer.Option(help="Steps between two grids of samples; 0 for none.")] = 0,
    on_nan: Annotated[str, typer.Option(help="stop or skip, for gradients that are not finite.")] = "stop",
    tracker: Annotated[list[str] | None, typer.Option(help="tensorboard or wandb; may be given twice.")] = None,
    cpu: Annotated[bool, typer.Option(help="Train on the CPU where there is an accelerator.")] = False,
    quiet: Annotated[bool, typer.Option(help="No progress bar.")] = False,
) -> None:
    """Train a diffusion model; under torchrun or accelerate launch, on many processes."""
    from ..training import RunOptions
    from ..training.reports import DivergedError

    options = RunOptions(
        output_dir=str(out),
        log_every=log_every,
        checkpoint_every=checkpoint_every,
        validate_every=validate_every,
        sample_every=sample_every,
        sample_labels=range(10),
        on_nan=on_nan,
        trackers=tracker or (),
        progress=not quiet,
        cpu=cpu,
    )
    overrides: dict[str, Any] = {} if seed is None else {"seed": seed}
    if steps is not None:
        overrides["max_train_steps"] = checked_integer("train", "--steps", steps, 1)
    try:
        train_job(data, config, overrides, options, batch=batch, workers=workers, jitter=jitter, resume=resume)
    except DivergedError as error:
        typer.echo(f"fastdiff: {error}", err=True)
        raise typer.Exit(FAILED) from error
    finally:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def train_job(
    data: str,
    config: Path | None,
    overrides: dict[str, Any],
    options: Any,
    *,
    batch: int,
    workers: int,
    jitter: float,
    resume: bool,
) -> None:
    """Train as ``fastdiff train --help`` says, and print a line at the end.

    Args:
        data, config, overrides: as in `fastdiff.training.job.prepare_job`.
        options: `RunOptions`.
        batch, workers, jitter, resume: options of the command.
    """
    from torch.utils.data import DataLoader

    from ..training.augmentation import Jitter
    from ..training.checkpoints import latest_checkpoint
    from ..training.job import prepare_job
    from ..training.trainer import Trainer

    checked_integer("train", "--batch", batch, 1)
    checked_integer("train", "--workers", workers, 0)
    augment = Jitter(jitter) if jitter else None
    options = replace(options).validate()
    found = latest_checkpoint(Path(options.output_dir) / "checkpoints")
    if found is not None and not resume:
        got = f"is {options.output_dir!r}, which has the checkpoint {found.name}"
        raise ValueError(
            error_message("train", "--out", got, "a folder without checkpoints", "pass --resume, or another")
        )
    job = prepare_job(data, config, overrides)
    held_out = None if job.held_out is None else DataLoader(job.held_out, batch_size=batch)
    trainer = Trainer(
        job.model,
        job.config,
        options,
        null_label=job.null_label,
        augment=augment,
        val_dataloader=held_out,
    )
    if found is not None:
        trainer.load_checkpoint(found)
    count = len(job.train_data)  # type: ignore[arg-type]
    loader = DataLoader(job.train_data, batch_size=batch, shuffle=True, num_workers=workers, drop_last=count >= batch)
    first, began = trainer.step, time.perf_counter()
    reports = trainer.train(loader, max_steps=trainer.config.max_train_steps)
    if trainer.accelerator.is_main_process:
        seconds = time.perf_counter() - began
        loss = f"loss {reports[-1]['loss']:.4f}" if reports else "nothing was left to do"
        skipped = f", {trainer.skipped_steps} skipped," if trainer.skipped_steps else ""
        latest = latest_checkpoint(Path(options.output_dir) / "checkpoints")
        print(f"{trainer.step - first} steps{skipped} in {seconds:.0f} s: {loss}; {latest}")
