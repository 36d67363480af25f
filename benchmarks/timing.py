# SPDX-License-Identifier: MIT
"""Alternating timing: each round times every implementation once, so that a change of speed affects all of them."""

from __future__ import annotations

import gc
import itertools
import statistics
import time
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from .cases import Case
from .copy_bandwidth import STORES, copies_for, copy_loop, why_absent
from .peers import RepeatingLoop, repeating_loops

CACHES = ("warm", "cold")


class Rotation:
    """Round-robin over repeating loops: a step of the first, a step of the second, and so on, across timing rounds.

    The loops start at different steps of their `loop_length`, so that every part of the rotation contains all steps.
    """

    def __init__(self, made: Sequence[RepeatingLoop], loop_length: int) -> None:
        self.steps = made[0].steps
        self._endless = itertools.cycle([loop.advance for loop in made])
        self._calls = 1
        # A single loop is timed in whole loops, because its steps differ.
        self._unit = max(1, loop_length // self.steps) if len(made) == 1 else 1
        for i, loop in enumerate(made if self.steps == 1 else ()):
            for _ in range(i % loop_length):
                loop.advance()

    def calibrate(self, seconds: float) -> None:
        """Choose the number of steps per round that fits into `seconds`."""
        self.time(1)  # compile, allocate, fill caches
        unit = self._unit
        calls, elapsed = unit, 0.0
        while True:
            started = time.perf_counter()
            self.time(calls)
            elapsed = time.perf_counter() - started
            if elapsed > seconds / 4:
                break
            calls *= 4
        self._calls = max(unit, int(calls * seconds / elapsed) // unit * unit)

    def time(self, calls: int | None = None) -> float:
        """Take steps and return microseconds per step."""
        calls = calls or self._calls
        advances = list(itertools.islice(self._endless, calls))
        started = time.perf_counter()
        for advance in advances:
            advance()
        return (time.perf_counter() - started) / (calls * self.steps) * 1e6


def measure(
    case: Case, cache: str, peers: Iterable[str], *, rounds: int, seconds: float, absent: dict[str, str] | None = None
) -> dict[str, Any]:
    """Measure one line of the table: microseconds per step of fastdiff and each peer, ratios, share of copy bandwidth.

    Args:
        case: the case.
        cache: "warm": the same tensors at every step; "cold": more sets of them than a cache holds.
        peers: names of the peers.
        rounds: number of rounds; a figure is the median over them.
        seconds: total time per implementation.
        absent: receives the missing peers and the reason.
    """
    rotations = _rotations(case, cache, peers, {} if absent is None else absent)
    samples: dict[str, list[float]] = {name: [] for name in rotations}
    collecting = gc.isenabled()
    gc.disable()
    try:
        for rotation in rotations.values():
            rotation.calibrate(seconds / rounds)
        for turn in range(rounds):
            for name in list(rotations) if turn % 2 == 0 else reversed(list(rotations)):
                samples[name].append(rotations[name].time())
    finally:
        if collecting:
            gc.enable()
    return _line(case, cache, samples)


def _rotations(case: Case, cache: str, peers: Iterable[str], absent: dict[str, str]) -> dict[str, Rotation]:
    sets = case.tensors(copies_for(cache, 3 * case.tensor_bytes))
    loop = len(case.table)
    rotations = {"fastdiff": Rotation(repeating_loops("fastdiff", case, sets), loop)}
    for peer in peers:
        try:
            rotations[peer] = Rotation(repeating_loops(peer, case, sets), loop)
        except (ImportError, RuntimeError) as error:
            absent[peer] = str(error)
    if why_absent():
        absent["copy"] = why_absent()
    else:
        for stores in STORES:
            rotations[f"copy, {stores} stores"] = Rotation([copy_loop(case.bytes_a_step, cache, stores)], 1)
    return rotations


def _line(case: Case, cache: str, samples: dict[str, list[float]]) -> dict[str, Any]:
    copies = {name: values for name, values in samples.items() if name.startswith("copy, ")}
    ours = samples["fastdiff"]
    line: dict[str, Any] = {
        "op": case.op,
        "shape": list(case.shape),
        "dtype": case.dtype,
        "threads": torch.get_num_threads(),
        "cache": cache,
        "steps": len(case.table),
        "bytes": case.bytes_a_step,
        "microseconds": {name: quantiles(values) for name, values in samples.items()},
        "over_fastdiff": {
            name: quantiles(ratios(values, ours))
            for name, values in samples.items()
            if name not in copies and name != "fastdiff"
        },
        "share_of_copy": None,
    }
    if copies:
        best = min(copies, key=lambda name: statistics.median(copies[name]))
        line["copy"] = best.removeprefix("copy, ")
        line["copy_bytes_a_second"] = case.bytes_a_step / statistics.median(copies[best]) * 1e6
        line["share_of_copy"] = quantiles(ratios(copies[best], ours))
    return line


def ratios(over: Sequence[float], under: Sequence[float]) -> list[float]:
    """Return the ratios round by round, which cancels a slowdown of a whole round."""
    return [a / b for a, b in zip(over, under, strict=True)]


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """Return the median and the quantiles at 20 and 80 %."""
    if len(values) == 1:
        return {"median": values[0], "p20": values[0], "p80": values[0]}
    low, *_, high = statistics.quantiles(values, n=5, method="inclusive")
    return {"median": statistics.median(values), "p20": low, "p80": high}
