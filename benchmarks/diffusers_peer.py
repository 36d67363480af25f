# SPDX-License-Identifier: MIT
"""diffusers' schedulers, called as its pipelines call them: input scaled, guidance inline, one step."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .cases import GUIDANCE, OPS, Case, Tensors
from .peers import Walk

#: What a step changes in a scheduler, and set_timesteps would reset.
_STATE = ("_step_index", "lower_order_nums", "model_outputs", "dt", "prev_derivative", "sample")


def walks(case: Case, sets: Sequence[Tensors]) -> list[Walk]:
    """A scheduler a set."""
    import diffusers

    class_name, arguments = OPS[case.op].diffusers
    scheduler = getattr(diffusers, class_name)(**arguments)
    scheduler.set_timesteps(case.steps)
    draws = {"generator": torch.Generator().manual_seed(0)} if any(case.table.draws_noise) else {}
    # A shallow copy shares the tables, which a step only reads.
    return [Walk(_walk(copy.copy(scheduler), tensors, draws)) for tensors in sets]


def _walk(scheduler: Any, tensors: Tensors, draws: dict[str, Any]) -> Callable[[], object]:
    start, cond, uncond = tensors
    fresh = {name: value for name, value in vars(scheduler).items() if name in _STATE}
    timesteps = list(scheduler.timesteps)
    position = len(timesteps)
    sample = start

    def advance() -> None:
        nonlocal position, sample
        if position == len(timesteps):
            for name, value in fresh.items():  # without set_timesteps' cost: it is not part of a step
                setattr(scheduler, name, list(value) if isinstance(value, list) else value)
            position, sample = 0, start
        timestep = timesteps[position]
        scheduler.scale_model_input(sample, timestep)  # as every pipeline does; most return their argument
        guided = uncond + GUIDANCE * (cond - uncond)
        sample = scheduler.step(guided, timestep, sample, return_dict=False, **draws)[0]
        position += 1

    return advance
