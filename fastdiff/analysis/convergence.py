# SPDX-License-Identifier: MIT
"""Order of convergence of deterministic methods, measured on a mixture of Gaussians with known score."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import error_message
from ..sampling.stepper import Stepper
from ..schedules.levels import Levels, levels_from_half_log_snr, variance_preserving
from ..solvers import Prediction, SamplingMethod
from .compare import checked_methods
from .mixture import GaussianMixture
from .progress import with_progress
from .workload import MethodSpec, check_steps

#: λ = log(α/σ) of the first and of the last level: both are finite, so the error is that of the method alone.
FIRST, LAST = -4.0, 2.5
_MIXTURE = GaussianMixture([[-1.5], [0.3], [1.2]], [0.3, 0.5, 0.2], [0.3, 0.45, 0.25])


@dataclass(frozen=True)
class Convergence:
    """The error of a method by its number of steps.

    Attributes:
        method: its label.
        steps: in ascending order.
        model_calls: by steps.
        errors: root mean square error at the end, by steps.
        slope: order of convergence: the slope of log error over log steps between the last two numbers of steps.
    """

    method: str
    steps: tuple[int, ...]
    model_calls: tuple[int, ...]
    errors: tuple[float, ...]

    @property
    def slope(self) -> float:
        return math.log(self.errors[-2] / self.errors[-1]) / math.log(self.steps[-1] / self.steps[-2])


def measure_convergence(
    methods: Sequence[str | SamplingMethod | MethodSpec],
    steps: Sequence[int] = (10, 20, 40, 80, 160),
    *,
    points: int = 64,
    progress: bool | None = None,
) -> list[Convergence]:
    """Solve the probability-flow ODE of a mixture with each method, on levels that are uniform in λ, in float64.

    Options that lower the order of the last steps are off, since the last level has noise.

    Args:
        methods: names with options; deterministic ones.
        steps: two numbers of steps or more.
        points: how many starting points.
        progress: show a progress bar; None shows it where tqdm is installed.

    Raises:
        TypeError, ValueError: an argument is out of range, or a method draws noise.
    """
    operation = "measure_convergence"
    chosen = checked_methods(operation, methods)
    counts = check_steps(operation, steps)
    if len(counts) < 2:
        raise ValueError(
            error_message(operation, "steps", f"is {list(counts)}", "two numbers or more", "pass steps=(20, 40)")
        )
    tables = {
        (spec.label, count): spec.method.entry.table(_levels(count), Prediction(), **_options(spec))
        for spec in chosen
        for count in counts
    }
    for (label, _), table in tables.items():
        if any(table.draws_noise):
            got, remedy = f"holds {label!r}, which draws noise", "leave it out, or set its eta to 0"
            raise ValueError(error_message(operation, "methods", got, "deterministic methods", remedy))
    start = torch.randn(points, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    truth = solve_exactly(_MIXTURE, start)
    errors: dict[tuple[str, int], float] = {}
    for key, table in with_progress(tables.items(), len(tables), "convergence", progress):
        stepper, x = Stepper(table), start * table.initial_scale
        for timestep in table.timesteps:
            x = stepper.step(x, _epsilon(_MIXTURE, x, timestep))
        errors[key] = float((x - truth).square().mean().sqrt())
    return [
        Convergence(
            spec.label,
            counts,
            tuple(len(tables[spec.label, count]) for count in counts),
            tuple(errors[spec.label, count] for count in counts),
        )
        for spec in chosen
    ]


def solve_exactly(mixture: GaussianMixture, start: Tensor, steps: int = 500) -> Tensor:
    """Solve dx/dλ = σ²·x − σ·ε from `FIRST` to `LAST` by the classical Runge-Kutta method.

    Args:
        mixture: of the score ε.
        start: float64 ``[B, D]``.
        steps: of order 4; the error of 500 is near 1e-8.

    Returns:
        float64 ``[B, D]``.
    """

    def slope(x: Tensor, half_log_snr: float) -> Tensor:
        sigma = variance_preserving(math.exp(-half_log_snr), 0.0).sigma
        return sigma**2 * x - sigma * _epsilon(mixture, x, half_log_snr)

    h, x = (LAST - FIRST) / steps, start
    for i in range(steps):
        at = FIRST + i * h
        k1 = slope(x, at)
        k2 = slope(x + 0.5 * h * k1, at + 0.5 * h)
        k3 = slope(x + 0.5 * h * k2, at + 0.5 * h)
        k4 = slope(x + h * k3, at + h)
        x = x + (h / 6) * (k1 + 2 * k2 + 2 * k3 + k4)
    return x


def _epsilon(mixture: GaussianMixture, x: Tensor, half_log_snr: float) -> Tensor:
    return mixture.epsilon(x, variance_preserving(math.exp(-half_log_snr), half_log_snr))


def _levels(steps: int) -> Levels:
    return levels_from_half_log_snr([FIRST + (LAST - FIRST) * i / steps for i in range(steps + 1)])


def _options(spec: MethodSpec) -> dict[str, object]:
    options = spec.method.entry.options
    chosen = {name: value for name, value in spec.fields.items() if name in options}
    return {**({"lower_order_final": False} if "lower_order_final" in options else {}), **chosen}
