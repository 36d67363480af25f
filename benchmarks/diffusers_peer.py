# SPDX-License-Identifier: MIT
"""Peer "diffusers": its schedulers, called like its pipelines call them: scaled input, inline guidance, one step."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .cases import GUIDANCE, Case, Tensors
from .peers import RepeatingLoop

#: Attributes of a scheduler that a step changes and set_timesteps would reset.
_STATE = ("_step_index", "lower_order_nums", "model_outputs", "dt", "prev_derivative", "sample")


def repeating_loops(case: Case, sets: Sequence[Tensors], *, compiled: bool = False) -> list[RepeatingLoop]:
    """Return a loop with its own scheduler per set of tensors.

    Args:
        compiled: run guidance and step under torch.compile, with graph breaks allowed.
    """
    import diffusers

    if case.spec.diffusers is None:
        raise RuntimeError(f"diffusers has no {case.op}")
    class_name, arguments = case.spec.diffusers
    scheduler = getattr(diffusers, class_name)(**arguments)
    scheduler.set_timesteps(case.steps, device=case.device)
    draws = {"generator": torch.Generator(case.device).manual_seed(0)} if any(case.table.draws_noise) else {}
    # A shallow copy shares the tables, which a step only reads.
    return [RepeatingLoop(_loop(copy.copy(scheduler), tensors, draws, compiled)) for tensors in sets]


def _loop(scheduler: Any, tensors: Tensors, draws: dict[str, Any], compiled: bool) -> Callable[[], object]:
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
            for name, value in fresh.items():  # avoids set_timesteps, whose time is not part of a step
                setattr(scheduler, name, list(value) if isinstance(value, list) else value)
            position, sample = 0, start
        timestep = timesteps[position]
        if scales is not None:
            scales(sample, timestep)  # every pipeline calls it; most schedulers return the argument
        sample = take(cond, uncond, timestep, sample)
        position += 1

    return advance
