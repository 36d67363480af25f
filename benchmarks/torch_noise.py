# SPDX-License-Identifier: MIT
"""What a draw of torch's float32 normal numbers on the CPU costs, by torch.randn and by `fastdiff.noise.torch_normals`.

    python -m benchmarks.torch_noise                       # three shapes, one thread and all
    python -m benchmarks.torch_noise --shapes 2x16 --threads 1 --rounds 51 --json FILE

Both take turns on generators that hold the same numbers; how many times longer torch takes is told round by round.
torch draws on one thread whatever it has.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdiff.command import CommandParser, run_command
from fastdiff.files import check_writable, write_whole
from fastdiff.noise.torch_normals import torch_randn, why_by_torch

from .conditions import conditions
from .measure import quantiles, ratios

SHAPES = "1x4x64x64,4x128x128,1x16x21x90x160"

#: Numbers that one timing draws at least, so that reading the clock does not count.
_NUMBERS = 1 << 18


def measure(shape: tuple[int, ...], threads: int, rounds: int) -> dict[str, Any]:
    """Microseconds a draw of each, and how many times longer torch takes: medians and spread over the rounds."""
    by: dict[str, Callable[[torch.Generator], Tensor]] = {
        "torch": lambda g: torch.randn(shape, generator=g, device="cpu", dtype=torch.float32),
        "fastdiff": lambda g: torch_randn(shape, g, device="cpu", dtype=torch.float32),
    }
    generators = {name: torch.Generator("cpu").manual_seed(0) for name in by}
    calls = max(1, _NUMBERS // math.prod(shape))
    times: dict[str, list[float]] = {name: [] for name in by}
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for turn in range(rounds + 1):
            for name, draw in by.items():
                generator = generators[name]
                started = time.perf_counter()
                for _ in range(calls):
                    draw(generator)
                elapsed = time.perf_counter() - started
                if turn > 0:  # the first wakes threads and finds memory
                    times[name].append(elapsed / calls * 1e6)
    finally:
        torch.set_num_threads(before)
    found = {name: quantiles(taken) for name, taken in times.items()}
    return {**found, "times": quantiles(ratios(times["torch"], times["fastdiff"]))}


def main(arguments: list[str] | None = None) -> None:
    """Print the table, and store it where asked."""
    parser = CommandParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default=SHAPES, help="with commas between")
    parser.add_argument("--threads", default=f"1,{torch.get_num_threads()}", help="with commas between")
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args(arguments)
    if chosen.json is not None:
        check_writable(chosen.json, operation="torch_noise", argument="--json")
    if why_by_torch():
        parser.exit(1, f"there is nothing to compare, torch draws here: {why_by_torch()}\n")
    print("| shape | threads | torch.randn µs | fastdiff µs | times |")
    print("|---|---|---|---|---|")
    lines = []
    for text in chosen.shapes.split(","):
        for threads in dict.fromkeys(int(count) for count in chosen.threads.split(",")):
            line = measure(tuple(int(size) for size in text.split("x")), threads, chosen.rounds)
            figures = " | ".join(f"{line[what]['median']:.1f}" for what in ("torch", "fastdiff", "times"))
            print(f"| {text} | {threads} | {figures} |", flush=True)
            lines.append({"shape": text, "threads": threads, **line})
    if chosen.json is not None:
        text = json.dumps({"conditions": conditions(), "lines": lines}, indent=1) + "\n"
        write_whole(chosen.json, text.encode(), operation="torch_noise", argument="--json")


if __name__ == "__main__":
    sys.exit(run_command("torch_noise", main))
