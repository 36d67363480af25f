# SPDX-License-Identifier: MIT
"""A noise level for each part of a sample: frames, tokens or actions ``[B, T, ...]``, each denoised at its own pace.

The rows of a table are given to the parts by a matrix ``[K, T]``, one line an iteration of the loop: line k says which
row each part takes.  A part that is not stepped stays as it is, and its number says where it is: `WAITING` at the
table's first level, or `FINISHED` at its end.  Each iteration is one model call, with a timestep a part, and one step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .. import ops
from ..errors import checked_callable, checked_integer, checked_type, error_message
from ..guidance.guided_model import unwrap
from ..noise.generators import Generators, draw
from ..philox import as_seeds
from ..row_layout import NUM_REGISTERS, Variance, compute_dtype
from ..solvers.table import StepTable

#: Row indices of parts that are not stepped.
FINISHED, WAITING = -1, -2


def pyramid_rows(num_rows: int, parts: int, *, delay: int = 1, known: int = 0) -> Tensor:
    """Return the rows of parts that begin one after another: part p is `delay` iterations behind part p − 1.

    Diffusion forcing's pyramid schedule (arXiv 2407.01392, section 3.3); with ``delay=0`` all parts go together.

    Args:
        num_rows: R, the table's rows.
        parts: T.
        delay: iterations between the beginnings of neighbours, 0 or more.
        known: the first parts, which are given and stay as they are: first-frame conditioning.

    Returns:
        int64 ``[R + delay·(T − known − 1), T]`` on the CPU.

    Raises:
        TypeError, ValueError: a number is out of range.
    """
    rows, count = (checked_integer("pyramid_rows", n, v, 1) for n, v in (("num_rows", num_rows), ("parts", parts)))
    behind, given = (checked_integer("pyramid_rows", n, v, 0) for n, v in (("delay", delay), ("known", known)))
    if given >= count:
        got, expected = f"is {known}", f"fewer than the {parts} parts"
        raise ValueError(error_message("pyramid_rows", "known", got, expected, "leave at least one part to sample"))
    total = rows + behind * (count - given - 1)
    iteration, part = torch.arange(total)[:, None], torch.arange(count)
    index = iteration - behind * (part - given)
    index = torch.where(index >= rows, FINISHED, torch.where(index < 0, WAITING, index))
    return torch.where(part < given, FINISHED, index)


def rolling_rows(num_rows: int, parts: int) -> Tensor:
    """Return the rows of one move of a rolling window, whose parts are at evenly spaced levels.

    Before the move part p is (p + 1)/T of the table away from its end.  Each part takes R/T rows, after which part 0 is
    finished; the window then drops it, and takes up noise as its last part (arXiv 2402.09470; rolling action chunks).

    Args:
        num_rows: R, a multiple of `parts`.
        parts: T.

    Returns:
        int64 ``[R/T, T]`` on the CPU.

    Raises:
        TypeError, ValueError: a number is out of range, or the rows cannot be divided.
    """
    rows, count = (checked_integer("rolling_rows", n, v, 1) for n, v in (("num_rows", num_rows), ("parts", parts)))
    if rows % count != 0:
        got, expected = f"is {num_rows}", f"a multiple of the {parts} parts"
        raise ValueError(error_message("rolling_rows", "num_rows", got, expected, "take as many steps for each part"))
    stride = rows // count
    return torch.arange(stride)[:, None] + rows - stride * (torch.arange(count) + 1)


def part_timesteps(table: StepTable, rows: Tensor, *, finished: float = 0.0) -> Tensor:
    """Return the model's time argument of each part, float32 in the shape of `rows`.

    Args:
        table: the compiled sampler.
        rows: row indices, `WAITING` or `FINISHED`.
        finished: the time argument of finished parts.
    """
    times = torch.tensor([*table.timesteps, finished], dtype=torch.float32, device=rows.device)
    index = torch.where(rows == WAITING, 0, torch.where(rows == FINISHED, len(table), rows))
    return times[index]


@torch.no_grad()
def sample_parts(
    table: StepTable,
    model: Callable[..., object],
    sample: Tensor,
    rows: Tensor,
    *,
    history: Sequence[Tensor | None] | None = None,
    seeds: int | Sequence[int] | Tensor | None = None,
    generator: Generators = None,
    first_draw: int = 0,
    finished: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    """Step each part of the samples by its own rows.

    Args:
        table: the compiled sampler, such as ``sampler.table``; without thresholding or a learned variance.
        model: a callable ``(x, t)`` with t float32 ``[B, T]``; returns its output like x.
        sample: ``[B, T, ...]``, each part at the level of its first row: noise times ``table.initial_scale`` where it
            waits, the known part where it is finished.  Not written to.
        rows: int64 ``[K, T]`` or ``[K, B, T]``: from `pyramid_rows`, `rolling_rows` or one's own.
        history: four tensors like `sample` that a solver with memory reads and writes; its own where None.  A rolling
            window passes them on from move to move, shifted like the window.
        seeds: a seed for each sample, for solvers that add noise: iteration k draws the whole sample's noise of step
            ``first_draw + k``, of which each part takes its own.
        generator: one, or one a sample, in place of seeds.
        first_draw: the number of iterations that the seeds have been used for.
        finished: the model's time argument of finished parts.
        backend: forces one, as in `fastdiff.ops.step`.

    Returns:
        The samples, like `sample`.

    Raises:
        TypeError, ValueError: an argument does not fit.
    """
    _check(table, model, sample, rows)
    x = sample.clone(memory_format=torch.contiguous_format)
    slots = {slot for kept in table.kept_slots for slot in kept}
    own = [torch.zeros_like(x) if slot in slots else None for slot in range(NUM_REGISTERS)]
    memory = own if history is None else list(history)
    coefficients = table.coefficients_as(compute_dtype(x.dtype), x.device)
    keys = None if seeds is None else as_seeds(seeds, len(x), x.device)
    lines = rows.to(x.device).expand(len(x), -1, -1).transpose(0, 1) if rows.dim() == 2 else rows.to(x.device)
    draws = any(table.draws_noise)
    for k, line in enumerate(lines):
        output = unwrap(model(x, part_timesteps(table, line, finished=finished)))
        noise = None
        if draws and keys is None:
            noise = draw(x.shape, generator, dtype=x.dtype, device=x.device)
        x = ops.step_rows(
            x, output, coefficients, line.contiguous(), memory, noise=noise, seeds=keys if draws else None,
            noise_step=first_draw + k, out=None if output is x else x, backend=backend,
        )  # fmt: skip
    return x


def _check(table: StepTable, model: object, sample: Tensor, rows: Tensor) -> None:
    checked_type("sample_parts", "table", table, StepTable, "a StepTable", "pass sampler.table, or a solver's result")
    checked_callable("sample_parts", "model", model, "a callable (x, t)", "pass a function or a torch.nn.Module")
    checked_type("sample_parts", "sample", sample, Tensor, "a tensor [B, T, ...]", "pass parts as a dimension")
    checked_type("sample_parts", "rows", rows, Tensor, "an int64 tensor", "make it with pyramid_rows")
    if table.thresholding or table.variance is not Variance.FIXED:
        got = "thresholds x0" if table.thresholding else "has a learned variance"
        expected = "a table that needs no more than the model's output"
        raise ValueError(error_message("sample_parts", "table", got, expected, "choose another configuration"))
    shape = list(rows.shape)
    wanted = [list(sample.shape[1:2]), list(sample.shape[:2])]
    if sample.dim() < 2 or rows.dtype != torch.int64 or rows.dim() not in (2, 3) or shape[1:] != wanted[rows.dim() - 2]:
        got = f"is {rows.dtype} of shape {shape}"
        expected = f"int64 [K, T] or [K, B, T] for samples of shape {list(sample.shape)}"
        raise ValueError(error_message("sample_parts", "rows", got, expected, "give one row a part and iteration"))
    if (
        rows.device.type == "cpu"
        and rows.numel() > 0
        and not WAITING <= int(rows.min()) <= int(rows.max()) < len(table)
    ):
        got, expected = f"holds {int(rows.min())} to {int(rows.max())}", f"{WAITING} to {len(table) - 1}"
        raise ValueError(error_message("sample_parts", "rows", got, expected, "stay inside the table"))
