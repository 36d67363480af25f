# SPDX-License-Identifier: MIT
"""Overhead a step of own loops beside k-diffusion's functions, with a model that returns a ready tensor.

All take turns, loop by loop, on one thread; a figure is the median over the rounds, and a ratio the median of the
rounds' ratios.  Run it with ``python -m benchmarks.loops``.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastdiff import loops
from fastdiff.schedules.sigmas import get_sigmas_karras

from . import k_diffusion_peer
from .conditions import conditions
from .timing import ratios

#: Every function that k-diffusion has too.
METHODS = (
    "euler", "euler_ancestral", "heun", "dpm_2", "dpm_2_ancestral", "lms", "dpm_fast", "dpm_adaptive",
    "dpmpp_2s_ancestral", "dpmpp_sde", "dpmpp_2m", "dpmpp_2m_sde", "dpmpp_3m_sde",
)  # fmt: skip
STOCHASTIC = ("euler_ancestral", "dpm_2_ancestral", "dpmpp_2s_ancestral", "dpmpp_sde", "dpmpp_2m_sde", "dpmpp_3m_sde")
SHAPES = ((1, 4, 64, 64), (8, 4, 128, 128))
STEPS = 20

Run = Callable[[], Tensor]


def peers(method: str, shape: tuple[int, ...]) -> dict[str, Run]:
    """Return a loop of each implementation that is here, by name.

    Raises:
        ImportError: k-diffusion is not installed.
    """
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 14.6
    denoised = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    sigmas = get_sigmas_karras(STEPS, 0.03, 14.6, dtype=torch.float32)

    def model(x: Tensor, sigma: Tensor) -> Tensor:
        return denoised

    def call(module: Any, **options: Any) -> Run:
        function = getattr(module, f"sample_{method}")
        if method in ("dpm_fast", "dpm_adaptive"):
            arguments: tuple[Any, ...] = (0.03, 14.6, STEPS) if method == "dpm_fast" else (0.03, 14.6)
            return lambda: function(model, x, *arguments, disable=True, **options)
        return lambda: function(model, x, sigmas, disable=True, **options)

    found = {"fastdiff": call(loops), "k-diffusion": call(k_diffusion_peer.load_sampling())}
    if method in STOCHASTIC:
        found["fastdiff, seeds"] = call(loops, seeds=list(range(shape[0])))
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(2))
        ready = {"noise_sampler": lambda sigma, sigma_next: noise}
        found["fastdiff, ready noise"] = call(loops, **ready)
        found["k-diffusion, ready noise"] = call(k_diffusion_peer.load_sampling(), **ready)
    return found


def measure(method: str, shape: tuple[int, ...], rounds: int) -> dict[str, list[float]]:
    """Return microseconds a step of each implementation, one for each round; calls of the model count as steps."""
    runs = peers(method, shape)
    for run in runs.values():
        for _ in range(3):
            run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    collecting = gc.isenabled()
    gc.disable()
    try:
        for turn in range(rounds):
            for name in list(runs) if turn % 2 == 0 else reversed(list(runs)):
                started = time.perf_counter()
                runs[name]()
                times[name].append((time.perf_counter() - started) / STEPS * 1e6)
    finally:
        if collecting:
            gc.enable()
    return times


def table(methods: tuple[str, ...], shapes: tuple[tuple[int, ...], ...], rounds: int) -> str:
    """Measure, and return the lines of a Markdown table."""
    lines = ["| loop | shape | fastdiff | k-diffusion | times | seeds= | ready noise |", "|---" * 7 + "|"]
    for shape in shapes:
        for method in methods:
            times = measure(method, shape, rounds)
            ours = times["fastdiff"]

            def over(name: str, other: str = "fastdiff", times: dict[str, list[float]] = times) -> str:
                return f"{statistics.median(ratios(times[name], times[other])):.1f}×" if name in times else ""

            def shown(name: str, times: dict[str, list[float]] = times) -> str:
                return f"{statistics.median(times[name]):.1f}" if name in times else ""

            seeded = ready = ""
            if method in STOCHASTIC:
                seeded = f"{shown('fastdiff, seeds')} ({over('k-diffusion', 'fastdiff, seeds')})"
                ready = over("k-diffusion, ready noise", "fastdiff, ready noise")
            lines.append(
                f"| {method} | {'×'.join(map(str, shape))} | {statistics.median(ours):.1f} | {shown('k-diffusion')} | "
                f"{over('k-diffusion')} | {seeded} | {ready} |"
            )
            print(lines[-1], flush=True)
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--shapes", nargs="+", default=["x".join(map(str, shape)) for shape in SHAPES])
    parser.add_argument("--rounds", type=int, default=61)
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    shapes = tuple(tuple(int(size) for size in shape.split("x")) for shape in given.shapes)
    text = table(tuple(given.methods), shapes, given.rounds)
    print(f"\n{text}\n\n{conditions()}")


if __name__ == "__main__":
    main()
