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
from ..sharding import process_rank
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
    learning_rate: Annotated[float | None, typer.Option(help="Largest learning rate, instead of the file's.")] = None,
    distill: Annotated[
        str | None,
        typer.Option(
            help="Train for few steps: progressive, consistency, consistency_training (improved) or "
            "plain_consistency_training."
        ),
    ] = None,
    teacher: Annotated[
        Path | None, typer.Option(help="Folder of fastdiff train to distil; the packaged digits' model if left out.")
    ] = None,
    student_steps: Annotated[
        int | None, typer.Option(help="Steps of the distilled model's loop.", show_default="4")
    ] = None,
    teacher_steps: Annotated[
        int | None,
        typer.Option(
            help="Steps of the first teacher's loop, halved each round; or intervals of the grid, at its end.",
            show_default="32; 1280, or T where that is less, for consistency_training",
        ),
    ] = None,
    teacher_guidance_scale: Annotated[
        float | None, typer.Option(help="Guidance scale of the teacher; 1 for none.", show_default="1.0")
    ] = None,
    cpu: Annotated[bool, typer.Option(help="Train on the CPU where there is an accelerator.")] = False,
    quiet: Annotated[bool, typer.Option(help="No progress bar.")] = False,
) -> None:
    """Train a diffusion model; under torchrun or accelerate launch, on many processes."""
    from ..training import RunOptions
    from ..training.few_steps.job import DistillOptions
    from ..training.trainer.reports import DivergedError

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
    if learning_rate is not None:
        overrides["learning_rate"] = learning_rate
    options_of_distillation: dict[str, tuple[str, Any]] = {
        "--teacher": ("teacher", teacher),
        "--student-steps": ("student_steps", student_steps),
        "--teacher-steps": ("teacher_steps", teacher_steps),
        "--teacher-guidance-scale": ("guidance_scale", teacher_guidance_scale),
    }
    given = {name: pair for name, pair in options_of_distillation.items() if pair[1] is not None}
    if distill is None and given:
        name = next(iter(given))
        raise ValueError(error_message("train", name, "is given", "--distill beside it", "say how to distil"))
    fields: dict[str, Any] = dict(given.values())
    distillation = None if distill is None else DistillOptions(distill, **fields)
    try:
        train_job(
            data, config, overrides, options, distillation, batch=batch, workers=workers, jitter=jitter, resume=resume
        )
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
    distillation: Any = None,
    *,
    batch: int,
    workers: int,
    jitter: float,
    resume: bool,
) -> None:
    """Train as ``fastdiff train --help`` says, and print a line at the end.

    Args:
        data, config, overrides: as in `fastdiff.training.trainer.job.prepare_job`.
        options: `RunOptions`.
        distillation: `DistillOptions`, or None.
        batch, workers, jitter, resume: options of the command.
    """
    from torch.utils.data import DataLoader

    from ..training.data.augmentation import Jitter
    from ..training.few_steps.job import Round, finish_round, prepare_round, prepare_student, round_objective
    from ..training.trainer.job import prepare_job
    from ..training.trainer.trainer import Trainer

    checked_integer("train", "--batch", batch, 1)
    checked_integer("train", "--workers", workers, 0)
    augment = Jitter(jitter) if jitter else None
    options = replace(options).validate()
    distillation = None if distillation is None else distillation.validate()
    out = Path(options.output_dir)
    rounds = [Round(out, 0)] if distillation is None else distillation.rounds(out)
    _check_folders([current.folder for current in rounds], resume)
    job = prepare_job(data, config, overrides)
    parts: dict[str, Any] = {}
    if distillation is not None:
        job = prepare_student(job, data, distillation)
    held_out = None if job.held_out is None else DataLoader(job.held_out, batch_size=batch)
    if held_out is None and options.validate_every:
        got, remedy = f"is {options.validate_every} for data of which none are held out", "leave it out"
        raise ValueError(error_message("train", "--validate-every", got, "0", remedy))
    whole = len(job.train_data) >= batch * process_rank()[1]  # type: ignore[arg-type]
    loader = DataLoader(job.train_data, batch_size=batch, shuffle=True, num_workers=workers, drop_last=whole)
    for current in rounds:
        if distillation is not None:
            job = prepare_round(job, current)
            parts["objective"] = round_objective(job, distillation, current)
        trainer = Trainer(
            job.model,
            job.config,
            replace(options, output_dir=str(current.folder)),
            null_label=job.null_label,
            augment=augment,
            val_dataloader=held_out,
            **parts,
        )
        _train_to_the_end(trainer, loader, current.folder)
        if current is not rounds[-1]:
            finish_round(job, current)


def _check_folders(folders: list[Path], resume: bool) -> None:
    """Refuse folders with checkpoints for a new training."""
    from ..training.checkpoints import latest_checkpoint

    for folder in folders:
        found = latest_checkpoint(folder / "checkpoints")
        if found is not None and not resume:
            got = f"is {str(folder)!r}, which has the checkpoint {found.name}"
            raise ValueError(
                error_message("train", "--out", got, "a folder without checkpoints", "pass --resume, or another")
            )


def _train_to_the_end(trainer: Any, loader: Any, folder: Path) -> None:
    """Train from the latest checkpoint of a folder, if there is one, and print a line."""
    from ..training.checkpoints import latest_checkpoint

    found = latest_checkpoint(folder / "checkpoints")
    if found is not None:
        trainer.load_checkpoint(found)
    first, began = trainer.step, time.perf_counter()
    reports = trainer.train(loader, max_steps=trainer.config.max_train_steps)
    for tracker in trainer.accelerator.trackers:
        tracker.finish()  # the next round's steps begin again, which wandb takes in a new run alone
    if trainer.accelerator.is_main_process:
        seconds = time.perf_counter() - began
        loss = f"loss {reports[-1]['loss']:.4f}" if reports else "nothing was left to do"
        skipped = f", {trainer.skipped_steps} skipped," if trainer.skipped_steps else ""
        latest = latest_checkpoint(folder / "checkpoints")
        print(f"{trainer.step - first} steps{skipped} in {seconds:.0f} s: {loss}; {latest}")
