# SPDX-License-Identifier: MIT
"""Errors of a full memory, said with what to try."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ...errors import error_message
from ..config import DiffusionConfig

#: What torch's CPU allocator says.
_CPU_MESSAGES = ("can't allocate memory", "not enough memory")


@contextmanager
def explained_out_of_memory(config: DiffusionConfig, batch_size: int) -> Iterator[None]:
    """Raise an out-of-memory error of the block again, with a sentence on what to change.

    Args:
        config: whose unused options are named.
        batch_size: samples of the batch.

    Raises:
        torch.OutOfMemoryError: on an accelerator.
        MemoryError: on the CPU.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        on_cpu = isinstance(error, MemoryError) or any(text in str(error) for text in _CPU_MESSAGES)
        if not on_cpu and not isinstance(error, torch.OutOfMemoryError):
            raise
        advice = []
        if batch_size > 1:
            accumulated = 2 * config.gradient_accumulation_steps
            advice.append(f"halve batch_size to {batch_size // 2} with gradient_accumulation_steps={accumulated}")
        if not config.gradient_checkpointing:
            advice.append("set gradient_checkpointing=True")
        if config.mixed_precision == "no":
            advice.append("set mixed_precision='bf16'")
        advice.append("take a smaller model_channels or image_size")
        first = " ".join(str(error).split("\n")[0].split())
        message = error_message(
            "train", "memory", f"is full at {batch_size} samples a batch ({first})", "more of it", "; or ".join(advice)
        )
        raise (MemoryError if on_cpu else torch.OutOfMemoryError)(message) from error
