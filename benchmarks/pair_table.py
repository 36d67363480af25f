# SPDX-License-Identifier: MIT
"""Tables of pairs: fastdiff's call beside a peer's that gives the same, both in turns on one thread.

Times are of the processor (`time.process_time`), so that other work on the machine changes them little; a figure is the
median over the rounds, and a ratio the median of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable

import torch

from .conditions import conditions
from .timing import ratios

Shape = tuple[int, ...]
Run = Callable[[], object]
# Shape -> line of the table -> fastdiff's call and the peer's.
Pairs = Callable[[Shape], dict[str, tuple[Run, Run]]]


def measure(ours: Run, peer: Run, rounds: int, seconds: float) -> tuple[list[float], list[float]]:
    """Return microseconds a call of each, one for each round, whose calls take about `seconds`."""
    times: tuple[list[float], list[float]] = ([], [])
    calls = []
    for run in (ours, peer):
        for _ in range(3):
            run()
        started = time.process_time()
        for _ in range(10):
            run()
        calls.append(max(1, int(seconds * 10 / max(time.process_time() - started, 1e-6))))
    collecting = gc.isenabled()
    gc.disable()
    try:
        for turn in range(rounds):
            for i in (0, 1) if turn % 2 == 0 else (1, 0):
                run = (ours, peer)[i]
                started = time.process_time()
                for _ in range(calls[i]):
                    run()
                times[i].append((time.process_time() - started) / calls[i] * 1e6)
    finally:
        if collecting:
            gc.enable()
    return times


def table(pairs: Pairs, columns: tuple[str, str, str], shapes: tuple[Shape, ...], rounds: int, seconds: float) -> str:
    """Measure, and return the lines of a Markdown table; `columns` are the heads of both times and of the ratio."""
    lines = [f"| | shape | {' | '.join(columns)} |", "|---" * 5 + "|"]
    for shape in shapes:
        for name, (ours, peer) in pairs(shape).items():
            a, b = measure(ours, peer, rounds, seconds)
            lines.append(
                f"| {name} | {'×'.join(map(str, shape))} | {statistics.median(a):.1f} | {statistics.median(b):.1f} | "
                f"{statistics.median(ratios(b, a)):.1f}× |"
            )
            print(lines[-1], flush=True)
    return "\n".join(lines)


def run(
    description: str | None,
    pairs: Pairs,
    columns: tuple[str, str, str],
    shapes: tuple[Shape, ...],
    seconds: float,
    arguments: list[str] | None = None,
) -> None:
    """Read the command line, measure and print the table with its conditions.

    Args:
        description: of the command.
        pairs, columns: as in `table`.
        shapes: measured where the command line names none.
        seconds: how long a round's calls of one implementation take by default.
        arguments: the command line; that of the process where None.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--shapes", nargs="+", default=["x".join(map(str, shape)) for shape in shapes])
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--seconds", type=float, default=seconds, help="a round's calls of one implementation")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    chosen = tuple(tuple(int(size) for size in shape.split("x")) for shape in given.shapes)
    text = table(pairs, columns, chosen, given.rounds, given.seconds)
    print(f"\n{text}\n\n{conditions()}")
