# SPDX-License-Identifier: MIT
"""The steps of a loop: the noise levels it visits, the table compiled for them, and what a sampler says of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..errors import checked_integer, error_message
from ..schedules.levels import Level, Levels, Path
from ..solvers.table import StepTable

#: Timesteps or noise levels that a caller gives.
Numbers = Sequence[float] | Tensor


@dataclass(frozen=True)
class StepGrid:
    """The compiled steps of a loop.

    Attributes:
        levels: where the model is called in a first-order loop, and where the loop ends.
        table: one row a model call.
        sigmas: the noise level of each row and of the end, as `sample(sigmas=)` names them.
    """

    levels: Levels
    table: StepTable
    sigmas: tuple[float, ...]

    @property
    def timesteps(self) -> Tensor:
        """The model's time argument, one a model call: int64 where all are whole, else float32; on the CPU."""
        whole = all(timestep.is_integer() for timestep in self.table.timesteps)
        # In one conversion from float64: int64 cannot be read from numbers that are no ints.
        values = torch.tensor(self.table.timesteps, dtype=torch.float64, device="cpu")
        return values.to(torch.int64 if whole else torch.float32)


def step_grid(levels: Levels, table: StepTable, path: Path, *, from_noise: bool) -> StepGrid:
    """Put together the grid of a table that was compiled for some levels.

    Args:
        levels, table, path: of the loop.
        from_noise: the first sample is made from standard normal noise; False where it is given as it is.
    """
    if not from_noise:
        table = replace(table, initial_scale=1.0)
    return StepGrid(levels, table, row_sigmas(levels, table, path))


def row_sigmas(levels: Levels, table: StepTable, path: Path) -> tuple[float, ...]:
    """Return the noise level of each row's model call, churn left out, and of the end of the loop."""
    points = levels.points
    if len(table) == len(levels):
        return tuple(path.sigma_of(point) for point in points)
    # Solvers with several calls a step, which are at levels of their own or at the next one.
    known = {point.timestep: point for point in points[:-1]}
    rows = [known[t] if t in known else path.at_timestep(t) for t in table.timesteps]
    return tuple(path.sigma_of(point) for point in (*rows, points[-1]))


def given_levels(operation: str, path: Path, end: Level, timesteps: Numbers | None, sigmas: Numbers | None) -> Levels:
    """Return the levels of timesteps or of noise levels that a caller gives.

    Args:
        operation: who asks, for messages.
        path: of the noise schedule.
        end: the level where a loop over timesteps ends; one over sigmas ends at the clean sample.
        timesteps: descending, on the schedule; whole or not.
        sigmas: descending, σ/α or, on a flow schedule, σ = t; a last 0 is the clean end of the loop and no model call.

    Raises:
        TypeError, ValueError: neither or both are given, or the numbers are no descending levels of the schedule.
    """
    if timesteps is not None and sigmas is not None:
        raise ValueError(
            error_message(operation, "sigmas", "is given beside timesteps", "one of the two", "leave one out")
        )
    if timesteps is not None:
        values = numbers(operation, "timesteps", timesteps)
        return Levels((*(path.at_timestep(t) for t in values), end), path.at_ratio, path.at_timestep)
    values = numbers(operation, "sigmas", sigmas)
    if len(values) > 1 and values[-1] == 0.0:
        values.pop()
    for value in values:
        if not value > 0.0:
            got, expected = f"holds {value}", "levels above 0, and at most a last 0 for the end"
            raise ValueError(error_message(operation, "sigmas", got, expected, "leave out what is below"))
    points = *(path.at_sigma(sigma) for sigma in values), path.at_ratio(0.0)
    return Levels(points, path.at_ratio, path.at_timestep)


def from_step(operation: str, levels: Levels, start_step: int) -> Levels:
    """Return the levels from one step on.

    Raises:
        TypeError, ValueError: `start_step` is no integer, negative, or leaves no step.
    """
    first = checked_integer(operation, "start_step", start_step, 0)
    if first >= len(levels):
        got, expected = f"is {first}", f"0 to {len(levels) - 1} for {len(levels)} steps"
        raise ValueError(error_message(operation, "start_step", got, expected, "start earlier, or take more steps"))
    return replace(levels, points=levels.points[first:]) if first else levels


def numbers(operation: str, argument: str, values: Any) -> list[float]:
    """Return a tensor, an array or a sequence of finite or infinite numbers as floats.

    Raises:
        TypeError, ValueError: it holds something else, or nothing.
    """
    listed = values.tolist() if hasattr(values, "tolist") else values
    try:
        found = [float(value) for value in listed] if isinstance(listed, Iterable) else None
    except (TypeError, ValueError):
        found = None
    if found is None or isinstance(values, (str, bytes)):
        got = f"is a {type(values).__name__} that holds no row of numbers"
        raise TypeError(
            error_message(operation, argument, got, "a 1-D tensor or sequence", f"pass {argument} as a list")
        )
    if not found or any(math.isnan(value) for value in found):
        got = "holds NaN" if found else "is empty"
        raise ValueError(error_message(operation, argument, got, "one number a step", f"pass {argument} as a list"))
    return found
