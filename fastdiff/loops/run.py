# SPDX-License-Identifier: MIT
"""The loop behind every ``sample_…`` function: call the model, take the step, until the program ends."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import checked_type, error_message
from ..noise.brownian_path import BrownianPath
from ..sampling.reference_counts import reference_counts
from ..sampling.stepper import Stepper
from ..solvers.registry import Solver
from ..solvers.sigma_steps import UNCOND_SLOT
from .denoisers import Denoiser
from .program import Calls, NoiseBy, Program, compiled

#: ``model(x, sigma, **extra_args)`` with x ``[B, ...]`` and σ ``[B]``; returns the denoised samples like x.
Model = Callable[..., Any]
#: Called with a dict of ``x, i, sigma, sigma_hat, denoised`` after the first model call of each step, before the step.
Callback = Callable[[dict[str, Any]], object]
#: ``noise_sampler(sigma, sigma_next)``, both 0-dim tensors, returns standard normal noise like x.
NoiseSampler = Callable[[Any, Any], Tensor]
Seeds = int | Sequence[int] | Tensor | None


class ChurnOptions(NamedTuple):
    """The four options of `fastdiff.solvers.Churn`, as a hashable value."""

    s_churn: float = 0.0
    s_tmin: float = 0.0
    s_tmax: float = float("inf")
    s_noise: float = 1.0


def run(
    solver: Solver,
    model: Model,
    x: Tensor,
    sigmas: Tensor | Sequence[float],
    extra_args: Mapping[str, Any] | None,
    callback: Callback | None,
    disable: bool | None,
    *,
    options: Mapping[str, Hashable] | None = None,
    calls: Calls = 1,
    noise_by: NoiseBy = "step",
    brownian: bool = False,
    flow: bool = False,
    noise_sampler: NoiseSampler | None = None,
    seeds: Seeds = None,
) -> Tensor:
    """Walk a solver's table over `sigmas`.

    Args:
        solver, options, calls, noise_by, flow: as in `program.compiled`.
        model, x, sigmas, extra_args, callback, disable: as in `fastdiff.loops`.
        brownian: noise is the increments of one Brownian path a sample, unless there is a noise sampler.
        noise_sampler: draws the noise.
        seeds: one for each sample; steps draw their noise from these.

    Returns:
        The samples at the last level, like x; `x` itself where there is no step.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
    """
    operation = f"sample_{solver.__name__}"
    checked_type(operation, "x", x, Tensor, "a tensor [B, ...]", "draw it with torch.randn")
    if noise_sampler is not None and seeds is not None:
        raise ValueError(
            error_message(operation, "seeds", "is given beside noise_sampler", "one of the two", "leave one out")
        )
    values = tuple(sigmas.tolist()) if isinstance(sigmas, Tensor) else tuple(map(float, sigmas))
    if len(values) < 2:
        return x
    if isinstance(model, Denoiser) and model.parametrization.flow != flow:
        expected = "a FlowPathDenoiser" if flow else "a denoiser of x0 + σ·ε, such as FlowDenoiser"
        got, remedy = f"is a {type(model).__name__}", "wrap the model in that"
        raise TypeError(error_message(operation, "model", got, expected, remedy))
    inside = model if isinstance(model, Denoiser) and callback is None else None
    program = compiled(
        solver,
        values,
        tuple((options or {}).items()),
        calls,
        noise_by,
        None if inside is None else inside.parametrization,
        flow,
    )
    if not any(program.table.draws_noise):
        noise_sampler = seeds = None
    elif brownian and noise_sampler is None:
        noise_sampler = _Paths(x, seeds)
        seeds = None
    noise = None if noise_sampler is None else _Noise(noise_sampler, program, x)
    stepper = Stepper(program.table, seeds=seeds)
    with torch.no_grad(), progress_bar(program.steps, disable) as bar:
        if inside is not None:
            return _walk_inside(inside, x, program, stepper, extra_args or {}, noise, bar)
        report = None if callback is None else _Report(callback, sigmas, values)
        return _walk(model, x, program, stepper, extra_args or {}, report, noise, bar)


def _walk(
    model: Model,
    x: Tensor,
    program: Program,
    stepper: Stepper,
    extra_args: Mapping[str, Any],
    report: _Report | None,
    noise: _Noise | None,
    bar: Any,
) -> Tensor:
    """Walk with a model that takes x and returns the denoised samples, and the unconditional ones for CFG++."""
    sigmas = arguments(program.sigmas, x)
    with_uncond = bool(program.table.provided_slots)
    # The first samples are the caller's. Later ones are written over, unless a callback gets them or the model has
    # kept them.
    own, measured, counts = False, None, None
    for row, call in enumerate(program.calls):
        out = None
        denoised: Any = None  # not the last output, which may be x: the counts below would include it
        if call.sigma is not None:
            if x is not measured:
                measured = x
                counts = reference_counts(x)
            denoised = model(x, sigmas[row], **extra_args)
            if with_uncond:
                denoised, uncond = _pair(denoised)
                stepper.provide(UNCOND_SLOT, uncond)
            if report is not None and call.begins:
                report(x, call.step, call.sigma, denoised)
            if own and report is None and counts is not None and reference_counts(x) == counts:
                out = x
        drawn = None if noise is None else noise(row)
        # A row that adds noise alone does not read the model's output.
        x = stepper.step(x, x if call.sigma is None else denoised, noise=drawn, out=out)
        own = True
        if call.begins:
            bar.update()
    return x


def _walk_inside(
    denoiser: Denoiser,
    x: Tensor,
    program: Program,
    stepper: Stepper,
    extra_args: Mapping[str, Any],
    noise: _Noise | None,
    bar: Any,
) -> Tensor:
    """Walk with the model inside a denoiser: the step takes its raw output and writes its next input."""
    times = arguments(denoiser.times(program.sigmas), x)
    scale = denoiser.parametrization.input_scale(program.sigmas[0])
    prepared, own, last = x * scale, False, len(program.calls) - 1
    for row, call in enumerate(program.calls):
        output, kept = x, False
        if call.sigma is not None:
            before = reference_counts(prepared)
            output = denoiser.inner_model(prepared, times[row], **extra_args)
            kept = before is None or reference_counts(prepared) != before
        target = torch.empty_like(prepared) if kept else prepared
        x = stepper.step(
            x,
            output,
            noise=None if noise is None else noise(row),
            out=x if own else None,
            model_input=None if row == last else target,
        )
        prepared, own = target, True
        if call.begins:
            bar.update()
    return x


def arguments(values: Sequence[float], x: Tensor) -> tuple[Tensor, ...]:
    """Return a tensor ``[B]`` in the dtype of x for each value; new ones, since a model may write to its arguments."""
    column = torch.tensor(values, dtype=x.dtype).to(x.device, non_blocking=True)
    return column.repeat_interleave(x.shape[0]).view(len(values), -1).unbind()


def _pair(returned: Any) -> tuple[Any, Any]:
    """Return the guided and the unconditional denoised samples of a model for CFG++."""
    if isinstance(returned, (tuple, list)) and len(returned) == 2:
        return returned[0], returned[1]
    raise TypeError(
        error_message(
            "CFG++",
            "model",
            f"returned a {type(returned).__name__}",
            "(denoised, uncond_denoised)",
            "return the guided and the unconditional prediction of x0",
        )
    )


class _Report:
    """Call the user's callback with k-diffusion's dict."""

    def __init__(self, callback: Callback, sigmas: Tensor | Sequence[float], values: Sequence[float]) -> None:
        self._callback = callback
        self._sigmas = sigmas if isinstance(sigmas, Tensor) else torch.tensor(values, dtype=torch.float64)

    def __call__(self, x: Tensor, step: int, sigma_hat: float, denoised: Tensor) -> None:
        sigma = self._sigmas[step] if step < len(self._sigmas) else self._sigmas.new_tensor(sigma_hat)
        at_sigma = float(sigma) == sigma_hat
        self._callback(
            {
                "x": x,
                "i": step,
                "sigma": sigma,
                "sigma_hat": sigma if at_sigma else self._sigmas.new_tensor(sigma_hat),
                "denoised": denoised,
            }
        )


class _Noise:
    """Ask a noise sampler for the noise of a row."""

    def __init__(self, sampler: NoiseSampler, program: Program, x: Tensor) -> None:
        self._sampler = sampler
        self._draws = program.table.draws_noise
        ends = [level for call in program.calls for level in (call.noise_from, call.noise_to)]
        if isinstance(sampler, _Paths):
            self._ends: Sequence[Any] = ends
        else:
            self._ends = torch.tensor(ends, dtype=torch.promote_types(x.dtype, torch.float32)).to(x.device).unbind()

    def __call__(self, row: int) -> Tensor | None:
        if not self._draws[row]:
            return None
        return self._sampler(self._ends[2 * row], self._ends[2 * row + 1])


class _Paths(BrownianPath):
    """The Brownian paths of the samples x; without seeds, from one that torch's generator draws for each."""

    def __init__(self, x: Tensor, seeds: Seeds) -> None:
        if seeds is None:
            seeds = torch.randint(0, 2**63 - 1, (x.shape[0],))
        super().__init__(x.shape, seeds, device=x.device, dtype=x.dtype)


class _Silent:
    """The progress bar of a loop without one."""

    def __enter__(self) -> _Silent:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def update(self) -> None:
        pass


_SILENT = _Silent()


@functools.cache
def _tqdm() -> Any:
    try:
        return importlib.import_module("tqdm.auto").tqdm
    except ImportError:
        return None


def progress_bar(total: int, disable: bool | None) -> Any:
    """Return tqdm's bar, or a silent one without tqdm; ``disable=None`` shows it on a terminal alone, as tqdm does."""
    if disable or _tqdm() is None:
        return _SILENT
    return _tqdm()(total=total, disable=disable)
