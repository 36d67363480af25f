# SPDX-License-Identifier: MIT
"""Masks of an edit: checked and brought to the samples' shape once, before the loop, and the blend in a second pass."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import ops
from ..errors import checked_type, error_message
from ..row_layout import COLUMNS, KEEP_1, PREV_SAMPLE, blank_row, compute_dtype


def expand_mask(mask: Tensor, like: Tensor) -> Tensor:
    """Return a mask in the shape, dtype, layout and device of the samples.

    A step reads a mask like its samples.  Expanding is done once a loop, so that each step reads what it needs in the
    order of its memory.

    Args:
        mask: bool, or floating-point numbers from 0 to 1; like the samples or broadcast to them, such as
            ``[B, 1, H, W]``, ``[1, 1, H, W]`` or ``[H, W]``.
        like: the samples, ``[B, ...]``.

    Raises:
        TypeError, ValueError: the mask is no such tensor; the message says what it is.
    """
    remedy = "pass a bool mask, or numbers from 0 (kept) to 1 (painted)"
    checked_type("editing", "mask", mask, Tensor, "a tensor", remedy)
    if mask.dtype != torch.bool and not mask.is_floating_point():
        got, expected = f"has dtype {mask.dtype}", "bool or a floating-point dtype"
        raise TypeError(error_message("editing", "mask", got, expected, "convert it with .bool() or .float()"))
    if mask.device != like.device:
        raise ValueError(
            error_message("editing", "mask", f"is on {mask.device}", f"{like.device} like the samples", "move it there")
        )
    sizes = mask.shape[::-1], like.shape[::-1]
    if mask.dim() > like.dim() or any(own not in (1, size) for own, size in zip(*sizes, strict=False)):
        expected = f"a shape that broadcasts to {list(like.shape)}"
        fix = "give it the samples' last dimensions, with 1 for the channels"
        raise ValueError(error_message("editing", "mask", f"has shape {list(mask.shape)}", expected, fix))
    if mask.dtype != torch.bool and mask.numel() > 0 and not bool(((mask >= 0) & (mask <= 1)).all()):
        low, high = float(mask.min()), float(mask.max())
        raise ValueError(error_message("editing", "mask", f"holds {low:g} to {high:g}", "numbers from 0 to 1", remedy))
    return torch.empty_like(like).copy_(mask)


def blend(
    sample: Tensor,
    known: Tensor,
    mask: Tensor,
    *,
    noise: Tensor | None = None,
    alpha: float = 1.0,
    sigma: float = 0.0,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Blend samples with known ones at a noise level, in a pass of its own.

    For solvers that leave a step no room for it (two kept outputs, or three history slots); any other blends in the
    step's own pass, with `fastdiff.sampling.Stepper(target=...)`.  Both have the same bits where the mask is 0 or 1.

    Args:
        sample: x, ``[B, ...]``.
        known: x0, like `sample`.
        mask: w, like `sample` or broadcast to it: 0 keeps x, 1 takes α·known + σ·noise, to the bit.
        noise: ε, like `sample`; may be absent where σ is 0.
        alpha, sigma: α and σ of the level of `sample`.
        out: a tensor to write, which may be `sample`.
        backend: forces one, as in `fastdiff.ops.step`.

    Raises:
        TypeError, ValueError: an argument does not fit; nothing is written then.
    """
    if noise is None and sigma != 0.0:
        raise ValueError(
            error_message("blend", "noise", "is missing", f"noise beside sigma {sigma}", "pass noise=, or sigma=0.0")
        )
    table = blend_rows([(alpha, sigma)], compute_dtype(sample.dtype, known.dtype), sample.device)
    weights = mask if mask.shape == sample.shape and mask.is_floating_point() else expand_mask(mask, sample)
    return blended(sample, known, noise, weights, table, 0, out, backend)


def blend_rows(weights: list[tuple[float, float]], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return rows that keep the sample and have α·h_0 + σ·h_1 as the target of a mask."""
    rows = torch.tensor([blank_row()] * len(weights), dtype=torch.float64)
    rows[:, PREV_SAMPLE + COLUMNS.index("sample")] = 1.0
    first = KEEP_1 + COLUMNS.index("history_0")
    rows[:, first : first + 2] = torch.tensor(weights, dtype=torch.float64)
    return rows.to(device=device, dtype=dtype)


def blended(
    sample: Tensor,
    known: Tensor,
    noise: Tensor | None,
    mask: Tensor,
    table: Tensor,
    row: int,
    out: Tensor | None,
    backend: str | None,
) -> Tensor:
    """Blend by one of `blend_rows`, with a mask like the samples."""
    return ops.step(
        sample, sample, table, row, history=(known, noise), mask=mask, out=None if out is None else (out,),
        backend=backend,
    )[0]  # fmt: skip
