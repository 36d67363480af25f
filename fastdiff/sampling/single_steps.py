# SPDX-License-Identifier: MIT
"""Single steps of the common samplers, for people who bring their own loop.

Each turns its scalars into one row with the same solver that the samplers use, keeps the row for the next time, and
calls `step`.  A row is made on the host, once for each combination of numbers; the 1024 used last are kept.

A scalar is a number, or a tensor of one element, such as ``alphas_cumprod[t]``: its value is read at each call, so a
tensor may change in place.  On a GPU reading it waits for the device; keep schedules on the CPU.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..errors import as_float, checked_bool, checked_type, error_message, unknown_name
from ..noise.generators import Generators, draw
from ..ops.checks import DTYPES
from ..ops.step import step
from ..row_layout import compute_dtype
from ..schedules.levels import Level, Levels, variance_preserving
from ..solvers import (
    Algorithm,
    Prediction,
    PredictionType,
    SolverType,
    ddim,
    ddpm,
    dpm_multistep,
    euler,
    euler_ancestral,
)
from ..solvers.affine import MODEL_OUTPUT, Affine
from ..solvers.ddpm import VarianceType
from ..solvers.dpm_multistep import THIRD_ORDERS
from ..solvers.table import Row, StepTable


def cfg_combine(
    cond: Tensor,
    uncond: Tensor,
    guidance_scale: float | Tensor,
    *,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Classifier-free guidance, ``u + g·(c − u)`` (arXiv 2207.12598, eq. 6), in one pass.

    Args:
        cond: c, any shape, float16, bfloat16, float32 or float64.
        uncond: u, like `cond`.
        guidance_scale: g, a float, or ``[B]`` in float32 (float64 for float64 tensors).
        out: a tensor to write instead of a new one; may be `cond` or `uncond`.
        backend: forces one, as in `step`.

    Returns:
        The guided output, like `cond`.
    """
    table = _coefficients(_compiled(_cfg_row), cond, uncond, out)
    outs = None if out is None else (out,)
    return step(cond, cond, table, 0, uncond=uncond, guidance_scale=guidance_scale, out=outs, backend=backend)[0]


def ddpm_step(
    sample: Tensor,
    model_output: Tensor,
    *,
    alpha_cumprod: float | Tensor,
    alpha_cumprod_prev: float | Tensor,
    noise: Tensor | None = None,
    variance_type: str = "fixed_small",
    variance: Tensor | None = None,
    prediction_type: str = "epsilon",
    clip_range: float | Tensor | None = None,
    uncond: Tensor | None = None,
    guidance_scale: float | Tensor | None = None,
    generator: Generators = None,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """One step of DDPM (arXiv 2006.11239, eq. 6 and 7).

    Args:
        sample: x_t, ``[...]``.
        model_output: the (conditional) model output, like `sample`.
        alpha_cumprod: ᾱ at the timestep of `sample`, in [0, 1).
        alpha_cumprod_prev: ᾱ at the timestep to reach, in (ᾱ, 1]; at 1 no noise is added.
        noise: z, like `sample`; drawn with `generator`, one or one a sample, where None and needed.
        variance_type: see `fastdiff.solvers.ddpm`.
        variance: the model's second output, for the learned variances.
        prediction_type: ``epsilon``, ``v_prediction``, ``sample`` or ``flow_prediction``.
        clip_range: clamp x0 to ± this; None leaves it.
        uncond, guidance_scale: classifier-free guidance in the same pass.
        out: a tensor to write; may be `sample`.
        backend: forces one, as in `step`.

    Returns:
        The previous sample, like `sample`.
    """
    compiled = _compiled(
        _ddpm_table,
        _number("ddpm_step", "alpha_cumprod", alpha_cumprod),
        _number("ddpm_step", "alpha_cumprod_prev", alpha_cumprod_prev),
        VarianceType.parse(variance_type),
        PredictionType.parse(prediction_type),
        _clip("ddpm_step", clip_range),
    )
    return _run(
        compiled, sample, model_output, uncond, guidance_scale, noise, generator, out, backend, variance=variance
    )


def ddim_step(
    sample: Tensor,
    model_output: Tensor,
    *,
    alpha_cumprod: float | Tensor,
    alpha_cumprod_prev: float | Tensor,
    eta: float | Tensor = 0.0,
    noise: Tensor | None = None,
    prediction_type: str = "epsilon",
    clip_range: float | Tensor | None = None,
    use_clipped_model_output: bool = False,
    uncond: Tensor | None = None,
    guidance_scale: float | Tensor | None = None,
    generator: Generators = None,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """One step of DDIM (arXiv 2010.02502, eq. 12); arguments as in `ddpm_step`, and:

    Args:
        eta: 0 is deterministic, 1 draws DDPM's noise.
        use_clipped_model_output: derive ε from the clipped x0.
    """
    compiled = _compiled(
        _ddim_table,
        _number("ddim_step", "alpha_cumprod", alpha_cumprod),
        _number("ddim_step", "alpha_cumprod_prev", alpha_cumprod_prev),
        _number("ddim_step", "eta", eta),
        PredictionType.parse(prediction_type),
        _clip("ddim_step", clip_range),
        checked_bool("ddim_step", "use_clipped_model_output", use_clipped_model_output),
    )
    return _run(compiled, sample, model_output, uncond, guidance_scale, noise, generator, out, backend)


def dpm_solver_step(
    sample: Tensor,
    model_output: Tensor,
    *,
    alphas_cumprod: Sequence[float | Tensor] | Tensor,
    previous: Sequence[Tensor] = (),
    algorithm_type: str = "dpmsolver++",
    solver_type: str = "midpoint",
    third_order: str = "compatible",
    noise: Tensor | None = None,
    prediction_type: str = "epsilon",
    clip_range: float | Tensor | None = None,
    uncond: Tensor | None = None,
    guidance_scale: float | Tensor | None = None,
    generator: Generators = None,
    out: tuple[Tensor, Tensor] | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """One step of multistep DPM-Solver(++) (arXiv 2211.01095); its order is one more than ``len(previous)``.

    Args:
        sample, model_output, prediction_type, clip_range, uncond, guidance_scale, noise, generator, backend: as in
            `ddpm_step`.
        alphas_cumprod: ᾱ at the timesteps of `previous` (oldest first), of `sample`, and at the one to reach:
            ``len(previous) + 2`` ascending numbers.
        previous: the second result of up to two earlier steps, oldest first.
        algorithm_type, solver_type, third_order: see `fastdiff.solvers.dpm_multistep`.
        out: two tensors to write; they may be inputs.

    Returns:
        The previous sample, and the model's reading (x0 or ε) to hand to later steps as `previous`.
    """
    for name, tensors in (("previous", previous), ("out", () if out is None else out)):
        remedy = f"pass {name}=[tensor]" if name == "previous" else "pass out=(tensor, tensor)"
        if not isinstance(tensors, (list, tuple)):
            got = f"is a {type(tensors).__name__}"
            raise TypeError(error_message("dpm_solver_step", name, got, "a list or tuple of tensors", remedy))
    for j, tensor in enumerate(previous):
        remedy = "pass the second result of an earlier step"
        checked_type("dpm_solver_step", f"previous[{j}]", tensor, Tensor, "a torch.Tensor", remedy)
    numbers = _numbers("dpm_solver_step", "alphas_cumprod", alphas_cumprod)
    if len(numbers) != len(previous) + 2 or len(previous) > 2:
        raise ValueError(
            error_message(
                "dpm_solver_step",
                "alphas_cumprod",
                f"holds {len(numbers)} numbers for {len(previous)} previous outputs",
                "two more than previous, of which there are two at most",
                "give ᾱ of each previous output, of sample, and of the timestep to reach",
            )
        )
    if third_order not in THIRD_ORDERS:
        raise unknown_name("dpm_solver_step", "third_order", third_order, THIRD_ORDERS)
    compiled = _compiled(
        _dpm_table,
        numbers,
        Algorithm.parse(algorithm_type),
        SolverType.parse(solver_type),
        third_order,
        PredictionType.parse(prediction_type),
        _clip("dpm_solver_step", clip_range),
    )
    # The solver's earlier rows kept the outputs in a ring of history slots: put them where the last row reads them.
    order = len(previous) + 1
    history: list[Tensor | None] = [None, None]
    for j, tensor in enumerate(previous):
        history[j % max(order - 1, 1)] = tensor
    noise = _noise(compiled, sample, noise, generator)
    table = _coefficients(compiled, sample, model_output, uncond, noise, *previous, *(out or ()))
    prev, kept = step(
        sample, model_output, table, len(compiled) - 1, uncond=uncond, guidance_scale=guidance_scale, history=history,
        noise=noise, keeps=1, out=out, backend=backend,
    )  # fmt: skip
    return prev, kept


def euler_step(
    sample: Tensor,
    model_output: Tensor,
    *,
    sigma: float | Tensor,
    sigma_next: float | Tensor,
    eta: float | Tensor = 0.0,
    s_noise: float | Tensor = 1.0,
    noise: Tensor | None = None,
    prediction_type: str = "epsilon",
    uncond: Tensor | None = None,
    guidance_scale: float | Tensor | None = None,
    generator: Generators = None,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """One Euler or Euler-ancestral step in k-diffusion's coordinates, x̂ = x0 + σ̂·ε.

    The model is understood to have seen ``x̂ / √(σ̂² + 1)``, as models trained on α² + σ² = 1 want it.

    Args:
        sample: x̂ at σ̂ = `sigma`, ``[...]``.
        model_output, prediction_type, uncond, guidance_scale, noise, generator, out, backend: as in `ddpm_step`.
        sigma: the noise level of `sample`, above 0.
        sigma_next: the one to reach, from 0 to below `sigma`.
        eta: 0 is Euler's method, 1 ancestral sampling.
        s_noise: the standard deviation of the added noise.

    Returns:
        x̂ at `sigma_next`, like `sample`.
    """
    compiled = _compiled(
        _euler_table,
        _number("euler_step", "sigma", sigma),
        _number("euler_step", "sigma_next", sigma_next),
        _number("euler_step", "eta", eta),
        _number("euler_step", "s_noise", s_noise),
        PredictionType.parse(prediction_type),
    )
    return _run(compiled, sample, model_output, uncond, guidance_scale, noise, generator, out, backend)


def _run(
    compiled: StepTable,
    sample: Tensor,
    model_output: Tensor,
    uncond: Tensor | None,
    guidance_scale: float | Tensor | None,
    noise: Tensor | None,
    generator: Generators,
    out: Tensor | None,
    backend: str | None,
    variance: Tensor | None = None,
) -> Tensor:
    noise = _noise(compiled, sample, noise, generator)
    table = _coefficients(compiled, sample, model_output, uncond, noise, variance, out)
    outs = None if out is None else (out,)
    return step(
        sample, model_output, table, 0, uncond=uncond, guidance_scale=guidance_scale, noise=noise, variance=variance,
        variance_kind=int(compiled.variance), out=outs, backend=backend,
    )[0]  # fmt: skip


def _noise(compiled: StepTable, sample: Tensor, noise: Tensor | None, generator: Generators) -> Tensor | None:
    """Return the given noise, or a draw where the row wants one; for a sample that `step` takes."""
    checked_type("step", "sample", sample, Tensor, "a torch.Tensor", "pass a tensor")
    if noise is None and compiled.draws_noise[-1] and sample.dtype in DTYPES:
        return draw(sample.shape, generator, dtype=sample.dtype, device=sample.device)
    return noise


@functools.lru_cache(maxsize=1024)
def _compiled(make: Callable[..., StepTable], *scalars: object) -> StepTable:
    return make(*scalars)


def _coefficients(compiled: StepTable, sample: Tensor, *others: Tensor | None) -> Tensor:
    """Return the coefficients for a step on these tensors, on the device of the first."""
    checked_type("step", "sample", sample, Tensor, "a torch.Tensor", "pass a tensor")
    dtypes = [tensor.dtype for tensor in others if isinstance(tensor, Tensor)]
    return compiled.shared_coefficients(compute_dtype(sample.dtype, *dtypes), sample.device)


def _number(operation: str, argument: str, value: Any) -> float:
    """Return a scalar's number, which a tensor of one element is read for.

    Raises:
        TypeError: it is no real number, or a tensor whose gradient would be lost.
        ValueError: a tensor of another size than 1.
    """
    if type(value) is float:
        return value
    expected = "a number, or a tensor of one"
    if not isinstance(value, Tensor):
        return as_float(operation, argument, value, expected)
    if value.numel() != 1:
        remedy = "take one step a value, or call fastdiff.ops.step with a row for each sample"
        raise ValueError(error_message(operation, argument, f"has shape {list(value.shape)}", expected, remedy))
    if value.requires_grad and torch.is_grad_enabled():
        remedy = "pass it detached: a step has gradients of its tensors alone"
        raise TypeError(error_message(operation, argument, "requires grad", expected, remedy))
    return as_float(operation, argument, value.item(), expected)


def _clip(operation: str, clip_range: Any) -> float | None:
    return None if clip_range is None else _number(operation, "clip_range", clip_range)


def _numbers(operation: str, argument: str, values: Any) -> tuple[float, ...]:
    """Return the numbers of a list, tuple or 1-D tensor."""
    if isinstance(values, Tensor) and values.dim() == 1 and not values.requires_grad:
        values = values.tolist()
    if not isinstance(values, (list, tuple)):
        got = f"has shape {list(values.shape)}" if isinstance(values, Tensor) else f"is a {type(values).__name__}"
        raise TypeError(
            error_message(operation, argument, got, "a list, tuple or 1-D tensor", "pass a list of numbers")
        )
    return tuple(_number(operation, f"{argument}[{i}]", value) for i, value in enumerate(values))


def _cfg_row() -> StepTable:
    return StepTable((Row(0.0, MODEL_OUTPUT, (0.0, 0.0)),))


def _levels(operation: str, alphas_cumprod: Sequence[float]) -> Levels:
    """Levels with α² = ᾱ, their timesteps unknown and unused."""
    for value in alphas_cumprod:
        if not 0.0 <= value <= 1.0:
            raise ValueError(
                error_message(operation, "alpha_cumprod", f"is {value}", "a number from 0 to 1", "pass ᾱ, not α or β")
            )
    points = tuple(Level(0.0, math.sqrt(a), math.sqrt(1.0 - a)) for a in alphas_cumprod)
    return Levels(points, lambda ratio: variance_preserving(ratio, 0.0))


def _prediction(prediction_type: str, clip_range: float | None) -> Prediction:
    return Prediction(prediction_type, math.inf if clip_range is None else clip_range)  # type: ignore[arg-type]


def _ddpm_table(a: float, a_prev: float, kind: VarianceType, prediction_type: str, clip: float | None) -> StepTable:
    return ddpm(_levels("ddpm_step", (a, a_prev)), _prediction(prediction_type, clip), variance_type=kind)


def _ddim_table(
    a: float, a_prev: float, eta: float, prediction_type: str, clip: float | None, use_clipped: bool
) -> StepTable:
    levels = _levels("ddim_step", (a, a_prev))
    return ddim(levels, _prediction(prediction_type, clip), eta=eta, use_clipped_model_output=use_clipped)


def _dpm_table(
    alphas_cumprod: tuple[float, ...],
    algorithm_type: str,
    solver_type: str,
    third_order: str,
    prediction_type: str,
    clip: float | None,
) -> StepTable:
    levels = _levels("dpm_solver_step", alphas_cumprod)
    prediction = _prediction(prediction_type, clip)
    table = dpm_multistep(
        levels,
        prediction,
        algorithm_type=algorithm_type,
        solver_order=len(levels),
        solver_type=solver_type,
        lower_order_final=False,
        third_order=third_order,
    )
    # A loop's last row keeps nothing. The caller of this one continues, so it returns the output that later steps read.
    *before, last = table.source
    reading = Algorithm.parse(algorithm_type).interpolated(prediction.at(levels[len(levels) - 1]))
    return StepTable((*before, replace(last, kept=(reading,), slots=(0,))), drop_unread=False)


def _euler_table(sigma: float, sigma_next: float, eta: float, s_noise: float, prediction_type: str) -> StepTable:
    if not (math.isfinite(sigma) and 0.0 <= sigma_next < sigma):
        raise ValueError(
            error_message(
                "euler_step",
                "sigma_next",
                f"is {sigma_next} after sigma {sigma}",
                "0 <= sigma_next < sigma, both finite",
                "step from high noise to low",
            )
        )
    t, s = variance_preserving(sigma, 0.0), variance_preserving(sigma_next, 0.0)
    levels = Levels((t, s), lambda ratio: variance_preserving(ratio, 0.0))
    prediction = Prediction(prediction_type)  # type: ignore[arg-type]
    table = euler_ancestral(levels, prediction, eta=eta, s_noise=s_noise) if eta else euler(levels, prediction)
    (row,) = table.source
    # From x = α·x̂ to x̂: what multiplies x is taken α_t times, and the result divided by α_s.
    of_sample, *others = row.prev_sample.coefficients
    prev = Affine([of_sample * t.alpha, *others]) / s.alpha
    p, q = row.prediction
    return StepTable((replace(row, prev_sample=prev, prediction=(p * t.alpha, q)),))
