# SPDX-License-Identifier: MIT
"""Kill soak: SIGKILL ends processes of a sampling job at random; the files must be those of an undisturbed run.

    python -m benchmarks.kill_soak                # 20 kills of a job of two processes, PNG and safetensors in turn
    python -m benchmarks.kill_soak --kills 5 --seed 3

Each start runs two processes of ``fastdiff sample --folder`` and kills each of them at a random instant of its own;
the next start is in the same folder.  A job that completes in spite of the kills is compared with an undisturbed run
byte by byte, and the next job begins, until there were enough kills; the last job is then completed and compared too.
The command fails where a file differs, is missing, or is left over.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

KILLS, WORLD_SIZE = 20, 2
IMAGES, BATCH_SIZE, STEPS = 400, 4, 5
FORMATS = ("png", "safetensors")


class Kill(NamedTuple):
    """A killed start: seconds to the last kill, processes killed, complete batches, and temporary files left."""

    seconds: float
    killed: int
    batches: int
    temporaries: int


def start(folder: Path, file_format: str, rank: int, world_size: int) -> subprocess.Popen[bytes]:
    """Start a process of a job."""
    command = [sys.executable, "-m", "fastdiff", "sample", "--quiet", "--n", str(IMAGES), "--steps", str(STEPS)]
    options = ["--batch-size", str(BATCH_SIZE), "--format", file_format, "--folder", str(folder)]
    environment = {**os.environ, "RANK": str(rank), "WORLD_SIZE": str(world_size), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([*command, *options], env=environment, stdout=subprocess.DEVNULL)


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
            with contextlib.suppress(subprocess.TimeoutExpired):
                processes[rank].wait(max(0.0, begun + instant - time.monotonic()))
            if processes[rank].poll() is None:
                processes[rank].send_signal(signal.SIGKILL)
                seconds = time.monotonic() - begun
        codes = [process.wait() for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    if not set(codes) <= {0, -signal.SIGKILL}:
        raise RuntimeError(f"kill_soak: the processes ended with {codes}, expected 0 or a kill; see their lines above")
    batches, temporaries = len(list(folder.glob("records/*.json"))), len(list(folder.rglob(".fastdiff-*.tmp")))
    count = codes.count(-signal.SIGKILL)
    return Kill(seconds, count, batches, temporaries) if count else None


def complete(folder: Path, file_format: str) -> dict[str, bytes]:
    """Run a job to its end in one process, and return the content of all files of its folder."""
    if start(folder, file_format, 0, 1).wait():
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
    parser.add_argument("--longest", type=float, default=10.0, help="longest seconds before a kill (default: 10)")
    parser.add_argument("--seed", type=int, help="seed of the instants (default: a fresh one)")
    options = parser.parse_args(arguments)
    if options.kills < 1 or not 0.0 < options.longest < 3600.0:
        parser.error("--kills takes 1 or more, --longest takes seconds above 0 and below 3600")
    seed = random.randrange(2**32) if options.seed is None else options.seed
    random.seed(seed)
    print(f"seed {seed}: {IMAGES} images in batches of {BATCH_SIZE}, {WORLD_SIZE} processes")
    print("{:<12}{:>4}{:>9}{:>8}{:>9}{:>12}".format("format", "job", "seconds", "killed", "batches", "temporaries"))
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
