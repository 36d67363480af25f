# SPDX-License-Identifier: MIT
"""diffusers' schedulers, called as its pipelines call them: input scaled, guidance inline, one step."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .cases import GUIDANCE, Case, Tensors
from .peers import Walk

#: The attributes that a step changes in a scheduler, and that set_timesteps would reset.
_STATE = ("_step_index", "lower_order_nums", "model_outputs", "dt", "prev_derivative", "sample")


def walks(case: Case, sets: Sequence[Tensors], *, compiled: bool = False) -> list[Walk]:
    """A scheduler a set; `compiled`: its step and the guidance before it under torch.compile, breaks and all."""
    import diffusers

    if case.recipe.diffusers is None:
        raise RuntimeError(f"diffusers has no {case.op}")
    class_name, arguments = case.recipe.diffusers
    scheduler = getattr(diffusers, class_name)(**arguments)
    scheduler.set_timesteps(case.steps, device=case.device)
    draws = {"generator": torch.Generator(case.device).manual_seed(0)} if any(case.table.draws_noise) else {}
    # A shallow copy shares the tables, which a step only reads.
    return [Walk(_walk(copy.copy(scheduler), tensors, draws, compiled)) for tensors in sets]


def _walk(scheduler: Any, tensors: Tensors, draws: dict[str, Any], compiled: bool) -> Callable[[], object]:
    start, cond, uncond = tensors
    fresh = {name: value for name, value in vars(scheduler).items() if name in _STATE}
    timesteps = list(scheduler.timesteps)
    scales = getattr(scheduler, "scale_model_input", None)  # flow schedulers have none
    position = len(timesteps)
    sample = start

    def guided_step(cond: Any, uncond: Any, timestep: Any, sample: Any) -> Any:
        guided = uncond + GUIDANCE * (cond - uncond)
        return scheduler.step(guided, timestep, sample, return_dict=False, **draws)[0]

    take = torch.compile(guided_step) if compiled else guided_step

    def advance() -> None:
        nonlocal position, sample
        if position == len(timesteps):
            for name, value in fresh.items():  # without set_timesteps' cost: it is not part of a step
                setattr(scheduler, name, list(value) if isinstance(value, list) else value)
            position, sample = 0, start
        timestep = timesteps[position]
        if scales is not None:
            scales(sample, timestep)  # as every pipeline does; most return their argument
        sample = take(cond, uncond, timestep, sample)
        position += 1

    return advance
