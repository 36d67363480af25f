# SPDX-License-Identifier: MIT
"""Time of a step's log-probability, its replay and the replay's gradient beside the formula in torch.

Both take turns on one thread.  Times are of the processor (`time.process_time`), so that other work on the machine
changes them little; a figure is the median over the rounds, and a ratio the median of the rounds' ratios.  Run it with
``python -m benchmarks.log_prob``.
"""

from __future__ import annotations

import argparse
import gc
import math
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from fastdiff import ops
from fastdiff.row_layout import COLUMNS, PREDICTION_OUTPUT, PREDICTION_SAMPLE, PREV_SAMPLE
from fastdiff.schedules.levels import levels_from_flow_times
from fastdiff.solvers import Prediction
from fastdiff.solvers.flow_sde import flow_sde

from .conditions import conditions
from .timing import ratios

SHAPES = ((1, 4, 64, 64), (8, 4, 128, 128))
GUIDANCE_SCALE = 4.5
ROW = 1

Run = Callable[[], object]


def pairs(shape: tuple[int, ...]) -> dict[str, tuple[Run, Run]]:
    """Return for each line of the table fastdiff's call and the one in torch that gives the same."""
    table = flow_sde(levels_from_flow_times([1.0, 0.75, 0.5, 0.25, 0.0]), Prediction("flow_prediction"))
    coefficients = table.shared_coefficients(torch.float32, torch.device("cpu"))
    row = dict(zip(COLUMNS, table.coefficients[ROW, PREV_SAMPLE:].tolist(), strict=False))
    of_prediction = table.coefficients[ROW, [PREDICTION_SAMPLE, PREDICTION_OUTPUT]].tolist()
    of_sample = row["sample"] + of_prediction[0] * row["prediction"]
    of_output = row["model_output"] + of_prediction[1] * row["prediction"]
    sigma = row["noise"]
    sample, output, uncond, noise = (torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i in range(4))
    trained = output.clone().requires_grad_(), uncond.clone().requires_grad_()
    seeds = torch.arange(shape[0])
    guided = {"uncond": uncond, "guidance_scale": GUIDANCE_SCALE}
    prev = ops.step(sample, output, coefficients, ROW, noise=noise, **guided)[0]

    def formula(prev: Tensor, output: Tensor, uncond: Tensor) -> Tensor:
        mean = of_sample * sample + of_output * (uncond + GUIDANCE_SCALE * (output - uncond))
        density = -((prev - mean) ** 2) / (2 * sigma**2) - math.log(sigma) - 0.5 * math.log(2 * math.pi)
        return density.sum(tuple(range(1, density.dim())))

    def replay(output: Tensor, uncond: Tensor) -> Tensor:
        return ops.log_prob(prev, sample, output, coefficients, ROW, uncond=uncond, guidance_scale=GUIDANCE_SCALE)

    def step_then_formula(noise: Tensor) -> Tensor:
        return formula(ops.step(sample, output, coefficients, ROW, noise=noise, **guided)[0], output, uncond)

    return {
        "step with log-probability": (
            lambda: ops.step_log_prob(sample, output, coefficients, ROW, noise=noise, **guided),
            lambda: step_then_formula(noise),
        ),
        "the same with `seeds=`": (
            lambda: ops.step_log_prob(sample, output, coefficients, ROW, seeds=seeds, **guided),
            lambda: step_then_formula(torch.randn(shape)),
        ),
        "replay": (lambda: replay(output, uncond), lambda: formula(prev, output, uncond)),
        "replay and its gradient": (
            lambda: torch.autograd.grad(replay(*trained).sum(), trained),
            lambda: torch.autograd.grad(formula(prev, *trained).sum(), trained),
        ),
    }


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


def table(shapes: tuple[tuple[int, ...], ...], rounds: int, seconds: float) -> str:
    """Measure, and return the lines of a Markdown table."""
    lines = ["| | shape | fastdiff, µs | torch, µs | torch over fastdiff |", "|---" * 5 + "|"]
    for shape in shapes:
        for name, (ours, peer) in pairs(shape).items():
            a, b = measure(ours, peer, rounds, seconds)
            lines.append(
                f"| {name} | {'×'.join(map(str, shape))} | {statistics.median(a):.1f} | {statistics.median(b):.1f} | "
                f"{statistics.median(ratios(b, a)):.1f}× |"
            )
            print(lines[-1], flush=True)
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="+", default=["x".join(map(str, shape)) for shape in SHAPES])
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--seconds", type=float, default=0.01, help="a round's calls of one implementation")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    shapes = tuple(tuple(int(size) for size in shape.split("x")) for shape in given.shapes)
    text = table(shapes, given.rounds, given.seconds)
    print(f"\n{text}\n\n{conditions()}")


if __name__ == "__main__":
    main()
