# SPDX-License-Identifier: MIT
"""Checks of what a trainer is given: precision, learning rate, data, grids of samples and output folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import error_message, require
from ...schedules import BaseNoiseScheduler
from ..checkpoints import latest_checkpoint
from ..config import DiffusionConfig
from ..data.order import DataOrder

_PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}


def checked_precision(config: DiffusionConfig, accelerator: Any) -> torch.dtype | None:
    """Return the dtype of autocast, the configuration's or that of ``accelerate launch``; None for no autocast.

    Raises:
        ValueError: the two differ, or it is no precision of this trainer.
    """
    ours, launched = config.mixed_precision, accelerator.mixed_precision
    if launched != "no" and ours not in ("no", launched):
        got, expected = f"is {ours!r}", f"{launched!r}, as accelerate was launched"
        raise ValueError(error_message("Trainer", "mixed_precision", got, expected, "leave one of the two out"))
    name = launched if ours == "no" else ours
    if name not in ("no", *_PRECISIONS):
        got, remedy = f"is {name!r}", "launch with --mixed_precision bf16"
        raise ValueError(error_message("Trainer", "mixed_precision", got, "no, bf16 or fp16", remedy))
    return _PRECISIONS.get(str(name))


def check_learning_rate(schedule: Any, optimizer: Any) -> None:
    """Check that a given learning rate is a schedule of the given optimizer.

    Raises:
        TypeError, ValueError: it is not.
    """
    if schedule is None:
        return
    missing = [name for name in ("step", "get_last_lr", "state_dict", "load_state_dict") if not hasattr(schedule, name)]
    if missing or isinstance(schedule, torch.optim.lr_scheduler.ReduceLROnPlateau):
        got = f"is a {type(schedule).__name__}"
        expected, remedy = "a schedule that steps without a metric", "set a number as config.learning_rate"
        raise TypeError(error_message("Trainer", "learning_rate", got, expected, remedy))
    own = (optimizer, getattr(optimizer, "optimizer", optimizer))  # accelerate wraps optimizers
    if optimizer is None or not any(getattr(schedule, "optimizer", optimizer) is one for one in own):
        got, remedy = "is a schedule of another optimizer", "pass its optimizer as optimizer="
        raise ValueError(error_message("Trainer", "learning_rate", got, "one of the trainer's optimizer", remedy))


def check_batch_size(order: DataOrder, batch: int, global_batch: int) -> None:
    """Check that a pass over the data goes on with batches of the size that it began with.

    Args:
        order: the data.
        batch: batches of the pass so far.
        global_batch: their samples over all processes.

    Raises:
        ValueError: the size is another one.
    """
    size = order.global_batch
    if batch and size is not None and size != global_batch:
        got, expected = f"gives {size} samples a batch over all processes", f"{global_batch} like before"
        remedy = "change batch_size by the number of processes, or continue at the end of an epoch"
        raise ValueError(error_message("train", "dataloader", got, expected, remedy))


def check_validation(validate_every: int, val_dataloader: Any) -> None:
    """Check that there are data for the validations that the options ask for.

    Raises:
        ValueError: there are none.
    """
    if validate_every and val_dataloader is None:
        got, remedy = f"is {validate_every} without val_dataloader", "pass val_dataloader="
        raise ValueError(error_message("train", "validate_every", got, "data for validation", remedy))


def check_no_later_checkpoint(checkpoints: Path, step: int) -> None:
    """Check that the checkpoints of a folder are those of this run: none is of a later step.

    Raises:
        ValueError: one is.
    """
    found = latest_checkpoint(checkpoints)
    if found is not None and int(found.name.rpartition("-")[2]) > step:
        got = f"is {str(checkpoints.parent)!r}, which has the checkpoint {found.name}"
        expected = f"none after step {step}, where the trainer is"
        remedy = "call load_checkpoint() first, take another folder, or remove the later checkpoints"
        raise ValueError(error_message("train", "output_dir", got, expected, remedy))


def check_grids(schedule: Any, channels: int) -> None:
    """Check, before a training, that grids of samples can be drawn and written.

    Args:
        schedule: the trainer's noise schedule.
        channels: of the samples.

    Raises:
        ValueError: the schedule is not of fastdiff, or samples have not 1 or 3 channels.
        ImportError: Pillow is missing.
    """
    require("PIL.Image", "cli", "train")
    check_schedule_of_grids(schedule)
    if channels not in (1, 3):
        got, remedy = f"asks for pictures of samples with {channels} channels", "leave it at 0"
        raise ValueError(error_message("train", "sample_every", got, "samples of 1 or 3 channels", remedy))


def check_schedule_of_grids(schedule: Any) -> None:
    """Check that a sampler takes a noise schedule.

    Raises:
        ValueError: it is not of fastdiff.
    """
    if not isinstance(schedule, BaseNoiseScheduler):
        got, remedy = f"is a {type(schedule).__name__}", "leave sample_every at 0, or pass schedule="
        raise ValueError(error_message("train", "schedule", got, "a schedule of fastdiff for samples", remedy))


def check_images_of_grids(images: Tensor) -> None:
    """Check that samples of the shape of these images are pictures.

    Raises:
        ValueError: the images are not ``[B, C, H, W]``.
    """
    if images.dim() != 4:
        got, remedy = f"asks for pictures of samples of shape {list(images.shape)}", "leave it at 0"
        raise ValueError(error_message("train", "sample_every", got, "[B, 1 or 3, H, W]", remedy))
