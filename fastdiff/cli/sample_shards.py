# SPDX-License-Identifier: MIT
"""``fastdiff sample --folder``: one process' share of the images, or all of them with Ray."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .. import __version__, ops
from ..errors import checked_integer
from ..sharding import ShardReport, process_rank, sample_shards, sample_shards_on_ray
from .sample_sources import SampleSource

BATCH_SIZE = 64


def draw_shards(
    source: SampleSource,
    *,
    n: int,
    seed: int,
    folder: Path,
    batch_size: int,
    file_format: str,
    device: str,
    backend: str | None,
    ray: str | None,
    workers: int | None,
    threads: int,
    progress: bool,
    check_device: Callable[[str], None],
) -> ShardReport:
    """Draw images into a folder and print a line about it; see ``fastdiff sample --help``."""
    rank, world_size = process_rank()
    # Everything that decides the bits; the folder refuses other values, the versions of another process included.
    options = {
        **source.options,
        "device": device.partition(":")[0],
        "backend": backend,
        "threads": checked_integer("sample", "--threads", threads, 1),
        "fastdiff": __version__,
        "torch": torch.__version__,
    }
    if ray is None:
        device = local_device(device)
        check_device(device)
        ops.backend_for(torch.empty(0, device=device), backend, "sample")
    batches = source.make_batches(n, device=device, backend=backend, threads=threads)
    job: dict[str, Any] = {"batch_size": batch_size, "seed": seed, "file_format": file_format, "options": options}
    if ray is None:
        report = sample_shards(batches, folder, n, **job, progress=None if progress else False)
        name = f"process {rank} of {world_size}"
    else:
        os.environ.setdefault("RAY_DATA_LOG_LEVEL", "ERROR")  # read when ray is imported
        gpus = 0 if options["device"] == "cpu" else 1
        on_cluster: dict[str, Any] = {"address": ray, "workers": workers, "gpus_per_worker": gpus}
        report = sample_shards_on_ray(batches, folder, n, **job, **on_cluster, progress=None if progress else False)
        name = "Ray"
    end = f"{report.manifest}" if report.manifest else "other processes have batches left"
    print(
        f"{name}: {report.images} images in {report.drawn + report.remade} batches "
        f"({report.remade} of them made again), {report.skipped} batches skipped; {end}"
    )
    return report


def local_device(device: str) -> str:
    """Return the device of this process: for ``cuda`` under torchrun the GPU of its ``LOCAL_RANK``."""
    local_rank = os.environ.get("LOCAL_RANK")
    return f"{device}:{local_rank}" if local_rank and device == "cuda" else device
