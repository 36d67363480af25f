# SPDX-License-Identifier: MIT
"""The log-probability of a stochastic step, from the pass over memory that takes the step, and its replay.

A row with a noise coefficient a_z is a Gaussian policy: the previous sample has the mean of the row without its noise
term, and the standard deviation σ = |a_z| (DDPO, arXiv 2305.13301, section 4.3).  Both functions measure the previous
sample **as it is stored**, rounded to its dtype, against that mean, by the same operations in the order of
``csrc/reduce_math.h``.  So the replay of a stored step has the bits of the step that was taken.

The gradient of the replay is that of ops/log_prob_gradient.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..errors import error_message, unknown_name
from ..philox import Purpose
from ..row_layout import COLUMNS, PREV_SAMPLE
from . import backends, reductions_reference, reference
from .call import (
    FIELDS,
    HISTORY_SLOTS,
    STEP_ARGUMENTS,
    OperatorArgument,
    StepCall,
    call_of,
    named,
    operator_values,
    schema,
)
from .canonicalize import canonicalize
from .checks import _check_like_sample, check, readable_without_sync
from .fallback import backend_to_run
from .layout import block_strides, output_strides, to_strides
from .log_prob_gradient import direct_gradients, gradients_of
from .step import _entries, number_or_tensor
from .transforms import differentiable_once, eager_operator, gradient_is_recorded, refuse_tangents
from .vmap import fold_step_arguments, mapped_first

REDUCTIONS = ("sum", "mean")
_NOISE = PREV_SAMPLE + COLUMNS.index("noise")


def step_log_prob(
    sample: Tensor,
    model_output: Tensor,
    table: Tensor,
    row_index: int | Tensor,
    *,
    uncond: Tensor | None = None,
    guidance_scale: float | Tensor | None = None,
    history: Sequence[Tensor | None] | None = (),
    noise: Tensor | None = None,
    seeds: Tensor | None = None,
    noise_step: int | Tensor = 0,
    purpose: int = Purpose.STEP,
    threshold: Tensor | None = None,
    keeps: int = 0,
    out: Sequence[Tensor | torch.dtype | None] | None = None,
    reduction: str = "sum",
    backend: str | None = None,
) -> tuple[Tensor, ...]:
    """Take a step and give the log-probability of the sample that it drew, in one pass over memory.

    ``log p = Σ_i log N(prev_i; mean_i, σ²)`` over the elements of a sample, with ``mean`` the row's map without its
    noise term and ``σ = |a_z|``.  prev_sample has the bits of `step` with the same arguments.

    Args:
        sample, model_output, table, row_index, uncond, guidance_scale, history, noise, seeds, noise_step, purpose,
        threshold, keeps, out, backend: as in `step`; the sample is ``[B, ...]``, and one of noise and seeds is given.
        reduction: "sum" over the elements, the density of the whole sample, or "mean", as common training code for
            DDPO and Flow-GRPO has it.

    Returns:
        log p, ``[B]``, float32 (float64 where any tensor is float64); prev_sample; the kept tensors.  A sample that a
        negative row skips, or whose row of a ``[B]`` tensor adds no noise, has no density: its log p is 0.

    Raises:
        TypeError, ValueError: as `step`; the one row of all samples adds no noise.
        RuntimeError: a tensor requires grad (the gradient is that of `log_prob`); a forced backend is missing.
    """
    fields: dict[str, Any] = {
        "sample": sample,
        "model_output": model_output,
        "table": table,
        "row_index": row_index,
        "uncond": uncond,
        "guidance_scale": guidance_scale,
        "history": history,
        "noise": noise,
        "threshold": threshold,
        "keeps": keeps,
        "seeds": seeds,
        "noise_step": noise_step,
        "purpose": purpose,
        "out": out,
    }
    mean = _checked_reduction("step_log_prob", reduction)
    offered = _offer(fields, False, mean, backend)
    if offered is not None:
        return offered
    call = _call("step_log_prob", fields)
    if (noise is None) == (seeds is None):
        got = "and seeds are both missing" if noise is None else "is given beside seeds"
        remedy = "pass noise=torch.randn_like(sample), or seeds=fastdiff.as_seeds(...)"
        raise ValueError(error_message("step_log_prob", "noise", got, "one of noise and seeds", remedy))
    check(call)
    _check_row("step_log_prob", call)
    _refuse_gradients(call)
    return _run(call, False, mean, backend)


def log_prob(
    prev_sample: Tensor,
    sample: Tensor,
    model_output: Tensor,
    table: Tensor,
    row_index: int | Tensor,
    *,
    uncond: Tensor | None = None,
    guidance_scale: float | Tensor | None = None,
    history: Sequence[Tensor | None] | None = (),
    threshold: Tensor | None = None,
    reduction: str = "sum",
    backend: str | None = None,
) -> Tensor:
    """Give the log-probability of a stored step: the replay of `step_log_prob`, to the bit.

    It is differentiable in prev_sample, sample, model_output, uncond, guidance_scale, history and threshold, once.

    Args:
        prev_sample: what the step gave, like `sample` in shape and device, in the dtype in which it was stored.
        sample, model_output, table, row_index, uncond, guidance_scale, history, threshold, reduction, backend: as in
            `step_log_prob`.

    Returns:
        log p, ``[B]``, float32 (float64 where any tensor is float64).

    Raises:
        TypeError, ValueError, RuntimeError: as `step_log_prob`.
    """
    # The previous sample is in the noise's place, from where it is read in the samples' layout and any dtype.
    fields: dict[str, Any] = {
        "sample": sample,
        "model_output": model_output,
        "table": table,
        "row_index": row_index,
        "uncond": uncond,
        "guidance_scale": guidance_scale,
        "history": history,
        "noise": prev_sample,
        "threshold": threshold,
    }
    mean = _checked_reduction("log_prob", reduction)
    offered = _offer_replay(fields, mean, backend)
    if offered is not None:
        return offered
    call = _call("log_prob", fields)
    if isinstance(sample, Tensor):
        _check_like_sample("prev_sample", prev_sample, sample)
    check(call)
    _check_row("log_prob", call)
    return _run(call, True, mean, backend)[0]


def _offer(fields: dict[str, Any], replay: bool, mean: bool, backend: str | None) -> tuple[Tensor, ...] | None:
    """Offer a call to the extension as it is; None where it declines or where torch has to see an operator."""
    extension = backends.direct_extension() if backend is None else None
    if extension is None:
        return None
    offered = extension.log_prob(replay, mean, **fields)
    return offered if isinstance(offered, tuple) else None


def _offer_replay(fields: dict[str, Any], mean: bool, backend: str | None) -> Tensor | None:
    """Offer a replay likewise; where autograd has to record it, as a function of its own."""
    extension = backends.direct_extension() if backend is None else None
    if extension is None:
        return None
    offered = extension.log_prob(True, mean, **fields)
    if isinstance(offered, tuple):
        return offered[0]  # type: ignore[no-any-return]
    recorded = offered == "autograd" and torch.is_grad_enabled() and not torch._C._are_functorch_transforms_active()
    scalars = (fields[name] for name in ("table", "guidance_scale", "threshold"))
    if not recorded or any(isinstance(value, Tensor) and value.requires_grad for value in scalars):
        return None
    with torch.no_grad():
        offered = extension.log_prob(True, mean, **fields)
    if not isinstance(offered, tuple):
        return None
    history = (*(fields["history"] or ()), *[None] * len(HISTORY_SLOTS))[: len(HISTORY_SLOTS)]
    values = (fields[name] for name in _REPLAYED)
    return _Replay.apply(offered, mean, *values, *history)  # type: ignore[no-any-return, no-untyped-call]


def _call(operation: str, fields: dict[str, Any]) -> StepCall:
    lists: dict[str, Any] = {
        name: _entries(operation, name, fields[name]) for name in ("history", "out") if name in fields
    }
    lists["history"] = lists["history"] or ()
    lists["guidance_scale"] = number_or_tensor(fields["guidance_scale"])
    return StepCall(**(fields | lists))


# --- Checks ----------------------------------------------------------------------------------------------------------


def _checked_reduction(operation: str, reduction: object) -> bool:
    """Return whether the mean is asked for."""
    if reduction not in REDUCTIONS:
        raise unknown_name(operation, "reduction", reduction, REDUCTIONS)
    return reduction == "mean"


def _check_row(operation: str, call: StepCall) -> None:
    """Check what a log-probability needs beyond a step: samples, and noise in a row that all of them share."""
    if call.sample.dim() == 0:
        remedy = "add a dimension of samples with sample[None]"
        raise ValueError(error_message(operation, "sample", "has no dimension", "[B, ...]", remedy))
    if call.has_parts:
        remedy = "make the frames or tokens samples of a batch with flatten(0, 1)"
        raise ValueError(
            error_message(operation, "row_index", "gives the parts of a sample rows", "one row a sample", remedy)
        )
    index = call.row_index
    if isinstance(index, Tensor) or not readable_without_sync(call.table) or torch.compiler.is_compiling():
        return
    if float(call.table[index, _NOISE]) == 0.0:
        raise ValueError(
            error_message(
                operation,
                "row_index",
                f"is {index}, a row that adds no noise",
                "a row with a noise coefficient: a deterministic step has no density",
                "take it with ops.step, or mask samples by a row_index tensor [B]",
            )
        )


def _refuse_gradients(call: StepCall) -> None:
    if not torch.is_grad_enabled():
        return
    for argument, tensor in (*call.inputs(), *call.scalars()):
        if tensor.requires_grad:
            raise RuntimeError(
                error_message(
                    "step_log_prob",
                    argument,
                    "requires grad and a step that is drawn has no gradient",
                    "a tensor outside autograd's graph",
                    "use torch.no_grad() here, and ops.log_prob for the gradient",
                )
            )


# --- Execution -------------------------------------------------------------------------------------------------------


def _run(call: StepCall, replay: bool, mean: bool, backend: str | None) -> tuple[Tensor, ...]:
    operation = "log_prob" if replay else "step_log_prob"
    name = backend_to_run(call.sample, backend, operation)
    if not torch.compiler.is_compiling():
        renamed = {"noise": "prev_sample"} if replay else {}
        tensors = (*call.inputs(), *call.scalars())
        refuse_tangents(operation, ((renamed.get(argument, argument), tensor) for argument, tensor in tensors))
    results = _apply(*operator_values(call, name), replay, mean)
    if replay or call.out is None:
        return tuple(results)
    written = [
        target.copy_(value) if isinstance(target, Tensor) else value
        for target, value in zip(call.out, results[1:], strict=True)
    ]
    return (results[0], *written)


def _execute(call: StepCall, replay: bool, mean: bool, backend: str) -> list[Tensor]:
    """Run a checked call of the operator on a backend, to new tensors."""
    strides = output_strides(call.sample)
    # Each sample is a block of memory, whose order is that of the sum.
    blocks = replace(call, sample=to_strides(call.sample, block_strides(call.sample)))
    if call.sample.numel() == 0:
        found, outputs = _of_nothing(call, replay, mean)
    elif backend == "reference":
        found, outputs = _by_reference(blocks, replay, mean)
    else:
        fields = {name: getattr(call, name) for name in FIELDS}
        if backend != "triton":
            offered = backends.extension.log_prob(replay, mean, **fields, in_operator=True)  # type: ignore[union-attr]
            if isinstance(offered, tuple):
                return list(offered)
        canonical = canonicalize(blocks)
        outputs = [] if replay else [target for target in canonical.targets if isinstance(target, Tensor)]
        if backend == "triton":
            found = backends.triton_module("log_prob").launch(canonical, replay, mean)
        else:
            fields = {name: getattr(canonical, name) for name in FIELDS}
            offered = backends.extension.log_prob(replay, mean, **fields, in_operator=True)  # type: ignore[union-attr]
            if not isinstance(offered, tuple):
                raise AssertionError(f"step_log_prob: the extension declined a canonical call ({offered}): {canonical}")
            found = offered[0]
    return [found, *(to_strides(value, strides) for value in outputs)]


def _of_nothing(call: StepCall, replay: bool, mean: bool) -> tuple[Tensor, list[Tensor]]:
    """Return the results of samples without elements: a sum of 0, and no mean."""
    value = math.nan if mean else 0.0
    found = torch.full(call.sample.shape[:1], value, dtype=call.table.dtype, device=call.sample.device)
    outputs = [] if replay else [torch.empty_like(call.sample, dtype=dtype) for dtype in call.output_dtypes]
    return found, outputs


def _by_reference(call: StepCall, replay: bool, mean: bool) -> tuple[Tensor, list[Tensor]]:
    """Return the log-probabilities and outputs by plain torch: the specification of the kernels."""
    compute = call.table.dtype
    (center,) = reference.step(replace(call, noise=None, seeds=None, keeps=0, out=(compute,)))
    outputs = [] if replay else list(reference.step(call))
    prev = call.noise if replay else outputs[0]
    assert prev is not None
    inner = math.prod(call.sample.shape[1:])
    squares = reductions_reference.sum_of_squares(to_strides(prev.to(compute) - center, call.sample.stride()))
    index = call.row_index
    if isinstance(index, Tensor):
        rows, taken = reference.select_rows(call.table, index)
        sigma = torch.where(taken, rows[:, _NOISE].double().abs(), 0.0)
    else:
        sigma = call.table[index, _NOISE].double().abs()[None]
    noisy = sigma > 0
    divisor = torch.where(noisy, sigma, 1.0)
    value = -0.5 * (squares / (divisor * divisor))
    constant = divisor.log() + 0.5 * math.log(2.0 * math.pi)
    value = value / inner - constant if mean else value - inner * constant
    return torch.where(noisy, value, sigma).to(compute), outputs


# --- The operator of the dispatcher ----------------------------------------------------------------------------------

_ARGUMENTS = (*STEP_ARGUMENTS, OperatorArgument("replay", "bool", None), OperatorArgument("mean", "bool", None))
_TAGS: dict[str, Any] = {"tags": (torch.Tag.needs_exact_strides,)} if hasattr(torch.Tag, "needs_exact_strides") else {}


@torch.library.custom_op("fastdiff::step_log_prob", mutates_args=(), schema=schema(_ARGUMENTS, "Tensor[]"), **_TAGS)
def _log_prob_op(*values: Any) -> Any:
    """`step_log_prob`, or with `replay` `log_prob`, whose previous sample is in the noise's place."""
    return _forward(*values)


def _forward(*values: Any) -> list[Tensor]:
    """Run the operator with its schema's arguments, on the backend that it names or, if it is empty, the chosen one."""
    given = named(_ARGUMENTS, values)
    replay, mean, backend = given.pop("replay"), given.pop("mean"), given["backend"]
    with torch.no_grad():
        call = call_of(given)
        return _execute(call, replay, mean, backend or backend_to_run(call.sample, None, "step_log_prob"))


@_log_prob_op.register_fake
def _(*values: Any) -> list[Tensor]:
    given = named(_ARGUMENTS, values)
    sample, table = given["sample"], given["table"]
    found = [sample.new_empty((sample.shape[0],), dtype=table.dtype)]
    if given["replay"]:
        return found
    dtypes = [given[f"{name}_dtype"] for name in ("prev_sample", "keep_0", "keep_1")][: given["keeps"] + 1]
    strides = output_strides(sample)
    return found + [sample.new_empty_strided(sample.shape, strides, dtype=dtype or sample.dtype) for dtype in dtypes]


_TENSORS = tuple(argument.name for argument in _ARGUMENTS if argument.type in ("Tensor", "Tensor?"))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    given = named(_ARGUMENTS, inputs)
    ctx.numbers = {name: value for name, value in given.items() if name not in _TENSORS}
    ctx.save_for_backward(*(given[name] for name in _TENSORS))


def _backward(ctx: Any, grads: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    given: dict[str, Any] = {**ctx.numbers, **dict(zip(_TENSORS, ctx.saved_tensors, strict=True))}
    names = [a.name for a, want in zip(_ARGUMENTS, ctx.needs_input_grad, strict=True) if want]
    found = _gradients(grads[0], names, [given[a.name] for a in _ARGUMENTS])
    return tuple(found.get(a.name) for a in _ARGUMENTS)


def _gradients(grad: Tensor, names: Sequence[str], values: Sequence[Any]) -> dict[str, Tensor]:
    """Return the gradients of the named arguments from the operator's `values`; they are taken once."""
    run = _recorded_gradients if gradient_is_recorded() else _run_gradients
    return dict(zip(names, run(grad, tuple(names), *values), strict=True))


def _run_gradients(grad: Tensor, names: Sequence[str], *values: Any) -> tuple[Tensor, ...]:
    found = gradients_of(named(_ARGUMENTS, values), {a.name: a.name in names for a in _ARGUMENTS}, grad)
    return tuple(found[name] for name in names)  # type: ignore[misc]  # each named argument is a tensor


#: The fields of a replay, without the history slots.
_REPLAYED = ("sample", "model_output", "table", "row_index", "uncond", "guidance_scale", "noise", "threshold")


class _Replay(torch.autograd.Function):
    """Record a replay whose result, `offered`, the extension has computed: checks and the dispatcher take longer."""

    @staticmethod
    def forward(ctx: Any, offered: tuple[Tensor], mean: bool, *values: Any) -> Tensor:
        ctx.save_for_backward(*(value if isinstance(value, Tensor) else None for value in values))
        ctx.numbers = tuple(None if isinstance(value, Tensor) else value for value in values)
        ctx.mean = mean
        return offered[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        names = (*_REPLAYED, *HISTORY_SLOTS)
        values = [n if tensor is None else tensor for tensor, n in zip(ctx.saved_tensors, ctx.numbers, strict=True)]
        wanted = [name for name, want in zip(names, ctx.needs_input_grad[2:], strict=True) if want]
        history = tuple(values[len(_REPLAYED) :])
        fields: dict[str, Any] = {**dict(zip(_REPLAYED, values, strict=False)), "history": history}
        found = None if gradient_is_recorded() else direct_gradients(fields, ctx.mean, wanted, grad)
        if found is None:
            found = _gradients(grad, wanted, [*operator_values(_call("log_prob", fields), ""), True, ctx.mean])
        return None, None, *(found.get(name) for name in names)


# --- In eager calls and under torch.func -----------------------------------------------------------------------------


def _fold(info: Any, in_dims: tuple[int | None, ...], *values: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """Run the operator under vmap: the samples of all mapped calls are one batch."""
    size = info.batch_size
    folded, batch, shape = fold_step_arguments(named(_ARGUMENTS, values), named(_ARGUMENTS, in_dims), size)
    found, *outputs = _apply(*folded.values())
    results = (found.reshape(size, batch), *(output.reshape(size, *shape) for output in outputs))
    return results, (0,) * len(results)


def _fold_gradients(
    info: Any, in_dims: tuple[Any, ...], grad: Tensor, names: Sequence[str], *values: Any
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    size, given, dims = info.batch_size, named(_ARGUMENTS, values), named(_ARGUMENTS, in_dims[2:])
    folded, batch, _ = fold_step_arguments(given, dims, size)
    # Each mapped call has a gradient of its own of a scalar that all share.
    shapes = {name: mapped_first(given[name], dims[name], size).shape for name in names}
    for name in {"guidance_scale", "threshold"}.intersection(names):
        folded[name] = folded[name].expand(size * batch)
    grads = mapped_first(grad, in_dims[0], size).reshape(size * batch)
    results = []
    for name, found in zip(names, _recorded_gradients(grads, names, *folded.values()), strict=True):
        shared = name in ("guidance_scale", "threshold") and math.prod(shapes[name]) == size
        results.append((found.reshape(size, batch).sum(1) if shared else found).reshape(shapes[name]))
    return tuple(results), (0,) * len(results)


_recorded_gradients = differentiable_once(
    "log_prob",
    "take log p in torch operators, with the mean that ops.step gives of a row without noise",
    _run_gradients,
    _fold_gradients,
)

#: Run ``fastdiff::step_log_prob`` with its schema's arguments.
_apply: Callable[..., Sequence[Tensor]] = eager_operator(
    "log_prob",
    tuple(argument.name for argument in _ARGUMENTS),
    lambda *values: torch.ops.fastdiff.step_log_prob(*values),
    _forward,
    _setup_context,
    lambda ctx, *grads: _backward(ctx, grads),
    _fold,
)

torch.library.register_autograd(_log_prob_op, _backward, setup_context=_setup_context)
torch.library.register_vmap(_log_prob_op, _fold)
