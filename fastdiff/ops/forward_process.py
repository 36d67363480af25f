# SPDX-License-Identifier: MIT
"""The forward process of training: noisy samples and the model's target, in the pass over memory of one step.

x_t = α·x0 + σ·z and every usual target are affine maps of x0 and the noise, so both are one fused step with a row for
each timestep (ops/forward_rows.py).  The noise may be drawn inside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import error_message
from ..philox import Purpose, as_seeds
from ..row_layout import compute_dtype
from .checks import check_dtype, readable_without_sync
from .forward_rows import forward_rows
from .step import step


def noise_and_target(
    x0: Tensor,
    t: Tensor | int | float,
    schedule: Any,
    prediction_type: str = "epsilon",
    *,
    noise: Tensor | None = None,
    seeds: Tensor | Sequence[int] | None = None,
    noise_step: int | Tensor = 0,
    purpose: int = Purpose.FORWARD,
    out: Sequence[Tensor | torch.dtype | None] | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Give noisy samples x_t = α_t·x0 + σ_t·z and the training target in one pass over memory.

    The target is z for "epsilon"; x0 for "sample" (or "x0"); α·z − σ·x0 for "v_prediction" (arXiv 2202.00512, appendix
    D); z − x0 for "flow_prediction" (or "flow"; arXiv 2209.03003).  Both are computed in float32 (float64 where a
    tensor is float64) from scalars rounded once from float64, and each is rounded once.  Differentiable in x0 and
    noise.

    Args:
        x0: clean samples ``[B, ...]``; float16, bfloat16, float32 or float64, any strides.
        t: training timesteps, integers ``[B]`` or one number for all, 0 to T − 1.  For flow schedules also floats in
            [0, 1], which are σ itself: no shift of the schedule is applied to them.  On the CPU they are checked; on a
            GPU, where that would be a host sync, a timestep out of range gives NaN.
        schedule: a `fastdiff.schedules.BaseNoiseScheduler`; a scheduler of diffusers, read by its ``alphas_cumprod``
            (samples are in the model's coordinates, also where the scheduler's own ``add_noise`` gives x0 + σ·z), or by
            the shift of a flow scheduler, whose integer timesteps are the levels (k + 1)/T before it; or ᾱ itself,
            ``[T]``.
        prediction_type: what the model predicts.
        noise: z, standard normal, like `x0` in shape and device, of any of the four dtypes.
        seeds: instead of `noise`: it is drawn in the same pass, each sample's from its own seed, as `ops.step` draws
            it.  int64 ``[B]`` (see `fastdiff.noise.sample_seeds`) or ints.
        noise_step, purpose: words of the noise's counter, as in `ops.step`.
        out: destinations of noisy samples and target: each a tensor to write, the dtype of a new one, or None for a new
            one like `x0`.
        backend: a name of `BACKENDS`, to force it.

    Returns:
        noisy samples and target, like `x0` in shape.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it, what was expected and the remedy.
        RuntimeError: a forced backend is missing.
    """
    operation = "noise_and_target"
    targets = _targets(operation, out, 2)
    table, index, drawn = _prepare(operation, x0, t, schedule, prediction_type, noise, seeds, targets)
    if isinstance(index, Tensor) and not isinstance(targets[1], Tensor) and not readable_without_sync(index):
        # The step would zero a kept output that it makes, in case a row skips its sample.
        targets = (targets[0], torch.empty_like(x0, dtype=targets[1]))
    noisy, target = step(
        x0,
        _unread(x0),
        table,
        index,
        noise=noise,
        seeds=drawn,
        noise_step=noise_step,
        purpose=purpose,
        keeps=1,
        out=targets,
        backend=backend,
    )
    return noisy, target


def add_noise(
    x0: Tensor,
    t: Tensor | int | float,
    schedule: Any,
    *,
    noise: Tensor | None = None,
    seeds: Tensor | Sequence[int] | None = None,
    noise_step: int | Tensor = 0,
    purpose: int = Purpose.FORWARD,
    out: Tensor | torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor:
    """Give noisy samples x_t = α_t·x0 + σ_t·z alone; their bits are those of `noise_and_target`.

    With `seeds` this is all that training needs: `diffusion_loss` draws the noise again.

    Args:
        x0, t, schedule, noise, seeds, noise_step, purpose, backend: as in `noise_and_target`.
        out: a tensor to write, which may be `x0`; the dtype of a new one; or None for a new one like `x0`.

    Returns:
        noisy samples, like `x0` in shape.

    Raises:
        TypeError, ValueError, RuntimeError: as `noise_and_target`.
    """
    targets = (out,)
    table, index, drawn = _prepare("add_noise", x0, t, schedule, "epsilon", noise, seeds, targets)
    return step(
        x0,
        _unread(x0),
        table,
        index,
        noise=noise,
        seeds=drawn,
        noise_step=noise_step,
        purpose=purpose,
        out=targets,
        backend=backend,
    )[0]


def _unread(x0: Tensor) -> Tensor:
    """Return a model output for a step whose rows read none; it must not ask for a gradient."""
    return x0.detach() if x0.requires_grad else x0


def _targets(operation: str, out: object, count: int) -> tuple[Any, ...]:
    if out is None:
        return (None,) * count
    if not isinstance(out, (list, tuple)) or len(out) != count:
        got = f"holds {len(out)}" if isinstance(out, (list, tuple)) else f"is a {type(out).__name__}"
        remedy = "pass out=(noisy, target), each a tensor, a dtype or None"
        raise ValueError(error_message(operation, "out", got, f"{count} destinations", remedy))
    return tuple(out)


def _prepare(
    operation: str,
    x0: Tensor,
    t: Any,
    schedule: Any,
    prediction_type: object,
    noise: Tensor | None,
    seeds: Any,
    targets: Sequence[Any],
) -> tuple[Tensor, int | Tensor, Tensor | None]:
    """Check the arguments that a step does not know; return its table, its rows and its seeds."""
    drawn = check_samples(operation, x0, noise, seeds)
    stored = [target if isinstance(target, torch.dtype) else target.dtype for target in targets if target is not None]
    dtype = compute_dtype(x0.dtype, *(() if noise is None else (noise.dtype,)), *stored)
    return (*forward_rows(operation, x0, t, schedule, prediction_type, dtype), drawn)


def check_samples(operation: str, x0: object, noise: object, seeds: Any) -> Tensor | None:
    """Check clean samples, and that one of noise and seeds is given and fits; return the seeds as a tensor."""
    if not isinstance(x0, Tensor):
        raise TypeError(error_message(operation, "x0", f"is a {type(x0).__name__}", "a torch.Tensor", "pass a tensor"))
    check_dtype("x0", x0.dtype, operation)
    if x0.dim() == 0:
        remedy = "add a dimension of samples with x0[None]"
        raise ValueError(error_message(operation, "x0", "has no dimension", "[B, ...]", remedy))
    if (noise is None) == (seeds is None):
        got = "and seeds are both missing" if noise is None else "is given beside seeds"
        remedy = "pass noise=torch.randn_like(x0), or seeds=fastdiff.noise.sample_seeds(...)"
        raise ValueError(error_message(operation, "noise", got, "one of noise and seeds", remedy))
    if noise is not None:
        if not isinstance(noise, Tensor):
            got = f"is a {type(noise).__name__}"
            raise TypeError(error_message(operation, "noise", got, "a torch.Tensor", "pass a tensor"))
        check_dtype("noise", noise.dtype, operation)
        if noise.shape != x0.shape or noise.device != x0.device:
            got = f"has shape {list(noise.shape)} on {noise.device}"
            expected = f"{list(x0.shape)} on {x0.device} like x0"
            raise ValueError(error_message(operation, "noise", got, expected, "draw it with torch.randn_like(x0)"))
        return None
    if isinstance(seeds, Tensor):
        if seeds.dtype != torch.int64 or list(seeds.shape) != [x0.shape[0]] or seeds.device != x0.device:
            got = f"is {seeds.dtype} of shape {list(seeds.shape)} on {seeds.device}"
            expected = f"int64 [{x0.shape[0]}] on {x0.device}"
            raise ValueError(error_message(operation, "seeds", got, expected, "give one seed a sample"))
        return seeds
    return as_seeds(seeds, x0.shape[0], x0.device)
