# SPDX-License-Identifier: MIT
"""The sampling task that methods are compared on, and the methods with their options."""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from ..errors import checked_float, checked_integer, error_message, unknown_name
from ..guidance import Model
from ..samplers import BaseSampler, create_sampler
from ..sampling.config import SamplingConfig
from ..sampling.loop import SamplingResult
from ..schedules import BaseNoiseScheduler, create_noise_scheduler
from ..schedules.timesteps import TIMESTEP_SPACINGS, timestep_schedule
from ..solvers import SamplingMethod

#: Fields of SamplingConfig by the names of methods: presets of the registry, and the other values of `SamplingMethod`.
METHODS: dict[str, dict[str, Any]] = {
    name: preset for method in SamplingMethod for name, preset in method.presets.items()
}
METHODS |= {method.value: {"method": method} for method in SamplingMethod if method.value not in METHODS}

_OF_SAMPLING = {item.name for item in fields(SamplingConfig)} - {"method", "num_inference_steps"}


@dataclass(frozen=True)
class MethodSpec:
    """A method with its options, and the timesteps that it visits.

    Args:
        label: the name in tables and pictures.
        fields: fields of `SamplingConfig`, the method among them.
        spacing: a timestep spacing instead of the scheduler's; ``"power"`` takes `power`.
        power: exponent p of the timesteps (T − 1)·(1 − i/n)^p; above 1 the visits crowd at the clean end.
    """

    label: str
    fields: Mapping[str, Any]
    spacing: str | None = None
    power: float = 1.0

    @property
    def method(self) -> SamplingMethod:
        return SamplingMethod.parse(self.fields["method"])

    def sampler(self, workload: Workload, steps: int) -> BaseSampler:
        """Make the sampler of so many steps.

        Raises:
            TypeError, ValueError: an option or the number of steps is out of range, or the method calls the model with
                times that are no timesteps of the schedule.
        """
        scheduler = workload.scheduler
        if self.spacing in TIMESTEP_SPACINGS:
            scheduler = create_noise_scheduler(scheduler.config, timestep_spacing=self.spacing)
        made = create_sampler(scheduler, **{**workload.fields, **self.fields, "num_inference_steps": steps})
        last = len(scheduler.alphas_cumprod) - 1
        outside = [t for t in made.table.timesteps if not 0.0 <= t <= last]
        if outside:
            got = f"is {self.label!r}, which calls the model with the time {outside[0]:g}"
            expected, remedy = f"timesteps from 0 to {last}", "leave it out: it takes a network with times of its own"
            raise ValueError(error_message("compare", "methods", got, expected, remedy))
        return made

    def timesteps(self, workload: Workload, steps: int) -> list[float] | None:
        """Return the timesteps to pass to `sample`, or None for the sampler's own."""
        if self.spacing != "power":
            return None
        total = len(workload.scheduler.alphas_cumprod)
        timestep_schedule("trailing", steps, total)  # for its bounds on the number of steps
        return [(total - 1) * (1 - i / steps) ** self.power for i in range(steps)]


@dataclass(frozen=True)
class Workload:
    """A model with its schedule, noise and conditions: everything about sampling but the method.

    Args:
        model: as `fastdiff.samplers.BaseSampler.sample` takes it.
        scheduler: the noise schedule that the model was trained on.
        latents: standard normal noise, ``[B, ...]``.
        prompt_embeds, negative_prompt_embeds: conditions, as in `sample`.
        fields: fields of `SamplingConfig` for every method: ``prediction_type``, ``guidance_scale`` and others.
        seeds: of the noise of stochastic methods, one a sample.
        name: of the model, for reports.
        decode: samples to images ``[B, 1 or 3, H, W]`` in [−1, 1]; None where they are images already.
        real: images of the data, for the metrics of `encoder`; None leaves those out.
        encoder: images to features ``[B, D]``; None leaves out Fréchet distance, precision and recall.
        classifier: images to logits ``[B, K]``; None leaves out the inception-style score.
        model_dtype: what the model is called in; the latents' own where None.
    """

    model: Model
    scheduler: BaseNoiseScheduler
    latents: Tensor
    prompt_embeds: Tensor | None = None
    negative_prompt_embeds: Tensor | None = None
    fields: Mapping[str, Any] = field(default_factory=dict)
    seeds: Tensor | None = None
    name: str = "model"
    decode: Callable[[Tensor], Tensor] | None = None
    real: Tensor | None = None
    encoder: Callable[[Tensor], Tensor] | None = None
    classifier: Callable[[Tensor], Tensor] | None = None
    model_dtype: torch.dtype | None = None

    def run(
        self, spec: MethodSpec, steps: int, *, samples: slice | None = None, sampler: BaseSampler | None = None
    ) -> SamplingResult:
        """Sample with a method.

        Args:
            spec: the method.
            steps: of the loop.
            samples: the part of the batch; None for all.
            sampler: what ``spec.sampler(self, steps)`` gave, to compile it once.
        """
        part = slice(None) if samples is None else samples
        sampler = spec.sampler(self, steps) if sampler is None else sampler
        timesteps = spec.timesteps(self, steps)
        options: dict[str, Any] = {} if timesteps is None else {"timesteps": timesteps}
        result = sampler.sample(
            self.model,
            self.latents[part],
            None if self.prompt_embeds is None else self.prompt_embeds[part],
            None if self.negative_prompt_embeds is None else self.negative_prompt_embeds[part],
            seeds=None if self.seeds is None else self.seeds[part],
            progress=False,
            model_dtype=self.model_dtype,
            **options,
        )
        if result.steps < len(sampler.table):  # the loop ends early for Ctrl-C alone, as there is no callback
            raise KeyboardInterrupt
        return result

    def trajectory(self, spec: MethodSpec, steps: int, *, progress: bool | None = None) -> list[Tensor]:
        """Return the latents and the sample after each model call, ``[B, ...]`` each.

        Args:
            spec: the method.
            steps: of the loop.
            progress: show a progress bar; None shows it where tqdm is installed.
        """
        sampler, timesteps = spec.sampler(self, steps), spec.timesteps(self, steps)
        options: dict[str, Any] = {} if timesteps is None else {"timesteps": timesteps}
        frames = [self.latents.clone()]
        sampler.sample(
            self.model,
            self.latents,
            self.prompt_embeds,
            self.negative_prompt_embeds,
            seeds=self.seeds,
            progress=progress,
            callback=lambda info: frames.append(info.sample.clone()),
            model_dtype=self.model_dtype,
            **options,
        )
        return frames


def parse_method(method: str | SamplingMethod | MethodSpec, operation: str = "compare_methods") -> MethodSpec:
    """Return a method from its name and options.

    Args:
        method: a name of the registry with options behind colons, such as ``"unipc"``,
            ``"dpmsolver++:solver_order=3:sigma_spacing=karras"``, ``"ddim:spacing=linspace"`` or
            ``"unipc:power=1.75"``; or a `SamplingMethod`, or a finished `MethodSpec`.
        operation: who asks, for messages.

    Raises:
        ValueError: an unknown name or option, or a value out of range.
    """
    if isinstance(method, MethodSpec):
        return method
    text = method.value if isinstance(method, SamplingMethod) else str(method)
    name, *options = text.split(":")
    if name not in METHODS:
        raise unknown_name(operation, "methods", name, METHODS)
    chosen: dict[str, Any] = dict(METHODS[name])
    spacing, power = None, 1.0
    for option in options:
        key, separator, value = option.partition("=")
        if not separator or key not in _OF_SAMPLING | {"spacing", "power"}:
            raise unknown_name(operation, f"option of {name}", option, {*_OF_SAMPLING, "spacing", "power"})
        if key == "spacing":
            if value not in TIMESTEP_SPACINGS:
                raise unknown_name(operation, "spacing", value, TIMESTEP_SPACINGS)
            spacing = value
        elif key == "power":
            spacing, power = "power", checked_float(operation, "power", _literal(value), 0.0, strict=True)
        else:
            chosen[key] = _literal(value)
    SamplingConfig(**chosen)  # refuses values out of range
    return MethodSpec(text, chosen, spacing, power)


def check_steps(operation: str, steps: object) -> tuple[int, ...]:
    """Return numbers of steps in ascending order, each once.

    Raises:
        TypeError, ValueError: there is none, or one is no integer of at least 1.
    """
    values = list(steps) if isinstance(steps, (list, tuple, range)) else [steps]
    if not values:
        raise ValueError(error_message(operation, "steps", "is empty", "one number or more", "pass steps=(10, 20)"))
    return tuple(sorted({checked_integer(operation, "steps", value, 1) for value in values}))


def _literal(text: str) -> Any:
    """Return a number, a bool or None that a text spells, else the text."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
