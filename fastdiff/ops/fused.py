# SPDX-License-Identifier: MIT
"""The fused step: guidance, prediction, clipping, update, noise and history in one pass over memory."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..call import StepCall
from ..errors import sentence
from ..table import Variance, compute_dtype
from . import backends
from .checks import check, has_memory, laid_out, make_plain, output_strides

_is_compiling = torch.compiler.is_compiling
_extension_step = None if backends.extension is None else backends.extension.step


def direct_step(
    sample: Tensor,
    model_output: Tensor,
    table: Tensor,
    row: int,
    uncond: Tensor | None,
    guidance: float | Tensor | None,
    history: Sequence[Tensor | None],
    noise: Tensor | None,
    variance: Tensor | None,
    threshold: Tensor | None,
    variance_kind: int,
    keeps: int,
    out: Sequence[Tensor | None] | None,
) -> tuple[Tensor, ...] | None:
    """Hand a call to the extension as it is; None where it declines, and `step` has to look at it.

    Positional and without a check of its own: in eager mode, half of a small step's time is the way to its loop.
    """
    if _extension_step is None or backends.forced is not None or _is_compiling():
        return None
    try:
        stream = 0
        if not sample.is_cpu:
            stream = backends.current_stream(sample)
            guidance = _on_device(guidance, sample)
    except AttributeError:  # no tensor: the checks of `step` say what it is
        return None
    done: tuple[Tensor, ...] | None = _extension_step(
        sample, model_output, table, row, uncond, guidance, history, noise, variance, threshold, variance_kind, keeps,
        out, stream,
    )  # fmt: skip
    return done


def step(
    sample: Tensor,
    model_output: Tensor,
    table: Tensor,
    row: int,
    *,
    uncond: Tensor | None = None,
    guidance: float | Tensor | None = None,
    history: Sequence[Tensor | None] = (),
    noise: Tensor | None = None,
    variance: Tensor | None = None,
    threshold: Tensor | None = None,
    variance_kind: int = Variance.FIXED,
    keeps: int = 0,
    out: Sequence[Tensor | None] | None = None,
    backend: str | None = None,
) -> tuple[Tensor, ...]:
    """Take one step of any sampler.

    Computes, in float32 (float64 for float64 samples)::

        m    = u + g·(c − u)                                       where uncond is given
        d    = p·x + q·m,  clamped to ±clip;  with a threshold s clamped to ±s and divided by s
        out  = a_x·x + a_m·m + a_d·d + Σ_j a_j·h_j + a_z·(std·z)

    with the scalars of one row of a `fastdiff.table.StepTable`, for the previous sample and for up to two tensors
    to keep.  A tensor whose coefficient is 0 is not read; one that is absent adds nothing.

    Args:
        sample: x, ``[...]`` or ``[B, ...]``; float16, bfloat16, float32 or float64, any strides.
        model_output: c, like `sample`.  (All tensors "like sample" share its shape, dtype and device.)
        table: ``[R, 32]`` from `StepTable.rows_as(sample.dtype, sample.device)`.
        row: which row, 0 to R − 1.
        uncond: u, the unconditional output, like `sample`.
        guidance: g, a float, or a tensor ``[]``, ``[1]`` or ``[B]`` in the table's dtype; goes with `uncond`.
        history: up to four tensors like `sample`, or None, by register.
        noise: z, standard normal, like `sample`.
        variance: the model's second output, like `sample`, where `variance_kind` is not 0.
        threshold: ``[B]`` in the table's dtype, each above 0.
        variance_kind: how `variance` scales the noise, a `fastdiff.table.Variance`.
        keeps: how many tensors to keep, 0 to 2.
        out: ``1 + keeps`` tensors to write, None for a new one.  They may be inputs: the step can be taken in place.
        backend: a name of `BACKENDS`, to force it.

    Returns:
        prev_sample and the kept tensors, like `sample`, in its memory layout where that is dense, else contiguous.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it, what was expected and the remedy.
        RuntimeError: a forced backend is missing, or gradients are asked of a compiled backend.
    """
    if backend is None:
        done = direct_step(
            sample, model_output, table, row, uncond, guidance, history, noise, variance, threshold, variance_kind,
            keeps, out,
        )  # fmt: skip
        if done is not None:
            return done
    scale = _on_device(guidance, sample)
    call = StepCall(
        sample, model_output, table, row, uncond, scale, tuple(history), noise, variance, threshold,
        variance_kind, keeps,
    )  # fmt: skip
    return _checked_step(call, None if out is None else tuple(out), backend)


def _checked_step(
    call: StepCall, out: tuple[Tensor | None, ...] | None, backend: str | None, *, operator: bool = True
) -> tuple[Tensor, ...]:
    """Check, choose, make plain, run: the way of every call that the extension does not take at once.

    `operator` is whether torch's dispatcher may be asked: not where it is the one that asks.
    """
    check(call, out)
    name = backends.backend_for(call.sample, backend)
    if _is_compiling() or (operator and not all(has_memory(tensor) for _, tensor in (*call.inputs(), *call.scalars()))):
        results = _library_step(call, name)
    elif name == "reference":
        results = tuple(backends.reference_outputs(call))
    else:
        _refuse_gradients(call, name)
        plain = make_plain(call, out)
        if call.sample.numel() > 0:
            backends.RUN[name](plain)
        results = plain.outputs
    results = tuple(laid_out(result, output_strides(call.sample)) for result in results)
    if out is None:
        return results
    return tuple(
        value if target is None or target is value else target.copy_(value)
        for target, value in zip(out, results, strict=True)
    )


def _refuse_gradients(call: StepCall, name: str) -> None:
    if not torch.is_grad_enabled():
        return
    for argument, tensor in (*call.inputs(), *call.scalars()):
        if tensor.requires_grad:
            raise RuntimeError(
                sentence(
                    "step",
                    argument,
                    f"requires grad and backend {name!r} has no gradient",
                    "a tensor outside autograd's graph",
                    "sample under torch.no_grad(), or pass backend='reference'",
                )
            )


def _on_device(guidance: Any, sample: object) -> Tensor | None:
    """A guidance scale as a tensor; what is no number, or has no sample to go by, is left for the checks to refuse."""
    if isinstance(guidance, (float, int)) and isinstance(sample, Tensor):
        return _scalar(float(guidance), compute_dtype(sample.dtype), sample.device)
    return guidance  # type: ignore[no-any-return]


@functools.lru_cache(maxsize=256)
def _scalar(value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A number as a tensor on the samples' device, kept: a guidance scale is the same for a whole loop."""
    return torch.tensor([value], dtype=dtype, device=device)


@torch.library.custom_op("fastdiff::step", mutates_args=())
def _step_op(
    sample: Tensor,
    model_output: Tensor,
    table: Tensor,
    row: int,
    uncond: Tensor | None,
    guidance: Tensor | None,
    history: list[Tensor | None],
    noise: Tensor | None,
    variance: Tensor | None,
    threshold: Tensor | None,
    variance_kind: int,
    keeps: int,
    backend: str,
) -> list[Tensor]:
    """The step as an operator of the dispatcher, for torch.compile, export and torch.ops.fastdiff.step."""
    call = StepCall(
        sample, model_output, table, row, uncond, guidance, tuple(history), noise, variance, threshold,
        variance_kind, keeps,
    )  # fmt: skip
    with torch.no_grad():
        return list(_checked_step(call, None, backend or None, operator=False))


@_step_op.register_fake
def _(
    sample: Tensor,
    model_output: Tensor,
    table: Tensor,
    row: int,
    uncond: Tensor | None,
    guidance: Tensor | None,
    history: list[Tensor | None],
    noise: Tensor | None,
    variance: Tensor | None,
    threshold: Tensor | None,
    variance_kind: int,
    keeps: int,
    backend: str,
) -> list[Tensor]:
    strides = output_strides(sample)
    return [sample.new_empty_strided(sample.shape, strides) for _ in range(keeps + 1)]


def _library_step(call: StepCall, name: str) -> tuple[Tensor, ...]:
    results = torch.ops.fastdiff.step(
        call.sample,
        call.model_output,
        call.table,
        call.row,
        call.uncond,
        call.guidance,
        list(call.history),
        call.noise,
        call.variance,
        call.threshold,
        int(call.variance_kind),
        call.keeps,
        name,
    )
    return tuple(results)
