# SPDX-License-Identifier: MIT
"""The training loss of a diffusion model in one pass, without the noise and the target in memory.

The target is an affine map of x0 and the noise (ops/forward_rows.py).  The pass reads the model's output and x0, draws
the noise again from its seeds, and adds up ρ(output − target) in the order of ``csrc/reduce_math.h``.  The backward
pass draws it once more and writes the gradient.

A call is offered to the extension once, as it is: on a small batch the way to the loop takes longer than the loop.
What the extension declines is checked here, and goes through torch's dispatcher or a function of autograd in Python.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import checked_float, checked_integer, error_message, unknown_name
from ..philox import Purpose
from ..row_layout import compute_dtype
from . import loss_kernels
from .backends import direct_extension
from .checks import as_number, check_dtype, readable_without_sync
from .fallback import backend_to_run
from .forward_process import check_samples
from .forward_rows import ForwardScales, forward_rows, training_table
from .layout import in_memory
from .transforms import differentiable_once, eager_operator, gradient_is_recorded
from .vmap import fold_loss

LOSSES = loss_kernels.LOSSES
#: The least c of the pseudo-Huber loss: its square is a float32.
LEAST_HUBER_C = 1e-18
REDUCTIONS = ("mean", "sum", "none")


def diffusion_loss(
    output: Tensor,
    x0: Tensor,
    t: Tensor | int | float,
    schedule: Any,
    prediction_type: str = "epsilon",
    *,
    noise: Tensor | None = None,
    seeds: Tensor | Sequence[int] | None = None,
    noise_step: int | Tensor = 0,
    purpose: int = Purpose.FORWARD,
    loss: str = "l2",
    huber_c: float = 0.001,
    weights: Tensor | None = None,
    reduction: str = "mean",
    backend: str | None = None,
) -> Tensor:
    """Give the loss of a model's output for x_t of `add_noise` or `noise_and_target` with the same noise or seeds.

    A sample's loss is the mean over its elements of ρ(r), r = output − target, times its weight::

        l2     ρ = r²
        l1     ρ = |r|
        huber  ρ = √(r² + c²) − c    (pseudo-Huber, as diffusers' distillation scripts for latent consistency models;
                                     Song & Dhariwal 2023, arXiv 2310.14189, section 3.3, take the root of a whole
                                     sample's distance)

    The target is computed in float32 (float64 where a tensor is float64) and not rounded to a half type.  Neither it
    nor drawn noise is stored, for the gradient neither: the backward pass draws the noise again.  Differentiable once
    in output, x0, noise and weights.

    Args:
        output: the model's, ``[B, ...]`` like `x0` in shape and device, of any of the four dtypes; or with twice the
            channels (dimension 1), whose second half, a learned variance, has no part in this loss.
        x0, t, schedule, prediction_type, noise, seeds, noise_step, purpose, backend: as in
            `fastdiff.ops.noise_and_target`.
        loss: "l2", "l1" or "huber".
        huber_c: c, at least 1e-18, in the units of the output.
        weights: ``[B]``, one a sample, or ``[T]``, one a training timestep.
        reduction: "mean" over samples and elements, their "sum", or "none", a loss a sample: the mean over its
            elements.

    Returns:
        ``[]``, or ``[B]`` with "none"; float32 (float64 where a tensor is float64).

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it, what was expected and the remedy.
        RuntimeError: a forced backend is missing.
    """
    operation = "diffusion_loss"
    extension = direct_extension() if backend is None and getattr(x0, "is_cpu", False) else None
    if extension is not None and not _traced():
        offered = extension.recorded_diffusion_loss(
            loss,
            huber_c,
            reduction,
            weights,
            sample=x0,
            model_output=output,
            table=training_table(operation, schedule, prediction_type),
            row_index=t,
            noise=noise,
            seeds=seeds,
            noise_step=noise_step,
            purpose=purpose,
        )
        if type(offered) is not str:
            return offered  # type: ignore[no-any-return]
    if loss not in LOSSES:
        raise unknown_name(operation, "loss", loss, LOSSES)
    if reduction not in REDUCTIONS:
        raise unknown_name(operation, "reduction", reduction, REDUCTIONS)
    c = checked_float(operation, "huber_c", huber_c, LEAST_HUBER_C)
    drawn = check_samples(operation, x0, noise, seeds)
    _check_output(output, x0)
    dtype = compute_dtype(output.dtype, x0.dtype, *(() if noise is None else (noise.dtype,)))
    table, index = forward_rows(operation, x0, t, schedule, prediction_type, dtype)
    at_rows, at_steps = isinstance(index, Tensor), isinstance(noise_step, Tensor)
    each = _apply(
        output,
        x0,
        table,
        0 if at_rows else index,
        index if at_rows else None,
        noise,
        drawn,
        0 if at_steps else noise_step,
        noise_step if at_steps else None,
        checked_integer(operation, "purpose", as_number(purpose), 0),
        loss,
        c,
        backend_to_run(x0, backend, operation),
    )
    if weights is not None:
        each = each * _sample_weights(weights, x0, t, schedule).to(dtype)
    if reduction == "none":
        return each
    return each.mean() if reduction == "mean" else each.sum() * math.prod(x0.shape[1:])


def _check_output(output: object, x0: Tensor) -> None:
    if not isinstance(output, Tensor):
        got = f"is a {type(output).__name__}"
        raise TypeError(error_message("diffusion_loss", "output", got, "a torch.Tensor", "pass the model's output"))
    check_dtype("output", output.dtype, "diffusion_loss")
    if output.device != x0.device:
        got, expected = f"is on {output.device}", f"{x0.device} like x0"
        raise ValueError(error_message("diffusion_loss", "output", got, expected, "move it there"))
    if output.shape != x0.shape and not _has_variance(output, x0):
        got, expected = f"has shape {list(output.shape)}", f"{list(x0.shape)} like x0, or twice the channels"
        raise ValueError(error_message("diffusion_loss", "output", got, expected, "reshape it to match"))


def _has_variance(output: Tensor, x0: Tensor) -> bool:
    """Return whether an output has twice the channels of the samples."""
    if output.dim() != x0.dim() or x0.dim() < 2:
        return False
    return list(output.shape) == [x0.shape[0], 2 * x0.shape[1], *x0.shape[2:]]


def _sample_weights(weights: object, x0: Tensor, t: Any, schedule: Any) -> Tensor:
    """Return one weight a sample, ``[B]``, on the samples' device."""
    if not isinstance(weights, Tensor) or not weights.is_floating_point() or weights.dim() != 1:
        got = f"is a {type(weights).__name__}"
        if isinstance(weights, Tensor):
            got = f"is {weights.dtype} of shape {list(weights.shape)}"
        remedy = "pass one weight a sample, or one a timestep"
        raise TypeError(error_message("diffusion_loss", "weights", got, "a float tensor [B] or [T]", remedy))
    batch, total = x0.shape[0], ForwardScales.of("diffusion_loss", schedule).steps
    continuous = isinstance(t, float) or (isinstance(t, Tensor) and t.is_floating_point())
    by_time = weights.numel() == total and not continuous
    if by_time and batch == total:
        got, remedy = f"has {total} entries for {batch} samples of {total} timesteps", "pass reduction='none' and weigh"
        raise ValueError(error_message("diffusion_loss", "weights", got, "[B] or [T], of different sizes", remedy))
    if not by_time and weights.numel() != batch:
        got = f"has shape {list(weights.shape)}"
        expected = f"[{batch}], one a sample" + ("" if continuous else f", or [{total}], one a timestep")
        raise ValueError(error_message("diffusion_loss", "weights", got, expected, "make it one of them"))
    weights = weights.to(x0.device)
    if not by_time:
        return weights
    if not isinstance(t, Tensor):
        return weights[t].expand(batch)
    places = t.to(x0.device, torch.int64)
    # A timestep out of range gives NaN by its row, whose weight must be one that exists.
    return weights[places if readable_without_sync(places) else places.clamp(0, total - 1)]


def _traced() -> bool:
    """Return whether a dispatch mode or a transform of torch.func has to see operators."""
    return torch._C._len_torch_dispatch_stack() > 0 or torch._C._are_functorch_transforms_active()


# --- The operators of the dispatcher ---------------------------------------------------------------------------------

_ARGUMENTS = (
    "Tensor output, Tensor x0, Tensor table, SymInt row_index, Tensor? row_indices, Tensor? noise, Tensor? seeds, "
    "SymInt noise_step, Tensor? noise_steps, SymInt purpose, str loss, float huber_c, str backend"
)
_NAMES = tuple(argument.split()[1] for argument in _ARGUMENTS.split(", "))
#: Places of output, x0 and noise among them.
_DIFFERENTIABLE = (0, 1, 5)
_TAGS: dict[str, Any] = {"tags": (torch.Tag.needs_exact_strides,)} if hasattr(torch.Tag, "needs_exact_strides") else {}


@torch.library.custom_op("fastdiff::diffusion_loss", mutates_args=(), schema=f"({_ARGUMENTS}) -> Tensor", **_TAGS)
def _loss_op(*values: Any) -> Any:
    """`fastdiff.ops.diffusion_loss` a sample, ``[B]``, without weights."""
    return loss_kernels.forward(*values)


@_loss_op.register_fake
def _(output: Tensor, x0: Tensor, table: Tensor, *_: Any) -> Tensor:
    return x0.new_empty((x0.shape[0],), dtype=table.dtype)


@torch.library.custom_op(
    "fastdiff::diffusion_loss_gradient",
    mutates_args=(),
    schema=f"(Tensor grad, bool[] wanted, {_ARGUMENTS}) -> Tensor[]",
    **_TAGS,
)
def _gradient_op(grad: Tensor, wanted: Sequence[bool], *values: Any) -> Any:
    """The gradients of output, x0 and noise that are wanted, from that of the samples' losses."""
    return loss_kernels.backward(grad, wanted, *values)


@_gradient_op.register_fake
def _(grad: Tensor, wanted: list[bool], *values: Any) -> list[Tensor]:
    return [
        loss_kernels.new_gradient(values[place]) for place, want in zip(_DIFFERENTIABLE, wanted, strict=True) if want
    ]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    if ctx.needs_input_grad[2]:
        remedy = "detach alphas_cumprod"
        raise RuntimeError(
            error_message("diffusion_loss", "schedule", "requires grad", "a schedule without a gradient", remedy)
        )
    ctx.save_for_backward(*(value if isinstance(value, Tensor) else None for value in inputs))
    ctx.rest = [None if isinstance(value, Tensor) else value for value in inputs]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    values = [rest if saved is None else saved for saved, rest in zip(ctx.saved_tensors, ctx.rest, strict=True)]
    wanted = [bool(ctx.needs_input_grad[place]) for place in _DIFFERENTIABLE]
    run: Any = torch.ops.fastdiff.diffusion_loss_gradient
    if ctx.direct and gradient_is_recorded():
        run = _recorded_gradient
    elif ctx.direct and in_memory(grad):
        run = loss_kernels.backward
    found = iter(run(grad, wanted, *values))
    gradients: list[Tensor | None] = [None] * len(values)
    for place, want in zip(_DIFFERENTIABLE, wanted, strict=True):
        if want:
            gradients[place] = next(found)
    return tuple(gradients)


def _setup_direct(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _setup_context(ctx, inputs, output)
    ctx.direct = True


def _fold(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Tensor, int]:
    size = info.batch_size
    folded, batch = fold_loss(_named(arguments), _named(in_dims), size)
    return _apply(*folded.values()).reshape(size, batch), 0


#: Run ``fastdiff::diffusion_loss`` with its schema's arguments.
_apply: Callable[..., Tensor] = eager_operator(
    "diffusion_loss",
    _NAMES,
    lambda *arguments: torch.ops.fastdiff.diffusion_loss(*arguments),
    loss_kernels.forward,
    _setup_direct,
    _backward,
    _fold,
)


def _run_gradient(grad: Tensor, wanted: Sequence[bool], *values: Any) -> Sequence[Tensor]:
    at_hand = all(in_memory(a) for a in (grad, *values) if isinstance(a, Tensor))
    run: Any = loss_kernels.backward if at_hand else torch.ops.fastdiff.diffusion_loss_gradient
    return run(grad, wanted, *values)  # type: ignore[no-any-return]


def _fold_gradient(
    info: Any, in_dims: tuple[Any, ...], grad: Tensor, wanted: Sequence[bool], *values: Any
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    size = info.batch_size
    folded, batch = fold_loss(_named(values), _named(in_dims[2:]), size)
    grad = grad.expand(size, batch) if in_dims[0] is None else grad.movedim(in_dims[0], 0)
    found = [
        one.reshape(size, batch, *one.shape[1:]) for one in _recorded_gradient(grad.flatten(), wanted, *folded.values())
    ]
    return tuple(found), (0,) * len(found)


_recorded_gradient = differentiable_once(
    "diffusion_loss",
    "take fastdiff.training.l2_loss of the output and the target of noise_and_target",
    _run_gradient,
    _fold_gradient,
)


def _named(values: Sequence[Any]) -> dict[str, Any]:
    return dict(zip(_NAMES, values, strict=True))


def _setup_traced(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _setup_context(ctx, inputs, output)
    ctx.direct = False


torch.library.register_autograd(_loss_op, _backward, setup_context=_setup_traced)
torch.library.register_vmap(_loss_op, _fold)
