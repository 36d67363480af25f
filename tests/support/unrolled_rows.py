# SPDX-License-Identifier: MIT
"""Loops unrolled to linear maps: each sample as a vector of weights on the first sample, the outputs and the draws.

Every scheduler and every table is such a map.  Two of them are the same solver exactly where the vectors agree, in
whatever slots and coordinates they keep their tensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import torch

from fastdiff.diffusers.runtime import execute
from fastdiff.solvers.table import StepTable
from support.dropin_helpers import quiet
from support.solver_loops import Array, Outputs, Trace, evaluate


def _unit_vectors(calls: int) -> tuple[Array, Array, Array]:
    """Return the first sample, the output of each call and the draw of each call, by name."""
    units = np.eye(1 + 2 * calls)
    return units[0], units[1 : 1 + calls], units[1 + calls :]


def unroll(table: StepTable, scales: Sequence[float] | None = None) -> Array:
    """Return the sample after each row, ``[R, 1 + 2·R]``.

    Args:
        scales: the R + 1 factors of the coordinates, before each row and after the last: vectors are then those
            of x divided by them.
    """
    first, outputs, draws = _unit_vectors(len(table))
    traces: list[Trace] = []
    remaining = iter(outputs)
    start = first * (scales[0] if scales else 1.0)
    evaluate(table, lambda x, t: Outputs(next(remaining)), start, list(draws), trace=traces)
    found = np.stack([trace.outputs[0] for trace in traces])
    return found / np.array(scales[1:])[:, None] if scales else found


def unroll_scheduler(scheduler: Any, module: Any, calls: int, **options: Any) -> Array:
    """Return the sample after each step of one of diffusers' schedulers, as `unroll` does; the schedule is set.

    Args:
        module: the module of its class, whose draws are replaced, like those of the drop-ins.
        options: keyword arguments of ``step``.
    """
    first, outputs, draws = (torch.from_numpy(units)[..., None, None, :] for units in _unit_vectors(calls))
    sample, found = first[None], []
    for i, t in enumerate(scheduler.timesteps):
        scheduler.is_scale_input_called = True
        with quiet(), _draws(module, draws[i : i + 1]):
            sample = scheduler.step(outputs[i : i + 1].clone(), t, sample, return_dict=False, **options)[0]
        found.append(sample.reshape(-1).numpy().copy())
    return np.stack(found)


@contextmanager
def _draws(module: Any, noise: torch.Tensor) -> Iterator[None]:
    """Let a scheduler's module and the drop-ins draw the given tensor."""

    def draw(*args: Any, **kwargs: Any) -> torch.Tensor:
        return noise.clone()

    drop_ins = mock.patch.object(execute, "randn_like_diffusers", draw)
    with mock.patch.object(module, "randn_tensor", draw, create=True), drop_ins:
        yield
