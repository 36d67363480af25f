# SPDX-License-Identifier: MIT
"""The fused step: guidance, prediction, clipping, update, noise and history in one pass over memory."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from ..errors import as_float, sentence
from ..philox import Purpose
from ..row_layout import Variance
from . import backends
from .call import StepCall, Target
from .checks import check
from .custom_ops import call_library
from .dispatch import run
from .fallback import backend_to_run
from .layout import in_memory, is_fake, laid_out, output_strides


def direct_step(
    sample: Tensor,
    model_output: Tensor,
    table: Tensor,
    row: int | Tensor,
    uncond: Tensor | None,
    guidance: float | Tensor | None,
    history: Sequence[Tensor | None] | None,
    noise: Tensor | None,
    variance: Tensor | None,
    threshold: Tensor | None,
    variance_kind: int,
    keeps: int,
    out: Sequence[Target] | None,
    seeds: Tensor | None = None,
    noise_step: int | Tensor = 0,
    purpose: int = Purpose.STEP,
    model_input: Tensor | None = None,
    scatter: bool = False,
) -> tuple[Tensor, ...] | None:
    """Hand a call to the extension as it is; None where it declines, and `step` has to look at it.

    Positional and without a check of its own: in eager mode, half of a small step's time is the way to its loop.
    """
    extension = backends.direct_extension()
    if extension is None:
        return None
    try:
        stream = 0
        if not sample.is_cpu:
            stream = backends.current_stream(sample)
            guidance = _on_device(guidance, sample, table)
    except AttributeError:  # no tensor: the checks of `step` say what it is
        return None
    done: tuple[Tensor, ...] | None = extension.step(
        sample, model_output, table, row, uncond, guidance, history, noise, variance, threshold, variance_kind, keeps,
        out, stream, seeds, noise_step, purpose, model_input, scatter,
    )  # fmt: skip
    return done


def step(
    sample: Tensor,
    model_output: Tensor,
    table: Tensor,
    row: int | Tensor,
    *,
    uncond: Tensor | None = None,
    guidance: float | Tensor | None = None,
    history: Sequence[Tensor | None] | None = (),
    noise: Tensor | None = None,
    seeds: Tensor | None = None,
    noise_step: int | Tensor = 0,
    purpose: int = Purpose.STEP,
    variance: Tensor | None = None,
    threshold: Tensor | None = None,
    variance_kind: int = Variance.FIXED,
    keeps: int = 0,
    out: Sequence[Tensor | torch.dtype | None] | None = None,
    model_input: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, ...]:
    """Take one step of any sampler.

    Computes, in float32 (in float64 where a tensor is float64), and rounds each output once::

        m    = u + g·(c − u)                                       where uncond is given
        d    = p·x + q·m,  clamped to ±clip;  with a threshold s clamped to ±s and divided by s
        out  = a_x·x + a_m·m + a_d·d + Σ_j a_j·h_j + a_z·(std·z)

    with the scalars of one row of a `fastdiff.StepTable`, for the previous sample and for up to two tensors to keep.  A
    tensor whose coefficient is 0 is not read; one that is absent adds nothing.

    Args:
        sample: x, ``[...]`` or ``[B, ...]``; float16, bfloat16, float32 or float64, any strides.
        model_output: c, like `sample`.  (All tensors "like sample" share its shape and device; each may be of any of
            the four dtypes, and is widened as it is read.)
        table: ``[R, 32]`` from `StepTable.rows_as(sample.dtype, sample.device)`: in float64 where any tensor is
            float64, an output too, else in float32.
        row: which row, 0 to R − 1; or an int64 tensor ``[]`` or ``[1]``, one row for all that is read on the device, or
            ``[B]``, one a sample.  A sample whose row in a tensor is negative stays as it is.
        uncond: u, the unconditional output, like `sample`.
        guidance: g, a float, or a tensor ``[]``, ``[1]`` or ``[B]`` in the table's dtype; goes with `uncond`.
        history: up to four tensors like `sample`, or None, by register; None in place of all where there are none.
        noise: z, standard normal, like `sample`.
        seeds: instead of `noise`: it is drawn in the same pass, each sample's from its own seed, ``[B]`` int64 (see
            `fastdiff.as_seeds`).  The numbers are those of ``fastdiff.randn(shape, seeds, noise_step, purpose)`` in
            float32; they are not rounded to a half type.
        noise_step: of the noise, 0 to 2³² − 1, or an int64 tensor ``[1]`` or ``[B]``.
        purpose: of the noise, 0 to 2³² − 1; see `fastdiff.Purpose`.
        variance: the model's second output, like `sample`, where `variance_kind` is not 0.
        threshold: ``[B]`` in the table's dtype, each above 0.
        variance_kind: how `variance` scales the noise, a `fastdiff.row_layout.Variance`.
        keeps: how many tensors to keep, 0 to 2.
        out: what becomes of each of the ``1 + keeps`` outputs: a tensor to write, None for a new one in the sample's
            dtype, or a dtype for a new one of it.  Tensors to write may be inputs: the step can be taken in place.
            A sample that stays leaves kept tensors as they were; new ones hold 0 for it.
        model_input: a tensor to write the next model input to: the row's scale times prev_sample, rounded to its dtype
            (any of the four).  ``[B, ...]``, or ``[2·B, ...]`` to hold it twice, for guidance in one batch.
        backend: a name of `BACKENDS`, to force it.

    Returns:
        prev_sample and the kept tensors, in the shape of `sample` and in its memory layout where that is dense, else
        contiguous.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it, what was expected and the remedy.
            Rows in a tensor on a GPU are not looked at: one beyond the table there leaves its sample as it is.
        RuntimeError: a forced backend is missing, or a compiled one is asked for what it has no gradient for: that of
            the table, and forward mode.
    """
    if backend is None:
        done = direct_step(
            sample, model_output, table, row, uncond, guidance, history, noise, variance, threshold, variance_kind,
            keeps, out, seeds, noise_step, purpose, model_input,
        )  # fmt: skip
        if done is not None:
            return done
    scale, given = _on_device(guidance, sample, table), _entries("step", "history", history) or ()
    call = StepCall(
        sample, model_output, table, row, uncond, scale, given, noise, variance, threshold, variance_kind, keeps,
        seeds, noise_step, purpose, model_input,
    )  # fmt: skip
    return _checked_step(call, _entries("step", "out", out), backend)


def step_rows(
    sample: Tensor,
    model_output: Tensor,
    table: Tensor,
    rows: Tensor,
    registers: Sequence[Tensor | None] | None = (),
    *,
    uncond: Tensor | None = None,
    guidance: float | Tensor | None = None,
    noise: Tensor | None = None,
    seeds: Tensor | None = None,
    noise_step: int | Tensor = 0,
    purpose: int = Purpose.STEP,
    variance: Tensor | None = None,
    threshold: Tensor | None = None,
    variance_kind: int = Variance.FIXED,
    out: Tensor | torch.dtype | None = None,
    model_input: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Take one step of each sample by its own row: other solvers, other places in their loops, one launch.

    The table may be several tables' rows, one after another.  What a row keeps goes to the registers that it names, in
    place.  Each sample's result is, bit for bit, what it would be alone.

    Args:
        sample: x, ``[B, ...]``, as in `step`; so are all arguments not named here.
        table: ``[R, 32]``.
        rows: int64 ``[B]``, each sample's row, or ``[1]``, one for all.  A sample whose row is negative stays as it is,
            and so do its registers.
        registers: up to four tensors like `sample`: history, read and **written**, each in its own dtype.  None where
            no row uses one.
        out: a tensor to write instead of a new one, which may be `sample`; or a dtype for a new one of it.

    Returns:
        prev_sample.

    Raises:
        TypeError, ValueError, RuntimeError: as `step`.  Nothing has been written then.
    """
    outs = None if out is None else (out,)
    if backend is None:
        done = direct_step(
            sample, model_output, table, rows, uncond, guidance, registers, noise, variance, threshold, variance_kind,
            0, outs, seeds, noise_step, purpose, model_input, True,
        )  # fmt: skip
        if done is not None:
            return done[0]
    scale, given = _on_device(guidance, sample, table), _entries("step_rows", "registers", registers) or ()
    call = StepCall(
        sample, model_output, table, rows, uncond, scale, given, noise, variance, threshold, variance_kind, 0,
        seeds, noise_step, purpose, model_input, scatter=True,
    )  # fmt: skip
    return _checked_step(call, outs, backend)[0]


def _entries(operation: str, argument: str, values: object) -> tuple[Any, ...] | None:
    """What a list or tuple holds, for the checks to look at; None where it is absent."""
    if values is None or isinstance(values, (list, tuple)):
        return None if values is None else tuple(values)
    remedy = f"pass {argument}=[tensor]" if isinstance(values, Tensor) else "pass a list"
    expected = "a list or tuple of tensors or None"
    raise TypeError(sentence(operation, argument, f"is a {type(values).__name__}", expected, remedy))


def _checked_step(call: StepCall, out: tuple[Target, ...] | None, backend: str | None) -> tuple[Tensor, ...]:
    """Check, choose, make plain, run: the way of every call that the extension does not take at once."""
    check(call, out)
    name = backend_to_run(call.sample, backend)
    if _needs_dispatcher(call, name):
        if call.scatter:
            _refuse_gradients(call)
        return call_library(call, out, name)
    results = tuple(laid_out(result, output_strides(call.sample)) for result in run(call, out, name))
    if out is None:
        return results
    return tuple(
        target.copy_(value) if isinstance(target, Tensor) and target is not value else value
        for target, value in zip(out, results, strict=True)
    )


def _needs_dispatcher(call: StepCall, name: str) -> bool:
    """Whether torch has to see the step as one operator: it traces, or transforms, or wants gradients.

    The reference is torch operators already, and outside of a compiled function is left to be seen as those.
    """
    if torch.compiler.is_compiling():
        return True
    tensors = [tensor for _, tensor in (*call.inputs(), *call.scalars(), *call.counters())]
    if name == "reference":
        return any(is_fake(tensor) for tensor in tensors)
    _refuse_tangents(call, name)
    graph = torch.is_grad_enabled()
    return torch._C._len_torch_dispatch_stack() > 0 or any(
        (graph and tensor.requires_grad) or not in_memory(tensor) for tensor in tensors
    )


def _refuse_tangents(call: StepCall, name: str) -> None:
    for argument, tensor in (*call.inputs(), *call.scalars()):
        if torch.autograd.forward_ad.unpack_dual(tensor).tangent is not None:  # type: ignore[no-untyped-call]
            raise RuntimeError(
                sentence(
                    "step",
                    argument,
                    f"carries a forward-mode tangent and backend {name!r} has reverse-mode gradients only",
                    "a tensor without one",
                    "pass backend='reference', or use torch.func.vjp",
                )
            )


def _refuse_gradients(call: StepCall) -> None:
    if not torch.is_grad_enabled():
        return
    for argument, tensor in (*call.inputs(), *call.scalars()):
        if tensor.requires_grad:
            raise RuntimeError(
                sentence(
                    "step_rows",
                    argument,
                    "requires grad and registers are written in place",
                    "a tensor outside autograd's graph",
                    "call ops.step(row=rows), one row a sample, with history= and keeps=, or use torch.no_grad()",
                )
            )


def _on_device(guidance: Any, sample: object, table: object) -> Tensor | None:
    """A guidance scale as a tensor; what is no number, or has no sample to go by, is left for the checks to refuse."""
    number = isinstance(guidance, Real) and not isinstance(guidance, bool)
    if number and isinstance(sample, Tensor) and isinstance(table, Tensor):
        # A tensor that a tracer made belongs to its trace: only those of eager calls are kept.
        scalar = _kept_scalar if in_memory(sample) else _scalar
        return scalar(as_float("step", "guidance", guidance), table.dtype, sample.device)
    return guidance  # type: ignore[no-any-return]


def _scalar(value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.full((1,), value, dtype=dtype, device=device)


@functools.lru_cache(maxsize=256)
def _kept_scalar(value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A number as a tensor on the samples' device, kept: a guidance scale is the same for a whole loop.

    It must not be an inference tensor, which autograd could not save for a later call's backward.
    """
    with torch.inference_mode(False):
        return _scalar(value, dtype, device)
