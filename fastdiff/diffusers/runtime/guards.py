# SPDX-License-Identifier: MIT
"""Guards: the conditions on a scheduler's attributes and on a call's arguments under which a plan is the right one.

A guard list is emitted once, when the plan of a step has been looked up.  The cache in C++ (csrc/dropin/guards.h) and
that in Python (`fastdiff.diffusers.runtime.step_cache`) evaluate it by the same definition: `Guard.check` here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import IntEnum
from types import FunctionType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import Parameter

from ..compiler.inputs import CACHE, CONFIG, HISTORY, TENSOR_ARGUMENTS, USUAL_ARGUMENTS
from ..compiler.plan import Plan

#: Types whose equal values are the same to every plan.
PLAIN = frozenset((type(None), bool, int, float, str, np.float64))


class GuardKind(IntEnum):
    """How a value is compared; `GuardKind` in csrc/dropin/guards.h."""

    #: Not at all.
    ANY = 0
    #: It is the object itself.
    ID = 1
    #: A plain value of the same type: None, bool, int, float, str, or a list, tuple or dict of such.
    EQUALS = 2
    #: A tensor of this dtype and shape.
    TENSOR = 3
    #: A tensor or a NumPy array that holds these bytes; of a tensor on a device, by a copy on the host.
    ARRAY = 4
    #: A view of a timestep of the schedule, once or expanded, so many bytes from the one that is due.
    TIMESTEP = 5


class HostCopy(NamedTuple):
    """An array on a device as it was copied to the host.

    Attributes:
        tensor: the array on the device.
        version: how often it had been written (`Tensor._version`).
        host: the copy.
        record: the copy as an ARRAY guard holds it.
    """

    tensor: Tensor
    version: int
    host: Tensor
    record: tuple[Any, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> HostCopy:
        """Copy an array; the host waits for what writes it."""
        host = tensor.detach().cpu()
        return cls(tensor, tensor._version, host, array_record(host))

    def holds(self, value: object) -> bool:
        """Return whether a value is the array, not written since."""
        return value is self.tensor and self.tensor._version == self.version


class Guard(NamedTuple):
    """The condition on one attribute or argument.

    Attributes:
        name: of the attribute or argument.
        kind: how it is compared.
        expected: ID, EQUALS: the object or the value; ``...`` in a list matches any tensor. TENSOR: (dtype, shape).
            ARRAY: (class, torch dtype or buffer format, shape, bytes). TIMESTEP: (dtype, shape, bytes). ANY: None.
    """

    name: str
    kind: GuardKind
    expected: Any = None

    def check(self, value: Any, timestep: int | None = None, copies: Sequence[HostCopy] = ()) -> bool:
        """Return whether the guard holds for a value.

        Args:
            value: of the attribute or argument now.
            timestep: the address of the schedule's timestep that is due, for TIMESTEP.
            copies: of arrays on devices, for ARRAY, which holds for no other array on a device.
        """
        if self.kind is GuardKind.ANY:
            return True
        if self.kind is GuardKind.ID:
            return value is self.expected
        if self.kind is GuardKind.EQUALS:
            return equal_plain(self.expected, value)
        if self.kind is GuardKind.ARRAY:
            return bool(_array_record(value, copies) == self.expected)
        if not isinstance(value, Tensor) or not has_plain_sizes(value):
            return False
        if (value.dtype, tuple(value.shape)) != self.expected[:2]:
            return False
        if self.kind is GuardKind.TENSOR:
            return True
        one = value.numel() == 1 or (value.dim() == 1 and value.stride(0) == 0)
        return one and timestep is not None and bool(value.data_ptr() == timestep + self.expected[2])


class FirstStep(NamedTuple):
    """The first step of a loop, by the guards under which a later loop takes it at once.

    Attributes:
        plan: of the step.
        scheduler_class, method, guided, seeded: of the call, compared first.
        attributes: a guard for each attribute, in the order of the scheduler's ``__dict__`` and without its cache.
        arguments: a guard for each argument: model_output, timestep, sample, then the others in the call's order.
        place: index of the call's timestep in the schedule.
        step_bytes: how far apart timesteps lie in memory.
        plan_cache: of the scheduler.
        reads: the attributes that steps of the class read.
    """

    plan: Plan
    scheduler_class: type
    method: str
    guided: bool
    seeded: bool
    attributes: Sequence[Guard]
    arguments: Sequence[Guard]
    place: int
    step_bytes: int
    plan_cache: Any
    reads: Mapping[str, None]


def equal_plain(expected: Any, value: Any) -> bool:
    """Return whether two plain values are equal and of one type; ``...`` in an expected list matches any tensor."""
    if expected is value:
        return True
    if type(expected) is not type(value):
        return False
    if type(expected) in PLAIN:
        return bool(expected == value)
    if isinstance(expected, (list, tuple)):
        return len(expected) == len(value) and all(
            isinstance(b, Tensor) if a is ... else equal_plain(a, b) for a, b in zip(expected, value, strict=True)
        )
    if isinstance(expected, dict):
        pairs = zip(expected.items(), value.items(), strict=True)
        return len(expected) == len(value) and all(equal_plain(a, b) and equal_plain(x, y) for (a, x), (b, y) in pairs)
    return False


def has_plain_sizes(tensor: Tensor) -> bool:
    """Return whether a tensor's sizes are numbers, not answers of a subclass's code."""
    return type(tensor) in (Tensor, Parameter) and not tensor.is_nested


def attribute_guards(
    attributes: Mapping[str, Any], reads: Mapping[str, None], arrays: Mapping[str, Any]
) -> list[Guard] | None:
    """Emit the guards of a scheduler's attributes by value, for the first step of a loop.

    Args:
        attributes: the scheduler's.
        reads: the names that steps of its class read.
        arrays: those of its attributes that belong to the schedule, as ARRAY records.

    Returns:
        A guard for each attribute but the cache; None where one cannot be compared at once: an array on a device, an
        object of an unknown class.
    """
    guards: list[Guard] = []
    for name, value in attributes.items():
        if name == CACHE:
            continue
        guard = Guard(name, GuardKind.ANY) if name not in reads else _attribute_guard(name, value, arrays)
        if guard is None:
            return None
        guards.append(guard)
    return guards


def _attribute_guard(name: str, value: Any, arrays: Mapping[str, Any]) -> Guard | None:
    if name in arrays:
        return None if arrays[name] is None else Guard(name, GuardKind.ARRAY, arrays[name])
    if name == CONFIG or type(value) in PLAIN:
        return Guard(name, GuardKind.EQUALS, value)
    if type(value) is FunctionType:
        return None if value.__closure__ else Guard(name, GuardKind.ID, value)
    if isinstance(value, (Tensor, np.ndarray)):
        if name in HISTORY:
            return _tensor_guard(name, value)
        record = _array_record(value)
        return None if record is None else Guard(name, GuardKind.ARRAY, record)
    if type(value) in (list, tuple, torch.Size):
        items = [... if isinstance(item, Tensor) and name not in HISTORY else item for item in value]
        if all(type(item) in PLAIN or item is ... for item in items):
            return Guard(name, GuardKind.EQUALS, items if type(value) is list else type(value)(items))
    return None


def argument_guards(call: Mapping[str, Any], plan_cache: Any) -> list[Guard] | None:
    """Emit the guards of a call's arguments, for the next step and for the first step of a later loop alike.

    Args:
        call: the arguments by name.
        plan_cache: knows which tensors are views of the scheduler's timesteps.

    Returns:
        A guard for each argument in the order of `FirstStep.arguments`; None where a tensor's numbers count or the
        timestep is no view of the schedule.
    """
    guards: list[Guard] = []
    timestep = call.get("timestep")
    if not isinstance(timestep, Tensor):
        return None
    for name in (*USUAL_ARGUMENTS, *(name for name in call if name not in USUAL_ARGUMENTS)):
        value = call.get(name)
        guard: Guard | None
        if name == "generator":
            guard = Guard(name, GuardKind.ANY)  # no plan depends on which one it is
        elif not isinstance(value, Tensor):
            guard = Guard(name, GuardKind.EQUALS if type(value) in PLAIN else GuardKind.ID, value)
        elif name in TENSOR_ARGUMENTS:
            guard = _tensor_guard(name, value)
        elif plan_cache.position(value) is not None:
            offset = value.data_ptr() - timestep.data_ptr()
            guard = Guard(name, GuardKind.TIMESTEP, (value.dtype, tuple(value.shape), offset))
        else:
            guard = None
        if guard is None:
            return None
        guards.append(guard)
    return guards


def _tensor_guard(name: str, value: Any) -> Guard | None:
    if not isinstance(value, Tensor) or not has_plain_sizes(value):
        return None
    return Guard(name, GuardKind.TENSOR, (value.dtype, tuple(value.shape)))


def _array_record(value: Any, copies: Sequence[HostCopy] = ()) -> tuple[Any, ...] | None:
    """Return an array as an ARRAY guard holds it; None where it is no contiguous array that the host can read."""
    if isinstance(value, Tensor):
        plain = has_plain_sizes(value) and value.is_contiguous() and not value.requires_grad
        if plain and not value.is_cpu:
            return next((copy.record for copy in copies if copy.holds(value)), None)
        return array_record(value) if plain and not (value.is_neg() or value.is_conj()) else None
    plain = type(value) is np.ndarray and value.flags.c_contiguous and not value.dtype.hasobject
    return array_record(value) if plain else None


def array_record(value: Any) -> tuple[Any, ...]:
    """Return (class, dtype or buffer format, shape, bytes) of a contiguous tensor on the CPU or NumPy array."""
    if isinstance(value, Tensor):
        flat = value.detach().contiguous().reshape(-1)
        return Tensor, value.dtype, tuple(value.shape), flat.view(torch.uint8).numpy().tobytes()
    return type(value), memoryview(value).format, value.shape, value.tobytes()
