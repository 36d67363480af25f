# SPDX-License-Identifier: MIT
"""Noise that belongs to a seed: the numbers that the step draws, on their own."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import checked_type, error_message, shown
from ..philox import Purpose, as_seeds, normals
from . import backends
from .checks import DTYPES, as_number
from .fallback import backend_to_run
from .layout import in_memory
from .vmap import fold_randn


def randn(
    shape: Sequence[int],
    seeds: int | Sequence[int] | Tensor,
    step: int | Tensor = 0,
    purpose: int = Purpose.LATENTS,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
    *,
    backend: str | None = None,
) -> Tensor:
    """Standard normal noise, each sample's from its own seed.

    A sample's numbers depend on its seed, `step`, `purpose` and the element's place in row-major order, and on nothing
    else: they are the same bits alone or in any batch, on the CPU and on GPUs, for any number of threads.  With
    ``purpose=Purpose.STEP`` they are the numbers that `fastdiff.ops.step` draws where it is given ``seeds=``.
    (Philox4x32-10 under Box–Muller; see `fastdiff.philox`.)

    Args:
        shape: of the result, ``[B, ...]``.
        seeds: one for each sample, 0 to 2⁶⁴ − 1: ints, or an int64 tensor ``[B]``; a single int where B is 1.
        step: 0 to 2³² − 1, for all samples, or an int64 tensor ``[1]`` or ``[B]``.
        purpose: 0 to 2³² − 1; see `fastdiff.Purpose`.
        device: of the result; the seeds' own where they are a tensor, else the CPU.
        dtype: float16, bfloat16, float32 or float64; numbers are made in float32 and rounded or widened.
        backend: a name of `BACKENDS`, to force it.

    Returns:
        ``[B, ...]``, contiguous.

    Raises:
        TypeError, ValueError: an argument does not fit; the message says which and why.
        RuntimeError: a forced backend is missing.
    """
    checked_type("randn", "shape", shape, Sequence, "ints [B, ...]", "pass a tuple of ints")
    shape = tuple(shape)
    for size in shape:
        if isinstance(size, bool) or not hasattr(size, "__index__"):
            got = f"holds a {type(size).__name__}"
            raise TypeError(error_message("randn", "shape", got, "ints [B, ...]", "pass whole numbers"))
        if size < 0:
            raise ValueError(
                error_message("randn", "shape", f"holds {size}", "sizes of 0 or more", "pass whole numbers")
            )
    if len(shape) == 0:
        raise ValueError(error_message("randn", "shape", "is []", "[B, ...]", "begin it with the number of samples"))
    if dtype not in DTYPES:
        raise TypeError(
            error_message(
                "randn", "dtype", f"is {dtype}", "float16, bfloat16, float32 or float64", "convert the result"
            )
        )
    if device is None:
        device = seeds.device if isinstance(seeds, Tensor) else "cpu"
    keys = as_seeds(seeds, shape[0], device)
    number, steps = (0, _steps(step, keys)) if isinstance(step, Tensor) else (step, None)
    for name, value in (("step", number), ("purpose", as_number(purpose))):
        if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
            got, expected = f"is a {type(value).__name__}", "an int from 0 to 2**32 - 1"
            raise TypeError(error_message("randn", name, got, expected, "pass a whole number"))
        if not 0 <= value < 2**32:
            expected = "an int from 0 to 2**32 - 1"
            raise ValueError(error_message("randn", name, f"is {shown(value)}", expected, "take it modulo 2**32"))
    name = backend_to_run(keys, backend, "randn")
    if not in_memory(keys) or torch._C._len_torch_dispatch_stack() > 0:
        drawn: Tensor = torch.ops.fastdiff.randn(keys, shape, steps, number, int(purpose), dtype, name)
        return drawn
    return _draw(keys, shape, steps, number, int(purpose), dtype, name)


def _steps(step: Tensor, seeds: Tensor) -> Tensor:
    if step.dtype != torch.int64 or step.dim() > 1 or step.numel() not in (1, len(seeds)):
        raise ValueError(
            error_message(
                "randn",
                "step",
                f"is {step.dtype} of shape {list(step.shape)}",
                f"an int, or an int64 tensor [1] or [{len(seeds)}]",
                "give one step for all samples or one each",
            )
        )
    return step.to(seeds.device).reshape(-1).contiguous().resolve_neg()


def _draw(
    seeds: Tensor, shape: Sequence[int], steps: Tensor | None, step: int, purpose: int, dtype: torch.dtype, backend: str
) -> Tensor:
    if backend == "reference":
        size = math.prod(shape[1:])
        return normals(seeds, step if steps is None else steps, purpose, size).reshape(tuple(shape)).to(dtype)
    out = torch.empty(tuple(shape), dtype=dtype, device=seeds.device)
    if out.numel() == 0:
        return out
    if backend == "triton":
        backends.triton_module("philox").randn(out, seeds, steps, step, purpose)
    else:
        assert backends.extension is not None
        backends.extension.randn(out, seeds, steps, step, purpose, backends.current_stream(out))
    return out


@torch.library.custom_op("fastdiff::randn", mutates_args=())
def _randn_op(
    seeds: Tensor, shape: Sequence[int], steps: Tensor | None, step: int, purpose: int, dtype: torch.dtype, backend: str
) -> Tensor:
    """Noise as an operator of the dispatcher, for torch.compile, export and torch.ops.fastdiff.randn."""
    return _draw(seeds, shape, steps, step, purpose, dtype, backend_to_run(seeds, backend or None, "randn"))


@_randn_op.register_fake
def _(
    seeds: Tensor, shape: Sequence[int], steps: Tensor | None, step: int, purpose: int, dtype: torch.dtype, backend: str
) -> Tensor:
    return seeds.new_empty(tuple(shape), dtype=dtype)


torch.library.register_vmap(_randn_op, fold_randn)
