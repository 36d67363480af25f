# SPDX-License-Identifier: MIT
"""Time of a step's log-probability, its replay and the replay's gradient beside the formula in torch.

Both take turns on one thread, see benchmarks/pair_table.py.  Run it with ``python -m benchmarks.log_prob``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastdiff import ops
from fastdiff.row_layout import COLUMNS, PREDICTION_OUTPUT, PREDICTION_SAMPLE, PREV_SAMPLE
from fastdiff.schedules.levels import levels_from_flow_times
from fastdiff.solvers import Prediction
from fastdiff.solvers.flow_sde import flow_sde

from . import pair_table
from .pair_table import Run

SHAPES = ((1, 4, 64, 64), (8, 4, 128, 128))
GUIDANCE_SCALE = 4.5
ROW = 1


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


def main(arguments: list[str] | None = None) -> None:
    pair_table.run(__doc__, pairs, ("fastdiff, µs", "torch, µs", "torch over fastdiff"), SHAPES, 0.01, arguments)


if __name__ == "__main__":
    main()
