# SPDX-License-Identifier: MIT
"""RePaint (arXiv 2201.09865): inpainting that goes back up the noise levels, to harmonize what was painted.

A step down is the solver's own, blended in the same pass with the known image under fresh noise (eq. 8).  A step up is
one step of the forward process (eq. 1), x_t = (α_t/α_s)·x_s + √(σ_t² − (α_t/α_s)²·σ_s²)·z, which is one fused step too.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import ops
from ..errors import checked_integer, error_message
from ..guidance import GuidedModel, Model
from ..noise.generators import Generators, draw
from ..philox import Purpose, purpose_of_draw
from ..row_layout import NUM_REGISTERS, PREV_SAMPLE, Variance, blank_row, compute_dtype
from ..samplers import BaseSampler
from ..sampling.blend_target import BlendTarget
from ..schedules.levels import Levels
from ..solvers.affine import NOISE, SAMPLE
from ..solvers.table import StepTable
from .masks import expand_mask
from .process import Process, guided, noise_for, noised, timesteps_of


def repaint_schedule(num_steps: int, jump_length: int = 10, jump_n_sample: int = 10) -> list[int]:
    """Return the levels that RePaint visits, as the number of steps still to take: from `num_steps` to 0.

    At every `jump_length`-th level on the way down, the last one before the end excepted, the walk goes `jump_length`
    levels up again, ``jump_n_sample − 1`` times (section 4.2 and appendix B).

    Args:
        num_steps: n, the steps of the loop.
        jump_length: j; n or more means no jumps.
        jump_n_sample: r, how often each stretch is walked; 1 means no jumps.

    Raises:
        TypeError, ValueError: a number is no integer of 1 or more.
    """
    n = checked_integer("repaint_schedule", "num_steps", num_steps, 1)
    length = checked_integer("repaint_schedule", "jump_length", jump_length, 1)
    walks = checked_integer("repaint_schedule", "jump_n_sample", jump_n_sample, 1)
    jumps = dict.fromkeys(range(1, n - length + 1, length), walks - 1)
    visited, at = [n], n
    while at > 0:
        at -= 1
        visited.append(at)
        if jumps.get(at, 0) > 0:
            jumps[at] -= 1
            visited += range(at + 1, at + length + 1)
            at += length
    return visited


@torch.no_grad()
def repaint(
    process: Process | BaseSampler,
    model: Model | GuidedModel,
    image: Tensor,
    mask: Tensor,
    *,
    jump_length: int = 10,
    jump_n_sample: int = 10,
    noise: Tensor | None = None,
    seeds: int | Sequence[int] | Tensor | None = None,
    generator: Generators = None,
    backend: str | None = None,
) -> Tensor:
    """Inpaint with resampling jumps.

    Args:
        process: a sampler or a process of a solver without history; RePaint's own is DDPM, DDIM with eta 1 is like it.
        model, image, mask: as in `fastdiff.editing.inpaint`.
        jump_length, jump_n_sample: of `repaint_schedule`.
        noise: the start's noise, like `image`; drawn where None.
        seeds: a seed for each sample, of all noise; a visit of the schedule counts as a step.
        generator: one, or one a sample, in place of seeds.
        backend: forces one, as in `fastdiff.ops.step`.

    Raises:
        TypeError, ValueError: an argument does not fit, or the solver keeps history, which no jump could restore.
    """
    process = Process.of(process)
    table, levels = process.table(), process.levels
    _check(table, levels)
    keep = 1 - expand_mask(mask, image)
    start, keys = noise_for(image, noise, seeds, generator)
    call, dtype = guided(model), compute_dtype(image.dtype, start.dtype)
    target = BlendTarget(image, None, process.reached(table))
    slots = target.slots(table)
    down = target.coefficients(table).to(device=image.device, dtype=dtype)
    up = _undo_rows(levels).to(device=image.device, dtype=dtype)
    timesteps = timesteps_of(table.timesteps, image.device)
    scale = call.guidance_scale if call.guided else None
    fresh = torch.empty_like(image)
    history: list[Tensor | None] = [None] * NUM_REGISTERS
    history[slots[0]], history[slots[1]] = image, fresh

    def drawn(visit: int, draw_number: int) -> Tensor:
        """Return one of a visit's draws where the step does not make it itself."""
        if keys is None:
            return draw(image.shape, generator, dtype=image.dtype, device=image.device)
        purpose = purpose_of_draw(draw_number, Purpose.STEP)
        return ops.randn(image.shape, keys, step=visit, purpose=purpose, dtype=image.dtype, device=image.device)

    sample = noised(image, start, levels[0], backend=backend)
    visited = repaint_schedule(len(levels), jump_length, jump_n_sample)
    for visit, (before, after) in enumerate(itertools.pairwise(visited)):
        row = len(levels) - max(before, after)
        if after > before:
            (sample,) = ops.step(
                sample, sample, up, row, noise=None if keys is not None else drawn(visit, 0), seeds=keys,
                noise_step=visit, out=(sample,), backend=backend,
            )  # fmt: skip
            continue
        output, uncond, variance = call(sample, timesteps[row], None)
        given = table.draws_noise[row] and keys is None
        fresh.copy_(drawn(visit, 1))
        (sample,) = ops.step(
            sample, output, down, row, uncond=uncond, guidance_scale=scale, history=history, mask=keep,
            noise=drawn(visit, 0) if given else None, seeds=keys, noise_step=visit,
            variance=variance, variance_kind=int(table.variance if variance is not None else Variance.FIXED),
            out=None if output is sample else (sample,), backend=backend,
        )  # fmt: skip
    return sample


def _undo_rows(levels: Levels) -> Tensor:
    """Return the rows of the steps up: row i goes from level i + 1 to level i."""
    rows = []
    for t, s in itertools.pairwise(levels.points):
        ratio = t.alpha / s.alpha
        undo = ratio * SAMPLE + math.sqrt(max(t.sigma**2 - (ratio * s.sigma) ** 2, 0.0)) * NOISE
        row = blank_row()
        row[PREV_SAMPLE : PREV_SAMPLE + len(undo.coefficients)] = undo.coefficients
        rows.append(row)
    return torch.tensor(rows, dtype=torch.float64)


def _check(table: StepTable, levels: Levels) -> None:
    got = ""
    if any(table.kept_slots):
        got = "keeps history"
    elif table.thresholding:
        got = "thresholds x0"
    elif list(table.timesteps) != levels.timesteps:
        got = "calls the model between the levels, or several times a step"
    if got:
        expected, remedy = "a solver of one step, one call and no history", "choose DDPM, DDIM or Euler"
        raise ValueError(error_message("repaint", "process", got, expected, remedy))
