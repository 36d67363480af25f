# SPDX-License-Identifier: MIT
"""Inversion: from an image back to the noise that a deterministic solver makes it from, and the way there again."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import checked_integer, checked_type, error_message
from ..guidance import GuidedModel, Model
from ..samplers import BaseSampler
from ..sampling.stepper import Stepper
from ..solvers.inversion import ddim_inversion
from ..solvers.table import StepTable
from .process import Process, guided, walk


@torch.no_grad()
def invert(
    process: Process | BaseSampler,
    model: Model | GuidedModel,
    image: Tensor,
    *,
    iterations: int = 1,
    corrections: int = 1,
    backend: str | None = None,
) -> Tensor:
    """Return the noise from which a solver makes an image.

    The levels are walked upwards by DDIM inversion, each step solved by fixed-point iteration
    (`fastdiff.solvers.inversion`), which inverts DDIM and Euler up to its convergence.  Any other deterministic solver
    (DPM-Solver++, Heun) differs from DDIM by its higher order: each correction samples with that solver from the noise
    found so far, and moves the image that is inverted by what was missed, y ← y + (image − F(G(y))).

    Args:
        process: a sampler or a process, deterministic and without clipping.
        model: a callable ``(x, t)``, or a `fastdiff.guidance.GuidedModel`; high guidance scales converge slowly.
        image: x0, ``[B, ...]``; not written to.
        iterations: model calls a step, 1 or more; 1 is the usual DDIM inversion.  More help DDIM and Euler only.
        corrections: 0 or more; each takes a loop of the solver and another inversion.  0 with 2 or 3 iterations is
            best for DDIM and Euler, 1 with 1 iteration serves every solver.  They do not converge where the solver is
            not one-to-one, as DPM-Solver++(3M) on few leading timesteps: docs/editing.md.
        backend: forces one, as in `fastdiff.ops.step`.

    Returns:
        The sample at the first level, like `image`: `reconstruct` makes the image from it.

    Raises:
        TypeError, ValueError: an argument does not fit, or the solver adds noise or bounds x0.
    """
    process = Process.of(process)
    checked_type("invert", "image", image, Tensor, "a tensor [B, ...]", "pass images as a batch")
    count = checked_integer("invert", "corrections", corrections, 0)
    upwards, table, call = (
        ddim_inversion(process.levels, process.prediction, iterations=iterations),
        process.table(),
        guided(model),
    )
    if any(table.draws_noise):
        remedy = "set eta or s_churn to 0, or choose DDIM or DPM-Solver++"
        raise ValueError(error_message("invert", "process", "adds noise", "a deterministic solver", remedy))

    def run(rows: StepTable, sample: Tensor) -> Tensor:
        return walk(Stepper(rows, backend=backend), call, _own(sample))

    target = image
    latents = run(upwards, target)
    for _ in range(count):
        target = target + (image - run(table, latents))
        latents = run(upwards, target)
    return latents


@torch.no_grad()
def reconstruct(
    process: Process | BaseSampler, model: Model | GuidedModel, latents: Tensor, *, backend: str | None = None
) -> Tensor:
    """Sample from latents at the first level, as they are: the way back of `invert`.

    Args:
        process, model, backend: as in `invert`.
        latents: ``[B, ...]``; not written to.
    """
    process = Process.of(process)
    return walk(Stepper(process.table(), backend=backend), guided(model), _own(latents))


def _own(sample: Tensor) -> Tensor:
    return sample.clone(memory_format=torch.contiguous_format)
