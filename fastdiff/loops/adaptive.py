# SPDX-License-Identifier: MIT
"""DPM-Solver with a step size that an estimate of the error chooses (arXiv 2206.00927, appendix C; k-diffusion)."""

from __future__ import annotations

import itertools
import math
from array import array
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..errors import checked_float, error_message
from ..noise.generators import draw
from ..philox import as_seeds
from ..row_layout import NUM_REGISTERS, compute_dtype
from ..solvers.affine import NOISE, SAMPLE
from ..solvers.dpm_fast import DIFFERENCE, LOW_ORDER, StepSizeController, noisy_step, step_with_error
from ..solvers.table import Row, StepTable
from .first_order import ExtraArgs
from .run import Callback, Model, NoiseSampler, Seeds, progress_bar
from .runge_kutta import check_range


def sample_dpm_adaptive(
    model: Model,
    x: Tensor,
    sigma_min: float,
    sigma_max: float,
    extra_args: ExtraArgs = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    order: int = 3,
    rtol: float = 0.05,
    atol: float = 0.0078,
    h_init: float = 0.05,
    pcoeff: float = 0.0,
    icoeff: float = 1.0,
    dcoeff: float = 0.0,
    accept_safety: float = 0.81,
    eta: float = 0.0,
    s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
    return_info: bool = False,
    *,
    seeds: Seeds = None,
) -> Any:
    """DPM-Solver-12 and 23: each step estimates its error by a step of one order less, from the same model calls.

    The error is ‖(x_low − x)/δ‖/√numel over the whole batch, with δ the larger of atol and rtol·max(|x_low|, |x_low of
    the last step|).  A step therefore waits for the device once, and a sample's steps depend on its batch.

    Args:
        model, x, extra_args, disable, noise_sampler, seeds: as in `fastdiff.loops`.
        sigma_min, sigma_max: the range of σ, both above 0; samples end at `sigma_min`.
        callback: gets, besides ``x`` (after the step), ``i``, ``sigma``, ``sigma_hat`` and ``denoised``, the ``error``,
            the next step size ``h`` in −log σ, and the counts ``steps``, ``nfe``, ``n_accept``, ``n_reject``.
        order: 2 or 3, also the model calls in a step.
        rtol, atol: the tolerances.
        h_init: the first step size, in −log σ.
        pcoeff, icoeff, dcoeff, accept_safety: of `StepSizeController`.
        eta, s_noise: of ancestral noise; 0 adds none.
        return_info: return (samples, counts).

    Returns:
        The samples at `sigma_min`, like x.

    Raises:
        TypeError, ValueError: an argument does not fit.
        RuntimeError: the step size has become too small to go on.
    """
    operation = "sample_dpm_adaptive"
    check_range(operation, sigma_min, sigma_max)
    if order not in (2, 3):
        raise ValueError(error_message(operation, "order", f"is {order}", "2 or 3", "choose one of those orders"))
    checked_float(operation, "rtol", rtol, 0.0)
    checked_float(operation, "atol", atol, 0.0, strict=True)
    checked_float(operation, "eta", eta, 0.0)
    if noise_sampler is not None and seeds is not None:
        raise ValueError(
            error_message(operation, "seeds", "is given beside noise_sampler", "one of the two", "leave one out")
        )
    controller = StepSizeController(
        checked_float(operation, "h_init", h_init, 0.0, strict=True),
        pcoeff, icoeff, dcoeff, 1.5 if eta else order, accept_safety,
    )  # fmt: skip
    keys = None if seeds is None else as_seeds(seeds, x.shape[0], x.device)
    now, end = -math.log(sigma_max), -math.log(sigma_min)
    # δ/rtol = max(atol/rtol, |x_low|, |x_low of the last step|), with a tiny rtol in place of 0.
    tiny = 1e-12 * atol
    floor = atol / max(rtol, tiny)
    last_size = x.detach().abs().clamp_(min=floor)
    info: dict[str, Any] = {"steps": 0, "nfe": 0, "n_accept": 0, "n_reject": 0}
    with torch.no_grad(), progress_bar(0, disable) as bar:
        while now < end - 1e-5:
            ahead = min(end, now + controller.h)
            sigma, sigma_next = math.exp(-now), math.exp(-ahead)
            if not sigma_next < sigma:
                raise RuntimeError(
                    error_message(
                        operation,
                        "h",
                        f"is {controller.h:g} at σ = {sigma:g}",
                        "a step that moves",
                        "raise atol or rtol, or check the model's output for NaN",
                    )
                )
            down, up = noisy_step(operation, sigma, sigma_next, sigma_min, eta)
            high, low, difference, denoised = _take(model, x, sigma, down, order, extra_args or {}, bar)
            size = low.abs_().clamp_(min=floor)
            difference.div_(torch.maximum(size, last_size))
            error = float(torch.linalg.vector_norm(difference)) / (max(rtol, tiny) * x.numel() ** 0.5)
            if controller.accepts(error):
                if up:
                    high = _with_noise(high, up * s_noise, sigma, sigma_next, noise_sampler, keys, info["n_accept"])
                x, last_size, now = high, size, ahead
                info["n_accept"] += 1
            else:
                info["n_reject"] += 1
            info["nfe"] += order
            info["steps"] += 1
            if callback is not None:
                level = torch.tensor(math.exp(-now), dtype=torch.float64)
                callback(
                    {
                        "x": x,
                        "i": info["steps"] - 1,
                        "sigma": level,
                        "sigma_hat": level,
                        "denoised": denoised,
                        "error": error,
                        "h": controller.h,
                        **info,
                    }
                )
    return (x, info) if return_info else x


def _take(
    model: Model, x: Tensor, sigma: float, target: float, order: int, extra_args: Any, bar: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Take one step; return its result, that of lower order, their difference, and the first denoised samples."""
    rows, levels, slots = step_with_error(sigma, target, order)
    # Half the time of torch.tensor, with the same rounding.
    dtype = compute_dtype(x.dtype)
    numbers = array("d" if dtype == torch.float64 else "f", itertools.chain.from_iterable(rows))
    table = torch.frombuffer(numbers, dtype=dtype).view(len(rows), -1).to(x.device)
    history: list[Tensor | None] = [None] * NUM_REGISTERS
    first: Tensor | None = None
    current = x
    for index, level in enumerate(levels):
        denoised = model(current, x.new_full((len(x),), level), **extra_args)
        bar.update()
        first = denoised if first is None else first
        current, *kept = ops.step(current, denoised, table, index, history=history, keeps=len(slots[index]))
        for slot, tensor in zip(slots[index], kept, strict=True):
            history[slot] = tensor
    low, difference = history[LOW_ORDER], history[DIFFERENCE]
    assert low is not None
    assert difference is not None
    assert first is not None
    return current, low, difference, first


def _with_noise(
    x: Tensor,
    std: float,
    sigma: float,
    sigma_next: float,
    noise_sampler: NoiseSampler | None,
    seeds: Tensor | None,
    step: int,
) -> Tensor:
    """Add noise to the result of an accepted step."""
    table = StepTable((Row(0.0, SAMPLE + std * NOISE, (0.0, 1.0)),)).coefficients_as(x.dtype, x.device)
    noise = None
    if noise_sampler is not None:
        noise = noise_sampler(x.new_tensor(sigma), x.new_tensor(sigma_next))
    elif seeds is None:
        noise = draw(x.shape, None, dtype=x.dtype, device=x.device)
    return ops.step(x, x, table, 0, noise=noise, seeds=seeds if noise is None else None, noise_step=step, out=(x,))[0]
