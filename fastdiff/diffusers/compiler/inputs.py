# SPDX-License-Identifier: MIT
"""The inputs of one call of a step, and readers of its scalar inputs.

In: a scheduler's attributes, its schedule and the call's arguments.  Out: the number that a reader finds there.

A reader is a small hashable object, called with `StepInputs`.  Tapes name their inputs by readers, so that a recorded
trace can be evaluated for another call.
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
#: The value of an attribute that a scheduler does not have.
ABSENT = "absent"
#: The attribute with the per-scheduler cache of `fastdiff.diffusers`.
CACHE = "_fused"
#: The attribute with the scheduler's configuration, which is part of every plan's key.
CONFIG = "_internal_dict"
#: Methods of schedulers that look a timestep up in the schedule; their results are kept by its value.
LOOKUPS = frozenset(("index_for_timestep", "previous_timestep"))
#: The first arguments of a step in nearly all classes.
USUAL_ARGUMENTS = ("model_output", "timestep", "sample")
#: Arguments that are tensors like the samples, each with its input name in expressions.
TENSOR_ARGUMENTS = {
    "model_output": "model_output",
    "sample": "sample",
    "variance_noise": "noise:given",
    "old_pred_original_sample": "old_pred_original_sample",
    "pred_original_sample": "pred_original_sample",
    "original_image": "original_image",
    "mask": "mask",
}


class StepInputs:
    """The inputs of one call of a step.

    Args:
        attributes: the scheduler's, as `snapshot` copies them.
        arguments: by name.
        schedule: the scheduler's arrays on the host: `host`, `contents`, `values`, `position`, `lookup` and `look_up`.
    """

    __slots__ = ("arguments", "attributes", "schedule")

    def __init__(self, attributes: Mapping[str, Any], arguments: Mapping[str, Any], schedule: Any) -> None:
        self.attributes, self.arguments, self.schedule = attributes, arguments, schedule


def snapshot(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Copy a scheduler's attributes and the lists among them, so that no other thread changes them."""
    return {name: list(value) if type(value) is list else value for name, value in attributes.items() if name != CACHE}


def _number_of(value: Any, schedule: Any) -> Any:
    """Return a number, or the one number that a tensor holds, from the host if the schedule has it there."""
    if not isinstance(value, Tensor):
        return value
    position = schedule.position(value)
    return value.detach().reshape(-1)[0].item() if position is None else schedule.values("timesteps")[position]


@dataclass(frozen=True)
class AttributeNumber:
    """Read an attribute, or an entry of a list attribute, that is a number or a tensor with one."""

    name: str
    index: int | None = None

    def __call__(self, inputs: StepInputs) -> Any:
        value = inputs.attributes[self.name]
        return _number_of(value if self.index is None else value[self.index], inputs.schedule)


@dataclass(frozen=True)
class ScheduleArray:
    """Read one of the scheduler's arrays as a list; without dimensions, as its one number."""

    name: str

    def __call__(self, inputs: StepInputs) -> Any:
        return inputs.schedule.values(self.name)


@dataclass(frozen=True)
class ArgumentNumber:
    """Read an argument that is a number, or a tensor with one, once or expanded; or an element of a tensor argument."""

    name: str
    element: int | None = None

    def __call__(self, inputs: StepInputs) -> Any:
        value = inputs.arguments[self.name]
        if self.element is None:
            return _number_of(value, inputs.schedule)
        return value.detach().reshape(-1)[self.element].item()


@dataclass(frozen=True)
class Lookup:
    """Read a method that looks a timestep up in the schedule, as a function of the timestep's value."""

    method: str
    dtype: torch.dtype | None
    shape: tuple[int, ...]

    def __call__(self, inputs: StepInputs) -> Callable[[Any], Any]:
        return inputs.schedule.lookup(self, inputs.attributes)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Structure:
    """Read an attribute without its numbers, as `structure` returns it."""

    name: str

    def __call__(self, inputs: StepInputs) -> Any:
        return structure(self.name, inputs.attributes.get(self.name, ABSENT))


@dataclass(frozen=True)
class Contents:
    """Read dtype, shape and bytes of one of the scheduler's arrays."""

    name: str

    def __call__(self, inputs: StepInputs) -> Any:
        return inputs.schedule.contents[self.name]


def structure(name: str, value: Any) -> Any:
    """Return a key for an attribute's value without its numbers: the type of a number, dtype and shape of a tensor."""
    kind = type(value)
    if value is None or kind is bool or kind is str:
        return value
    if kind is int or kind is float:
        return kind
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
    """Return a key for an object of any other kind, which does not keep it alive."""
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
