# SPDX-License-Identifier: MIT
"""The fused step: guidance, prediction, clipping, update, noise and history in one pass over memory.

A call is offered to the extension once, as it is: in eager mode, half of a small step's time is the way to its loop.
What the extension declines is checked here, made canonical and run once more, or goes through torch's dispatcher.
"""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from ..deprecated import renamed_argument
from ..errors import as_float, error_message
from ..philox import Purpose
from ..row_layout import Variance
from .backends import direct_step
from .call import StepCall
from .checks import check
from .custom_ops import call_operator
from .dispatch import run
from .fallback import backend_to_run
from .layout import in_memory, is_fake, output_strides, to_strides
from .parts import run_parts
from .recorded_step import record_step
from .transforms import refuse_tangents


def step(
    sample: Tensor,
    model_output: Tensor,
    table: Tensor,
    row_index: int | Tensor | None = None,
    *,
    uncond: Tensor | None = None,
    guidance_scale: float | Tensor | None = None,
    history: Sequence[Tensor | None] | None = (),
    noise: Tensor | None = None,
    seeds: Tensor | None = None,
    noise_step: int | Tensor = 0,
    purpose: int = Purpose.STEP,
    variance: Tensor | None = None,
    mask: Tensor | None = None,
    threshold: Tensor | None = None,
    variance_kind: int = Variance.FIXED,
    keeps: int = 0,
    out: Sequence[Tensor | torch.dtype | None] | None = None,
    model_input: Tensor | None = None,
    backend: str | None = None,
    row: int | Tensor | None = None,
    guidance: float | Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Take one step of any sampler.

    Computes, in float32 (in float64 where a tensor is float64), and rounds each output once::

        m    = u + g·(c − u)                                       where uncond is given
        d    = p·x + q·m,  clamped to ±clip;  with a threshold s clamped to ±s and divided by s
        out  = a_x·x + a_m·m + a_d·d + Σ_j a_j·h_j + a_z·(std·z)
        prev = (1 − w)·prev + w·b                                  where a mask w is given

    with the scalars of one row of a `fastdiff.StepTable`, for the previous sample and for up to two tensors
    to keep.  A tensor whose coefficient is 0 is not read; one that is absent adds nothing.  With a mask the second map
    of the kept tensors is no output but b, what prev_sample is blended with.

    Args:
        sample: x, ``[...]`` or ``[B, ...]``; float16, bfloat16, float32 or float64, any strides.
        model_output: c, like `sample`.  (All tensors "like sample" share its shape and device; each may be of any of
            the four dtypes, and is widened as it is read.)
        table: ``[R, 32]`` from `StepTable.coefficients_as(sample.dtype, sample.device)`: in float64 where any tensor is
            float64, an output too, else in float32.
        row_index: the table's row, 0 to R − 1; or an int64 tensor ``[]`` or ``[1]``, one row for all, read on the
            device, or ``[B]``, one a sample.  A sample whose index in a tensor is negative stays as it is.
            ``[B, T]`` for samples ``[B, T, ...]`` gives each part (token, frame, action) a row of its own.
        uncond: u, the unconditional output, like `sample`.
        guidance_scale: g, a float, or a tensor ``[]``, ``[1]``, ``[B]`` or ``[B, T]`` in the table's dtype; goes with
            `uncond`.
        history: up to four tensors like `sample`, or None, by history slot; None in place of all where there are none.
        noise: z, standard normal, like `sample`.
        seeds: instead of `noise`: it is drawn in the same pass, each sample's from its own seed, ``[B]`` int64 (see
            `fastdiff.as_seeds`).  The numbers are those of ``fastdiff.randn(shape, seeds, noise_step, purpose)`` in
            float32; they are not rounded to a half type.
            Parts of a sample draw what the whole sample would: seeds stay ``[B]``.
        noise_step: the noise's step, 0 to 2³² − 1, or an int64 tensor ``[1]``, ``[B]`` or ``[B, T]``.
        purpose: the noise's purpose, 0 to 2³² − 1; see `fastdiff.Purpose`.
        variance: the model's second output, like `sample`, where `variance_kind` is not 0.
        mask: w, like `sample`, without a gradient: prev_sample is prev where it is 0 and b where it is 1, to the bit,
            else blended.  At most one tensor is kept then, and no output may lie on the mask.
        threshold: ``[B]`` or ``[B, T]`` in the table's dtype, each above 0.
        variance_kind: how `variance` scales the noise, a `fastdiff.row_layout.Variance`.
        keeps: how many tensors to keep, 0 to 2.
        out: the destination of each of the ``1 + keeps`` outputs: a tensor to write, None for a new one in the sample's
            dtype, or a dtype for a new one of it.  Tensors to write may be inputs: the step can be taken in place.
            A skipped sample leaves kept tensors as they were; new ones hold 0 for it.
        model_input: a tensor to write the next model input to: the row's scale times prev_sample, rounded to its dtype
            (any of the four).  ``[B, ...]``, or ``[2·B, ...]`` to hold it twice, for guidance in one batch.
        backend: a name of `BACKENDS`, to force it.
        row, guidance: former names of `row_index` and `guidance_scale`; deprecated.

    Returns:
        prev_sample and the kept tensors, in the shape of `sample` and in its memory layout where that is dense, else
        contiguous.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it, what was expected and the remedy.
            Indices in a tensor on a GPU are not read: one beyond the table there leaves its sample as it is.
        RuntimeError: a forced backend is missing, or a compiled one is asked for what it has no gradient for: that of
            the table, and forward mode.
    """
    if row is not None or guidance is not None:
        row_index = renamed_argument("step", "row", row, "row_index", row_index)
        guidance_scale = renamed_argument("step", "guidance", guidance, "guidance_scale", guidance_scale)
    extension, triton = direct_step(backend)
    if extension is not None:
        offered = extension.step(
            sample=sample,
            model_output=model_output,
            table=table,
            row_index=row_index,
            uncond=uncond,
            guidance_scale=guidance_scale,
            history=history,
            noise=noise,
            variance=variance,
            mask=mask,
            threshold=threshold,
            variance_kind=variance_kind,
            keeps=keeps,
            seeds=seeds,
            noise_step=noise_step,
            purpose=purpose,
            model_input=model_input,
            out=out,
            triton=triton,
        )
        if type(offered) is tuple:
            return offered
    return complete_step(
        StepCall(
            sample=sample,
            model_output=model_output,
            table=table,
            row_index=row_index,  # type: ignore[arg-type]  # the checks name a missing one
            uncond=uncond,
            guidance_scale=number_or_tensor(guidance_scale),
            history=_entries("step", "history", history) or (),
            noise=noise,
            variance=variance,
            mask=mask,
            threshold=threshold,
            variance_kind=variance_kind,
            keeps=keeps,
            seeds=seeds,
            noise_step=noise_step,
            purpose=purpose,
            model_input=model_input,
            out=_entries("step", "out", out),
        ),
        backend,
    )


def step_rows(
    sample: Tensor,
    model_output: Tensor,
    table: Tensor,
    row_index: Tensor | None = None,
    history: Sequence[Tensor | None] | None = (),
    *,
    uncond: Tensor | None = None,
    guidance_scale: float | Tensor | None = None,
    noise: Tensor | None = None,
    seeds: Tensor | None = None,
    noise_step: int | Tensor = 0,
    purpose: int = Purpose.STEP,
    variance: Tensor | None = None,
    mask: Tensor | None = None,
    threshold: Tensor | None = None,
    variance_kind: int = Variance.FIXED,
    out: Tensor | torch.dtype | None = None,
    model_input: Tensor | None = None,
    backend: str | None = None,
    rows: Tensor | None = None,
    registers: Sequence[Tensor | None] | None = None,
    guidance: float | Tensor | None = None,
) -> Tensor:
    """Take one step of each sample by its own row: other solvers, other places in their loops, one launch.

    The table may be several tables' rows, one after another.  Kept outputs of a row go to the history slots that it
    names, in place.  Each sample's result is, bit for bit, what it would be alone.

    Args:
        sample: x, ``[B, ...]``, as in `step`; so are all arguments not named here.
        table: ``[R, 32]``.
        row_index: int64 ``[B]``, each sample's row, ``[1]``, one for all, or ``[B, T]``, each part's.  A sample or part
            whose index is negative stays as it is, and so does its history.
        mask: as in `step`; no row may store its second kept output then.
        history: up to four tensors like `sample`, read and **written**, each in its own dtype.  None where no row uses
            a slot.
        out: a tensor to write instead of a new one, which may be `sample`; or a dtype for a new one of it.
        rows, registers, guidance: former names of `row_index`, `history` and `guidance_scale`; deprecated.

    Returns:
        prev_sample.

    Raises:
        TypeError, ValueError, RuntimeError: as `step`.  Nothing has been written then.
    """
    if rows is not None or registers is not None or guidance is not None:
        row_index = renamed_argument("step_rows", "rows", rows, "row_index", row_index)
        history = renamed_argument("step_rows", "registers", registers, "history", history or None)
        guidance_scale = renamed_argument("step_rows", "guidance", guidance, "guidance_scale", guidance_scale)
    outs = None if out is None else (out,)
    extension, triton = direct_step(backend)
    if extension is not None:
        offered = extension.step(
            sample=sample,
            model_output=model_output,
            table=table,
            row_index=row_index,
            uncond=uncond,
            guidance_scale=guidance_scale,
            history=history,
            noise=noise,
            variance=variance,
            mask=mask,
            threshold=threshold,
            variance_kind=variance_kind,
            seeds=seeds,
            noise_step=noise_step,
            purpose=purpose,
            model_input=model_input,
            write_history=True,
            out=outs,
            triton=triton,
        )
        if type(offered) is tuple:
            return offered[0]  # type: ignore[no-any-return]
    return complete_step(
        StepCall(
            sample=sample,
            model_output=model_output,
            table=table,
            row_index=row_index,  # type: ignore[arg-type]  # the checks name a missing one
            uncond=uncond,
            guidance_scale=number_or_tensor(guidance_scale),
            history=_entries("step_rows", "history", history) or (),
            noise=noise,
            variance=variance,
            mask=mask,
            threshold=threshold,
            variance_kind=variance_kind,
            seeds=seeds,
            noise_step=noise_step,
            purpose=purpose,
            model_input=model_input,
            write_history=True,
            out=outs,
        ),
        backend,
    )[0]


def _entries(operation: str, argument: str, values: object) -> tuple[Any, ...] | None:
    """Return the items of a list or tuple for the checks; None where it is absent."""
    if values is None or isinstance(values, (list, tuple)):
        return None if values is None else tuple(values)
    remedy = f"pass {argument}=[tensor]" if isinstance(values, Tensor) else "pass a list"
    expected = "a list or tuple of tensors or None"
    raise TypeError(error_message(operation, argument, f"is a {type(values).__name__}", expected, remedy))


def complete_step(call: StepCall, backend: str | None = None) -> tuple[Tensor, ...]:
    """Check a call, then run it: the way of every call that was not offered to the extension, or that it declined.

    Raises:
        TypeError, ValueError, RuntimeError: as `step`.
    """
    recorded = record_step(call) if backend is None else None
    if recorded is not None:
        return recorded
    check(call)
    name = backend_to_run(call.sample, backend)
    return run_parts(call, lambda parts: _run(parts, name)) if call.has_parts else _run(call, name)


def _run(call: StepCall, name: str) -> tuple[Tensor, ...]:
    """Run a checked call on a backend, by torch's dispatcher where that has to see it."""
    if _needs_dispatcher(call, name):
        if call.write_history:
            _refuse_gradients(call)
        return call_operator(call, name)
    results = run(call, name)
    if call.out is None:
        strides = output_strides(call.sample)
        return tuple(to_strides(result, strides) for result in results)
    return tuple(
        target.copy_(value) if isinstance(target, Tensor) and target is not value else value
        for target, value in zip(call.out, results, strict=True)
    )


def _needs_dispatcher(call: StepCall, name: str) -> bool:
    """Return whether torch has to see the step as one operator: it traces, or transforms, or wants gradients.

    The reference is torch operators already, and outside of a compiled function is left to be seen as those.
    """
    if torch.compiler.is_compiling():
        return True
    tensors = [tensor for _, tensor in (*call.inputs(), *call.scalars(), *call.counters())]
    if name == "reference":
        return any(is_fake(tensor) for tensor in tensors)
    refuse_tangents("step", (*call.inputs(), *call.scalars()), "pass backend='reference', or use torch.func.vjp")
    graph = torch.is_grad_enabled()
    return torch._C._len_torch_dispatch_stack() > 0 or any(
        (graph and tensor.requires_grad) or not in_memory(tensor) for tensor in tensors
    )


def _refuse_gradients(call: StepCall) -> None:
    if not torch.is_grad_enabled():
        return
    for argument, tensor in (*call.inputs(), *call.scalars()):
        if tensor.requires_grad:
            raise RuntimeError(
                error_message(
                    "step_rows",
                    argument,
                    "requires grad and history is written in place",
                    "a tensor outside autograd's graph",
                    "call ops.step(row_index=indices) with history= and keeps=, or use torch.no_grad()",
                )
            )


def number_or_tensor(guidance_scale: Any) -> Any:
    """Return a guidance scale that is a number of any kind as a float, and anything else as it is, for the checks."""
    if not isinstance(guidance_scale, bool) and isinstance(guidance_scale, Real):
        return as_float("step", "guidance_scale", guidance_scale)
    return guidance_scale
