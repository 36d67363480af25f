# SPDX-License-Identifier: MIT
"""One job over many processes: each takes every `world_size`-th batch."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import checked_callable, checked_integer, error_message
from ..sampling.loop import progress_bar
from .folder import Draw, Outcome, ShardFolder
from .job import ShardJob


@dataclass(frozen=True)
class ShardReport:
    """Result of a run.

    Attributes:
        drawn: batches drawn for the first time, by this process (with Ray: by all workers).
        skipped: batches that were complete before.
        remade: batches drawn again because a file or the record was missing, cut short or altered.
        images: images in the batches drawn and remade.
        manifest: path of the manifest; None as long as other processes have batches to make.
    """

    drawn: int
    skipped: int
    remade: int
    images: int
    manifest: Path | None


def sample_shards(
    draw: Draw,
    folder: str | Path,
    n: int,
    *,
    batch_size: int = 64,
    seed: int = 0,
    file_format: str = "png",
    options: Mapping[str, Any] | None = None,
    rank: int | None = None,
    world_size: int | None = None,
    progress: bool | None = None,
) -> ShardReport:
    """Draw this process' share of `n` images into a folder, and skip the batches that are complete there.

    Batch k has the image ids from k·batch_size on, whatever the number of processes, and process r takes the batches
    r, r + world_size, ….  The processes share the folder and nothing else: no process group is needed, they may start
    and end at any time, and a later run may have another number of them.

    Args:
        draw: returns the samples of image ids: ``draw(ids, seeds)``, with a range and a list of ints of the same length
            B, returns ``[B, ...]``.  It is called once per batch, and not at all where nothing is to be drawn.  An
            image's bits may depend on its id, its seed and the ids of its batch alone.
        folder: path of the job's folder; it is made where it is missing.  `fastdiff.sharding.folder` lists its files.
        n, batch_size, seed, file_format, options: of `ShardJob`.
        rank, world_size: index and number of processes; None for those of the environment (``RANK`` and
            ``WORLD_SIZE``, which torchrun sets), where there are none 0 and 1.
        progress: show a progress bar; None shows it in process 0 where tqdm is installed.

    Raises:
        TypeError, ValueError: an argument does not fit, the folder cannot be written to, or it holds a job with other
            options; nothing was drawn.  Or what `draw` returned does not fit.
        OSError: a file cannot be read or written, on a full disk for example; complete batches are unchanged.
        ImportError: Pillow or safetensors is missing.
    """
    checked_callable("sample_shards", "draw", draw, "a function of ids and seeds", "pass draw(ids, seeds)")
    job = ShardJob(n, batch_size, seed, file_format, {} if options is None else options)
    rank, world_size = process_rank(rank, world_size)
    shards = ShardFolder(folder, job)
    own = range(rank, job.batches, world_size)
    if progress is None and rank > 0:
        progress = False
    return run_batches(shards, ((batch, shards.make(batch, draw)) for batch in own), len(own), progress)


def run_batches(
    shards: ShardFolder, outcomes: Iterable[tuple[int, Outcome]], total: int, progress: bool | None
) -> ShardReport:
    """Count the outcomes of batches as they come, merge the manifest, and return the report."""
    counts: Counter[Outcome] = Counter()
    images = 0
    leftovers = set(shards.temporaries())
    with progress_bar(total, progress, unit="batch") as bar:
        for batch, outcome in outcomes:
            counts[outcome] += 1
            images += 0 if outcome is Outcome.SKIPPED else len(shards.job.ids(batch))
            bar.update()
    drawn, skipped, remade = (counts[outcome] for outcome in (Outcome.DRAWN, Outcome.SKIPPED, Outcome.REMADE))
    return ShardReport(drawn, skipped, remade, images, shards.merge(leftovers))


def process_rank(rank: int | None = None, world_size: int | None = None) -> tuple[int, int]:
    """Return index and number of processes, from the environment where they are None.

    Raises:
        TypeError, ValueError: one is no integer, or the index is not below the number.
    """
    rank = _from_environment("RANK", 0) if rank is None else checked_integer("sample_shards", "rank", rank, 0)
    if world_size is None:
        world_size = _from_environment("WORLD_SIZE", 1)
    world_size = checked_integer("sample_shards", "world_size", world_size, 1)
    if not 0 <= rank < world_size:
        got, expected = f"is {rank}", f"0 to {world_size - 1} for {world_size} processes"
        raise ValueError(error_message("sample_shards", "rank", got, expected, "number the processes from 0 on"))
    return rank, world_size


def _from_environment(name: str, default: int) -> int:
    """Return an environment variable as a number; `default` if it is unset or empty."""
    text = os.environ.get(name) or str(default)
    if not text.isascii() or not text.isdecimal() or len(text) > 9:
        got, remedy = f"is {text!r}", "unset it, or start the processes with torchrun"
        raise ValueError(error_message("sample_shards", f"the variable {name}", got, "a whole number", remedy))
    return int(text)
