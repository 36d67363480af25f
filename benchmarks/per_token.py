# SPDX-License-Identifier: MIT
"""Time of a flow-matching step with per-token timesteps, diffusers' and fastdiff's alternating in one run.

    python -m benchmarks.per_token

Loops of 8 steps with different, precomputed levels at each step, on one thread; medians of 15 rounds, in microseconds
per step.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

STEPS, ROUNDS = 8, 15


def main() -> None:
    """Print the table."""
    import diffusers

    from fastdiff.diffusers import CLASSES
    from fastdiff.diffusers.per_token import per_token_step

    torch.set_num_threads(1)
    print("| tokens × channels | | diffusers | fastdiff | times |\n|---|---|---|---|---|")
    for tokens, channels in ((256, 16), (4096, 128)):
        for dtype in (torch.float32, torch.bfloat16):
            for stochastic in (False, True):
                theirs = diffusers.FlowMatchEulerDiscreteScheduler(stochastic_sampling=stochastic)
                ours = CLASSES["FlowMatchEulerDiscreteScheduler"](stochastic_sampling=stochastic)
                sample, output = (torch.randn(1, tokens, channels).to(dtype) for _ in range(2))
                levels = [torch.rand(1, tokens) * 1000 for _ in range(STEPS)]
                given = {"model_output": output, "sample": sample, "return_dict": False}
                steps: list[tuple[Any, Callable[..., Any]]] = [
                    (theirs, theirs.step),
                    (ours, lambda ours=ours, **given: per_token_step(ours, given)),
                ]
                times: list[list[float]] = [[], []]
                for _ in range(ROUNDS):
                    for kind, (scheduler, step) in enumerate(steps):
                        times[kind].append(_loops(scheduler, step, given, levels, 32 if tokens == 256 else 2))
                a, b = map(statistics.median, times)
                what = str(dtype).removeprefix("torch.") + ", stochastic" * stochastic
                print(f"| {tokens} × {channels} | {what} | {a:.0f} | {b:.0f} | {a / b:.1f} |", flush=True)


def _loops(scheduler: Any, step: Callable[..., Any], given: dict[str, Any], levels: list[Any], loops: int) -> float:
    """Run loops and return microseconds per step."""
    spent = 0.0
    for _ in range(loops):
        scheduler.set_timesteps(STEPS)
        timesteps = list(scheduler.timesteps)
        start = time.perf_counter()
        for t, level in zip(timesteps, levels, strict=True):
            step(**given, timestep=t, per_token_timesteps=level)
        spent += time.perf_counter() - start
    return spent / (loops * STEPS) * 1e6


if __name__ == "__main__":
    main()
