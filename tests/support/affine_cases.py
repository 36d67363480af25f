# SPDX-License-Identifier: MIT
"""Calls that take every kind of row that fastdiff ships, and the record of the affine loop's runs in them.

A **form** is a tuple of term masks, one per output: bit 0 the sample, 1 the model output, 2 the prediction, then one
bit for each other input of the row (history, noise) in the order of the columns.
"""

from __future__ import annotations

import importlib.util
import itertools
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from fastdiff import Stepper
from fastdiff.ops import backends, noise_and_target
from fastdiff.ops.forward_rows import TARGETS
from fastdiff.row_layout import Variance
from fastdiff.sampling.single_steps import cfg_combine
from fastdiff.schedules import create_noise_scheduler
from fastdiff.schedules.levels import Levels, levels_from_timesteps
from fastdiff.solvers import Prediction, ddim
from fastdiff.solvers.table import StepTable
from support.solver_loops import PREDICTION_TYPES, SOLVERS

Form = tuple[int, ...]
#: A name, and a call or a loop of calls that takes its rows.
Call = tuple[str, Callable[[], None]]

SHAPE = (2, 2, 3, 3)
DROPIN_SHAPE = (1, 4, 3, 3)
GUIDANCE = 2.5
#: Unevenly spaced, so that no coefficient vanishes by chance.
TIMESTEPS = (880, 700, 560, 390, 210, 60)


@dataclass
class Runs:
    """Runs of the affine loop.

    Attributes:
        users: for each form, the calls that took it.
        compiled: forms that ran on a compiled loop.
        runtime: forms that ran on the loop with run-time terms.
        thresholded: forms whose prediction was an input; they have no compiled loop.
    """

    users: dict[Form, list[str]] = field(default_factory=dict)
    compiled: set[Form] = field(default_factory=set)
    runtime: set[Form] = field(default_factory=set)
    thresholded: set[Form] = field(default_factory=set)

    def add(self, name: str, runs: Iterable[tuple[Form, bool, bool, bool]]) -> None:
        for form, _, prediction_given, compiled in runs:
            if prediction_given:
                self.thresholded.add(form)
                continue
            self.users.setdefault(form, []).append(name)
            (self.compiled if compiled else self.runtime).add(form)


def record(calls: Iterable[Call]) -> Runs:
    """Make the calls on the CPU backend and return the affine loop's runs."""
    extension: Any = backends.extension
    found = Runs()
    extension._record_affine_loop(True)
    try:
        for name, call in calls:
            call()
            found.add(name, extension._record_affine_loop(True))
    finally:
        extension._record_affine_loop(False)
    return found


def _tensors(name: str, count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return [torch.randn(SHAPE, generator=generator) for _ in range(count)]


def _walk(name: str, table: StepTable, *, guided: bool) -> None:
    """Take all steps of a table."""
    stepper = Stepper(table, backend="cpu")
    sample, output, uncond, noise, variance = _tensors(name, 5)
    learned = table.variance is not Variance.FIXED
    for i in range(len(table)):
        sample = stepper.step(
            sample,
            output,
            uncond=uncond if guided else None,
            guidance_scale=GUIDANCE if guided else None,
            variance=variance.abs() if learned else None,
            noise=noise if table.draws_noise[i] else None,
        )


def named_levels() -> Iterator[tuple[str, Levels]]:
    alphas_cumprod = create_noise_scheduler("linear").alphas_cumprod
    yield "clean", levels_from_timesteps(alphas_cumprod, TIMESTEPS, final_alpha_cumprod=1.0)
    yield "noisy", levels_from_timesteps(alphas_cumprod, TIMESTEPS, final_alpha_cumprod=float(alphas_cumprod[5]))
    yield "one step", levels_from_timesteps(alphas_cumprod, TIMESTEPS[:1], final_alpha_cumprod=1.0)


def solver_calls() -> Iterator[Call]:
    """Every solver with every option that changes its formula, prediction type, clipping and last level."""
    for (last, levels), kind, bound in itertools.product(named_levels(), PREDICTION_TYPES, ("", "clip", "threshold")):
        clip = {"clip_range": 1.0} if bound == "clip" else {}
        prediction = Prediction(kind, thresholding=bound == "threshold", **clip)
        clipped = {f"ddim-{eta}-clipped": partial(ddim, eta=eta, use_clipped_model_output=True) for eta in (0.5, 1.0)}
        solvers = SOLVERS | clipped
        for solver, make in solvers.items():
            name = " ".join(filter(None, (solver, kind.value, bound, last)))
            try:
                table = make(levels, prediction)
            except ValueError:  # a solver of ε cannot reach the clean sample
                continue
            for guided in (False, True):
                yield name, lambda name=name, table=table, guided=guided: _walk(name, table, guided=guided)


def single_step_calls() -> Iterator[Call]:
    """The functional steps whose rows no solver above has: guidance alone, and the forward process."""
    cond, uncond = _tensors("cfg_combine", 2)
    yield "cfg_combine", lambda: cfg_combine(cond, uncond, GUIDANCE, backend="cpu")
    x0, noise = _tensors("noise_and_target", 2)
    schedule, t = create_noise_scheduler("linear"), torch.tensor(TIMESTEPS[: len(x0)])
    for kind in TARGETS:
        yield (
            f"noise_and_target {kind}",
            lambda kind=kind: noise_and_target(x0, t, schedule, kind, noise=noise, backend="cpu"),  # type: ignore[misc]
        )


#: Options of diffusers' schedulers that change levels and timesteps, hence coefficients, but not which are 0. They are
#: taken one at a time; all others in combinations.
LEVELS_ONLY = frozenset(
    {
        "beta_schedule", "beta_start", "beta_end", "trained_betas", "num_train_timesteps", "timestep_spacing",
        "steps_offset", "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas",
        "lambda_min_clipped", "use_dynamic_shifting", "time_shift_type", "shift", "shift_terminal", "invert_sigmas",
        "sigma_schedule", "sigma_min", "sigma_max", "sigma_data", "snr_shift_scale", "timestep_scaling",
        "original_inference_steps", "interpolation_type", "timestep_type", "scaler", "s", "noise_sampler_seed",
        "dynamic_thresholding_ratio", "sample_max_value", "clip_sample_range", "s_noise",
    }
)  # fmt: skip


def _combinations(groups: list[list[dict[str, Any]]], most: int) -> Iterator[dict[str, Any]]:
    """The default, and every combination of choices of up to `most` groups."""
    yield {}
    for group in groups:
        yield from group
    varied = [[c for c in group if c.keys() - LEVELS_ONLY] for group in groups]
    for count in range(2, most + 1):
        for some in itertools.combinations([group for group in varied if group], count):
            for chosen in itertools.product(*some):
                yield {name: value for choice in chosen for name, value in choice.items()}


def dropin_calls(name: str, most: int = 2) -> Iterator[Call]:
    """Loops of a drop-in scheduler: plain over its options, up to `most` groups at a time, and guided by default."""
    from support.dropin_cases import ARGUMENTS, OPTIONS

    seen = set()
    for config in _combinations(OPTIONS[name], most):
        for arguments in _combinations(ARGUMENTS.get(name, []), most):
            key = f"{name} {config} {arguments}"
            if key not in seen:
                seen.add(key)
                yield key, partial(_walk_dropin, name, config, arguments)
    yield f"{name} {{}} {{}}", partial(_walk_dropin, name, {}, {}, guided=True)


def _walk_dropin(name: str, config: dict[str, Any], arguments: dict[str, Any], *, guided: bool = False) -> None:
    """A loop of a drop-in scheduler; options that diffusers refuses end it."""
    from support.dropin_cases import MOST_STEPS, Case
    from support.dropin_helpers import classes, make_loop

    _, ours = classes(name)
    loop = make_loop(Case(name, config, min(7, MOST_STEPS.get(name, 7)), arguments, shape=DROPIN_SHAPE), ours)
    if loop.error is None and guided and hasattr(ours, "guided_step"):
        step = loop.scheduler.guided_step
        loop.run(step=lambda output, *args, **kwargs: step(-output, output, GUIDANCE, *args, **kwargs))
    elif loop.error is None and not guided:
        loop.run()


def guider_calls() -> Iterator[Call]:
    """Every guider of diffusers that fastdiff computes."""
    from support.guider_cases import CASES, pair, shape_of, walk

    for name, options in CASES:
        guider, _ = pair(name, options)
        yield f"{name} {options}", lambda name=name, guider=guider: walk(guider, shape_of(name), torch.float32)


def groups(most: int = 2) -> dict[str, Callable[[], Iterator[Call]]]:
    """The calls in groups: the solvers, single steps, guiders, and each drop-in scheduler by its name.

    Args:
        most: groups of a drop-in's options that are combined.
    """
    found: dict[str, Callable[[], Iterator[Call]]] = {"solvers": solver_calls, "single_steps": single_step_calls}
    if importlib.util.find_spec("diffusers") is not None:
        from fastdiff.diffusers import CLASSES
        from support.dropin_cases import OPTIONS

        found["guiders"] = guider_calls
        found |= {name: partial(dropin_calls, name, most) for name in OPTIONS if f"{name}Scheduler" in CLASSES}
    return found
