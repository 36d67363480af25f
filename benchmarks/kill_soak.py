# SPDX-License-Identifier: MIT
"""Kill soak: SIGKILL ends processes of a sampling job at random; the files must be those of an undisturbed run.

    python -m benchmarks.kill_soak                # 20 kills of a job of two processes, PNG and safetensors in turn
    python -m benchmarks.kill_soak --kills 5 --seed 3

Each start runs the two processes of a job, which draws digits with the packaged model, and kills each of them at a
random instant of its own; the next start is in the same folder.  The processes are forked from this one, which has
torch imported and uses one thread: they are at work at once, so that kills hit the work.  A job that completes in
spite of the kills is compared with an undisturbed run byte by byte, and the next job begins, until there were enough
kills; the last job is then completed and compared too.  The command fails where a file differs, is missing, or is left
over.
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastdiff.digits.batches import DigitBatches
from fastdiff.sharding import sample_shards

KILLS, LONGEST, WORLD_SIZE = 20, 4.0, 2
IMAGES, BATCH_SIZE, STEPS = 160, 4, 4
FORMATS = ("png", "safetensors")


class Kill(NamedTuple):
    """A killed start: seconds to the last kill, processes killed, complete batches, and temporary files left."""

    seconds: float
    killed: int
    batches: int
    temporaries: int


def start(folder: Path, file_format: str, rank: int, world_size: int) -> BaseProcess:
    """Start a process of a job."""
    process = multiprocessing.get_context("fork").Process(target=share, args=(folder, file_format, rank, world_size))
    process.start()
    return process


def share(folder: Path, file_format: str, rank: int, world_size: int) -> None:
    """Draw a process' share of the digits into a folder."""
    torch.set_num_threads(1)
    digits = DigitBatches(range(10), IMAGES, {"num_inference_steps": STEPS}, guidance_scale=3.0)
    job: dict[str, Any] = {"batch_size": BATCH_SIZE, "file_format": file_format, "progress": False}
    sample_shards(digits, folder, IMAGES, **job, rank=rank, world_size=world_size)


def disturbed_run(folder: Path, file_format: str, longest: float) -> Kill | None:
    """Start a job's processes and kill each at a random instant; return None if all had ended before.

    Raises:
        RuntimeError: a process failed by itself.
    """
    processes = [start(folder, file_format, rank, WORLD_SIZE) for rank in range(WORLD_SIZE)]
    begun = time.monotonic()
    instants = sorted((random.uniform(0.0, longest), rank) for rank in range(WORLD_SIZE))
    seconds = 0.0
    try:
        for instant, rank in instants:
            processes[rank].join(max(0.0, begun + instant - time.monotonic()))
            if processes[rank].is_alive():
                processes[rank].kill()
                seconds = time.monotonic() - begun
    finally:
        for process in processes:
            process.kill()
            process.join()
    codes = [process.exitcode for process in processes]
    if not set(codes) <= {0, -signal.SIGKILL}:
        raise RuntimeError(f"kill_soak: the processes ended with {codes}, expected 0 or a kill; see their lines above")
    batches, temporaries = len(list(folder.glob("records/*.json"))), len(list(folder.rglob(".fastdiff-*.tmp")))
    count = codes.count(-signal.SIGKILL)
    return Kill(seconds, count, batches, temporaries) if count else None


def complete(folder: Path, file_format: str) -> dict[str, bytes]:
    """Run a job to its end in one process, and return the content of all files of its folder."""
    process = start(folder, file_format, 0, 1)
    process.join()
    if process.exitcode:
        raise RuntimeError("kill_soak: the undisturbed run failed; see its line above")
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def soak(folder: Path, file_format: str, kills: int, longest: float) -> list[str]:
    """Kill processes of jobs in one format; print each kill; return the names of the files that differ.

    Args:
        folder: empty; it will hold the jobs.
        file_format: of the images.
        kills: the number of starts that are killed.
        longest: longest time from a start to its kill, in seconds.
    """
    expected = complete(folder / "undisturbed", file_format)
    differing: list[str] = []
    job = done = 0
    while True:
        current = folder / f"job-{job}"
        kill = disturbed_run(current, file_format, longest) if done < kills else None
        if kill is not None:
            done += 1
            print(
                f"{file_format:<12}{job:>4}{kill.seconds:>9.2f}{kill.killed:>8}{kill.batches:>9}{kill.temporaries:>12}"
            )
            sys.stdout.flush()
            continue
        found = complete(current, file_format)
        names = [name for name in sorted(expected.keys() | found.keys()) if expected.get(name) != found.get(name)]
        differing += [f"job-{job}/{name}" for name in names]
        print(f"{file_format:<12}{job:>4}  complete: {len(found)} files, {len(names)} of them differ", flush=True)
        job += 1
        if done == kills:
            return differing


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the kills and the comparisons; return 1 if a file differs."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kill_soak", description=str(__doc__).partition("\n")[0])
    parser.add_argument("--kills", type=int, default=KILLS, help=f"starts that are killed (default: {KILLS})")
    parser.add_argument("--longest", type=float, default=LONGEST, help=f"seconds before a kill (default: {LONGEST:g})")
    parser.add_argument("--seed", type=int, help="seed of the instants (default: a fresh one)")
    options = parser.parse_args(arguments)
    if options.kills < 1 or not 0.0 < options.longest < 3600.0:
        parser.error("--kills takes 1 or more, --longest takes seconds above 0 and below 3600")
    seed = random.randrange(2**32) if options.seed is None else options.seed
    random.seed(seed)
    print(f"seed {seed}: {IMAGES} images in batches of {BATCH_SIZE}, {WORLD_SIZE} processes")
    print(
        "{:<12}{:>4}{:>9}{:>8}{:>9}{:>12}".format("format", "job", "seconds", "killed", "batches", "temporaries"),
        flush=True,
    )
    differing = []
    for i, file_format in enumerate(FORMATS):
        kills = options.kills // len(FORMATS) + (i < options.kills % len(FORMATS))
        if kills:
            with tempfile.TemporaryDirectory() as folder:
                differing += soak(Path(folder), file_format, kills, options.longest)
    print(f"{options.kills} kills, {len(differing)} files differ: {', '.join(differing) or 'none'}")
    return int(bool(differing))


if __name__ == "__main__":
    sys.exit(main())
