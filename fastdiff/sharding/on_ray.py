# SPDX-License-Identifier: MIT
"""One job on the workers of a Ray cluster, as a Ray Data pipeline over the indices of its batches."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import checked_callable, checked_integer, error_message, require
from .folder import Draw, Outcome, ShardFolder
from .job import ShardJob
from .run import ShardReport, run_batches

#: Blocks of batches per worker: a worker that is faster takes more of them.
BLOCKS_PER_WORKER = 8


def sample_shards_on_ray(
    draw: Draw,
    folder: str | Path,
    n: int,
    *,
    batch_size: int = 64,
    seed: int = 0,
    file_format: str = "png",
    options: Mapping[str, Any] | None = None,
    address: str = "auto",
    workers: int | None = None,
    gpus_per_worker: float = 0,
    progress: bool | None = None,
) -> ShardReport:
    """Draw `n` images into a folder with the workers of a Ray cluster; the files are those of `sample_shards`.

    Each worker is an actor that holds `draw` and makes batches in the folder.  A batch that Ray runs again after a lost
    worker is skipped where it is complete.

    Args:
        draw, n, batch_size, seed, file_format, options, progress: of `sample_shards`.  `draw` is pickled once per
            worker: load the model at its first call.
        folder: path of the job's folder, on a disk that this process and all workers share.
        address: of the cluster: ``auto`` for the one that this process is connected to or that runs on this machine,
            ``HOST:PORT``, or ``local``, which starts one here without a dashboard and usage statistics.  A connection
            that is made here is closed at the end.
        workers: number of actors; None for one per CPU of the cluster, or per `gpus_per_worker` GPUs.
        gpus_per_worker: GPUs that Ray reserves for an actor.

    Raises:
        TypeError, ValueError, OSError: as in `sample_shards`, also from a worker.
        ConnectionError: there is no cluster at the address.
        RuntimeError: the cluster has no resources for a worker, or the folder is not shared.
        ImportError: ray or what Ray Data needs is missing.
    """
    checked_callable("sample_shards", "draw", draw, "a function of ids and seeds", "pass draw(ids, seeds)")
    if workers is not None:
        checked_integer("sample_shards", "workers", workers, 1)
    job = ShardJob(n, batch_size, seed, file_format, {} if options is None else options)
    ray = require("ray", "ray", "sample_shards")
    data = require("ray.data", "ray", "sample_shards")
    numpy = require("numpy", "ray", "sample_shards")
    shards = ShardFolder(folder, job)
    with _connected(ray, address, workers):
        count = _worker_count(ray, job, workers, gpus_per_worker)
        # Blocks that are in memory: a task that reads them would wait for a CPU that the actors hold.
        blocks = numpy.array_split(numpy.arange(job.batches), min(job.batches, count * BLOCKS_PER_WORKER))
        made = data.from_numpy(blocks).map_batches(
            _Worker,
            fn_constructor_args=(draw, str(shards.path.resolve()), job),
            batch_size=1,
            compute=data.ActorPoolStrategy(size=count),
            num_cpus=1,
            num_gpus=gpus_per_worker or None,
        )
        with _without_bars(data.DataContext.get_current()):
            report = run_batches(shards, _outcomes(ray, made), job.batches, progress)
    if report.manifest is None:
        got, remedy = f"is {str(shards.path)!r}, where batches of workers are missing", "name a folder on a shared disk"
        raise RuntimeError(error_message("sample_shards", "folder", got, "one that all workers share", remedy))
    return report


class _Worker:
    """Actor that makes batches in the job's folder."""

    def __init__(self, draw: Draw, folder: str, job: ShardJob) -> None:
        self._draw = draw
        self._shards = ShardFolder(folder, job)

    def __call__(self, rows: dict[str, Any]) -> dict[str, list[Any]]:
        (batch,) = (int(batch) for batch in rows["data"])
        try:
            outcome, error = self._shards.make(batch, self._draw).value, b""
        except Exception as raised:
            # An exception that passes through Ray Data arrives as text; as a value it keeps its type.
            outcome, error = "", require("ray.cloudpickle", "ray", "sample_shards").dumps(raised)
        return {"batch": [batch], "outcome": [outcome], "error": [error]}


def _outcomes(ray: Any, made: Any) -> Iterator[tuple[int, Outcome]]:
    """Yield batches and their outcomes; raise the exception of the first batch that failed."""
    for row in made.iter_rows():
        if row["error"]:
            raise ray.cloudpickle.loads(row["error"])
        yield int(row["batch"]), Outcome(row["outcome"])


@contextlib.contextmanager
def _without_bars(context: Any) -> Iterator[None]:
    """Turn off Ray Data's progress bars for a block."""
    before, context.enable_progress_bars = context.enable_progress_bars, False
    try:
        yield
    finally:
        context.enable_progress_bars = before


@contextlib.contextmanager
def _connected(ray: Any, address: str, workers: int | None) -> Iterator[None]:
    """Connect to a cluster for a block, unless this process is connected already."""
    if ray.is_initialized() and address == "auto":
        yield
        return
    arguments: dict[str, Any] = {}
    if address == "local":
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        arguments = {"num_cpus": workers, "include_dashboard": False}
    try:
        ray.init(address=address, log_to_driver=False, logging_level="error", **arguments)
    except (ConnectionError, ValueError, RuntimeError) as error:
        got, remedy = f"is {address!r}, where no cluster answers ({error})", "start one with: ray start --head"
        expected = "auto, local or HOST:PORT"
        raise ConnectionError(error_message("sample_shards", "address", got, expected, remedy)) from error
    try:
        yield
    finally:
        ray.shutdown()


def _worker_count(ray: Any, job: ShardJob, workers: int | None, gpus_per_worker: float) -> int:
    """Return the number of actors: at most one per batch, and at most as many as the cluster has room for.

    Raises:
        RuntimeError: the cluster has room for fewer.
    """
    found = ray.cluster_resources()
    room = int(found.get("CPU", 0))
    if gpus_per_worker:
        room = min(room, int(found.get("GPU", 0) / gpus_per_worker))
    if room < (workers or 1):
        got = f"is {workers or 1}, where the cluster has room for {room}"
        expected, remedy = "1 CPU per worker, and its GPUs", "ask for fewer workers, or add nodes"
        raise RuntimeError(error_message("sample_shards", "workers", got, expected, remedy))
    return min(job.batches, workers or room)
