# SPDX-License-Identifier: MIT
"""What a traced step reads: a scheduler's attributes, its schedule, the call's arguments, and how each is compared.

A reader is a small hashable object that is called with an `Environment`.  Traces name their inputs by readers, so that
a recorded trace can be run again in the environment of another call.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

#: Attributes in which schedulers keep tensors like the samples from step to step, alone or in lists.
HISTORY = frozenset(
    (
        "model_outputs", "ets", "derivatives", "last_sample", "sample", "prev_derivative", "cur_sample",
        "cur_model_output", "last_noise",
    )
)  # fmt: skip
#: Attributes that hold a tensor with one number, made by one step for the next.
SCALARS_OF_STATE = frozenset(("dt", "mid_point_sigma"))
#: An attribute that is not there.
ABSENT = "absent"
#: The attribute with the per-scheduler cache of `fastdiff.diffusers`.
FUSED = "_fused"
#: The attribute with the scheduler's configuration, which plans are kept by.
CONFIG = "_internal_dict"
#: Methods of schedulers that look a timestep up in the schedule: their results are kept by its value.
LOOKUPS = frozenset(("index_for_timestep", "previous_timestep"))


def is_history(name: str) -> bool:
    """Whether an attribute holds tensors like the samples."""
    return name in HISTORY


class Environment:
    """One call of a step.

    Args:
        attributes: the scheduler's, in a dictionary of its own with lists of its own.
        arguments: by name.
        schedule: the scheduler's arrays on the host, `fastdiff.diffusers.schedule.Schedule`.
    """

    __slots__ = ("arguments", "attributes", "schedule")

    def __init__(self, attributes: Mapping[str, Any], arguments: Mapping[str, Any], schedule: Any) -> None:
        self.attributes, self.arguments, self.schedule = attributes, arguments, schedule


def snapshot(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """A scheduler's attributes as they are now, whatever another thread does next."""
    return {name: list(value) if type(value) is list else value for name, value in attributes.items() if name != FUSED}


def _number_of(value: Any, schedule: Any) -> Any:
    """A number, or the one number that a tensor holds, from the host where the schedule has it."""
    if not isinstance(value, Tensor):
        return value
    place = schedule.position(value)
    return value.detach().reshape(-1)[0].item() if place is None else schedule.values("timesteps")[place]


@dataclass(frozen=True)
class AttributeNumber:
    """An attribute that is a number, or a tensor with one."""

    name: str

    def __call__(self, environment: Environment) -> Any:
        return _number_of(environment.attributes[self.name], environment.schedule)


@dataclass(frozen=True)
class ScheduleArray:
    """The numbers in one of the scheduler's arrays as a list; of a tensor without dimensions, the one number."""

    name: str

    def __call__(self, environment: Environment) -> Any:
        return environment.schedule.values(self.name)


@dataclass(frozen=True)
class ItemNumber:
    """A number in a list among the attributes, or in a tensor there."""

    name: str
    place: int

    def __call__(self, environment: Environment) -> Any:
        return _number_of(environment.attributes[self.name][self.place], environment.schedule)


@dataclass(frozen=True)
class ArgumentNumber:
    """An argument that is a number, or a tensor with one, once or expanded."""

    name: str

    def __call__(self, environment: Environment) -> Any:
        return _number_of(environment.arguments[self.name], environment.schedule)


@dataclass(frozen=True)
class ArgumentItem:
    """An element of an argument that is a tensor of several numbers."""

    name: str
    element: int

    def __call__(self, environment: Environment) -> Any:
        return environment.arguments[self.name].detach().reshape(-1)[self.element].item()


@dataclass(frozen=True)
class Lookup:
    """A method that looks a timestep up in the schedule, as a function of the timestep's value."""

    method: str
    dtype: torch.dtype | None
    shape: tuple[int, ...]

    def __call__(self, environment: Environment) -> Callable[[Any], Any]:
        return environment.schedule.lookup(self, environment.attributes)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Structure:
    """What an attribute is, its numbers left out: what a trace that reads it depends on."""

    name: str

    def __call__(self, environment: Environment) -> Any:
        return structure(self.name, environment.attributes.get(self.name, ABSENT))


@dataclass(frozen=True)
class Contents:
    """All that one of the scheduler's arrays holds."""

    name: str

    def __call__(self, environment: Environment) -> Any:
        return environment.schedule.contents[self.name]


def structure(name: str, value: Any) -> Any:
    """What a value of an attribute is, as a key: of numbers the type, of tensors dtype and shape."""
    kind = type(value)
    if value is None or kind is bool or kind is str:
        return value
    if kind is int or kind is float:
        return kind
    if name == "noise_sampler":
        return "sampler"  # which one it is does not matter to a plan
    if isinstance(value, Tensor):
        return value.dtype if name in HISTORY else (value.dtype, value.shape)
    if isinstance(value, np.ndarray):
        return value.dtype.str, value.shape, value.tobytes()
    if kind is list or kind is tuple:
        if name in HISTORY:
            return kind, tuple(item.dtype if isinstance(item, Tensor) else item for item in value)
        return kind, tuple(structure(name, item) for item in value)
    return identity(value)


def identity(value: Any) -> Any:
    """A key for an object of any other kind, which does not keep it alive."""
    code = getattr(value, "__code__", None)
    if code is not None and not value.__closure__ and not value.__defaults__:
        return code  # a function that depends on its arguments alone
    try:
        hash(value)
    except TypeError:
        return repr(value)
    try:
        return weakref.ref(value)  # references to one object are equal, and to a dead one to none
    except TypeError:
        return value
