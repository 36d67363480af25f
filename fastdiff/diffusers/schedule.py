# SPDX-License-Identifier: MIT
"""What of a scheduler stays from step to step, and what its state is: the two keys under which plans are kept."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from enum import IntEnum
from types import FunctionType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .compiler.inputs import CACHE, CONFIG, HISTORY, SCALARS_OF_STATE, Lookup, identity
from .compiler.overrides import names_in_code
from .compiler.plan import Fallback, Plan
from .reads import reads_of

#: Schedules whose plans are kept, the latest ones, and how many plans in all.
MOST_SCHEDULES = 128
MOST_PLANS = 4096


class PlanStore:
    """The plans of all schedules, by what a schedule holds and then by a call's key; the oldest are forgotten."""

    def __init__(self) -> None:
        self.schedules: OrderedDict[Any, OrderedDict[Any, Plan | Fallback]] = OrderedDict()

    def of_schedule(self, key: Any) -> OrderedDict[Any, Plan | Fallback]:
        """The plans for schedules that hold the same."""
        plans = self.schedules.setdefault(key, OrderedDict())
        self.schedules.move_to_end(key)
        while len(self.schedules) > MOST_SCHEDULES:
            self.schedules.popitem(last=False)
        return plans

    def keep(self, plans: OrderedDict[Any, Plan | Fallback], key: Any, plan: Plan | Fallback) -> None:
        """Keep a plan, and no more plans than `MOST_PLANS`."""
        plans[key] = plan
        while len(plans) > MOST_PLANS:
            plans.popitem(last=False)
        if len(plans) % 64:
            return  # all of them are counted now and then
        while sum(map(len, self.schedules.values())) > MOST_PLANS:
            oldest = next(iter(self.schedules.values()))
            if oldest is plans:
                plans.popitem(last=False)
            else:
                oldest.clear()  # not dropped: a scheduler may hold it
                self.schedules.popitem(last=False)


PLANS = PlanStore()

#: Types of which equal values are alike to every plan.
PLAIN = frozenset((type(None), bool, int, float, str, np.float64))


class Kept(IntEnum):
    """How an attribute is compared with what it was (`KeptAttribute` in csrc/bindings/beginning.h)."""

    OWNER = 0
    SAME = 1
    EQUAL = 2
    TENSOR = 3
    ARRAY = 4
    LIKE = 5
    NOT_READ = 6


#: An attribute's name, how it is compared and with what; of arrays also the version and the numbers.
KeptAttribute = tuple[str, Kept, Any, int, bytes]


class Schedule:
    """A scheduler's configuration and its arrays, as they were when they were looked at, and the plans made for them.

    Plans are shared by all schedulers of one class with the same configuration and the same numbers.
    """

    def __init__(self, scheduler: Any, before: Schedule | None = None) -> None:
        """Look at a scheduler; of what is as it was at the last look, `before`, nothing is copied again."""
        attributes = vars(scheduler)
        self.config = attributes[CONFIG]
        own = names_in_code(type(scheduler).original)
        arrays = {
            name: value
            for name, value in attributes.items()
            if isinstance(value, (np.ndarray, Tensor)) and name in own and not _of_state(name)
        }
        self.tensors = tuple((n, t, version_of(t)) for n, t in arrays.items() if isinstance(t, Tensor))
        self.arrays = tuple((n, a) for n, a in arrays.items() if isinstance(a, np.ndarray))
        self.names = frozenset(arrays) | {CONFIG, CACHE}
        seen = set() if before is None else {(n, id(t), version) for n, t, version in before.tensors}
        self.host: dict[str, Tensor] = {}
        self._contents: dict[str, tuple[Any, ...]] = {}
        with torch.inference_mode(False):
            for name, tensor, version in self.tensors:
                if before is not None and (name, id(tensor), version) in seen and not tensor.is_inference():
                    self.host[name], self._contents[name] = before.host[name], before._contents[name]
                else:
                    self.host[name] = tensor.detach().cpu()
                    self._contents[name] = _contents_of(self.host[name])
        self._contents |= {name: _contents_of(array) for name, array in self.arrays}
        self._class = type(scheduler).original
        self._values: dict[str, Any] = {}
        self._lookups: dict[Any, dict[Any, Any]] = {}
        #: Whether some of its numbers are rounded to a half type.
        self.half = any(tensor.dtype in (torch.float16, torch.bfloat16) for tensor in self.host.values())
        self._locate(attributes.get("timesteps"))
        same_config = before is not None and before.config is self.config
        self._options: str = before._options if before and same_config else repr(sorted(self.config.items()))
        self.plans = PLANS.of_schedule((type(scheduler), self._options, tuple(sorted(self._contents.items()))))

    def _locate(self, timesteps: object) -> None:
        self._dtype: torch.dtype | None = None
        self.step_bytes = 1
        if isinstance(timesteps, Tensor) and timesteps.dim() == 1 and timesteps.numel() > 0:
            self._dtype, self._count = timesteps.dtype, timesteps.numel()
            self._first, self.step_bytes = timesteps.data_ptr(), timesteps.element_size() * max(timesteps.stride(0), 1)

    @property
    def options(self) -> str:
        """The configuration, as a key."""
        return self._options

    @property
    def contents(self) -> dict[str, tuple[Any, ...]]:
        """What each array holds: dtype, shape and bytes."""
        return self._contents

    def values(self, name: str) -> Any:
        """The numbers of an array as a list; of a tensor without dimensions, the number."""
        found = self._values.get(name)
        if found is None:
            found = self._values[name] = self.host[name].tolist()
        return found

    def lookup(self, which: Lookup, attributes: dict[str, Any]) -> Callable[[Any], Any]:
        """A method of the scheduler that looks up a timestep here, as a function of the timestep's value.

        What it finds is kept: schedulers compare the timestep with all of the schedule's.
        """
        options = attributes.get("num_inference_steps"), attributes.get("custom_timesteps")
        found = self._lookups.setdefault((which, options), {})

        def find(value: Any) -> Any:
            if value not in found:
                result = self.look_up(which, value, attributes)
                found[value] = result.reshape(-1)[0].item() if isinstance(result, Tensor) else result
                if len(found) > MOST_PLANS:
                    found.pop(next(iter(found)))
            return found[value]

        return find

    def look_up(self, which: Lookup, value: Any, attributes: dict[str, Any]) -> Any:
        """What the method itself gives for a timestep of this value."""
        stub: Any = object.__new__(self._class)
        vars(stub).update({name: self.host.get(name, held) for name, held in attributes.items() if name != CACHE})
        with torch.inference_mode(False):
            timestep = value
            if which.dtype is not None:
                timestep = torch.tensor(value, dtype=which.dtype, device="cpu").expand(which.shape)
            return getattr(self._class, which.method)(stub, timestep)

    def holds(self, attributes: dict[str, Any]) -> bool:
        """Whether a scheduler still has this configuration and these arrays, unwritten since."""
        if attributes[CONFIG] is not self.config:
            return False
        for name, tensor, version in self.tensors:
            if attributes.get(name) is not tensor or version_of(tensor) != version:
                return False
        return all(attributes.get(name) is array for name, array in self.arrays)

    def tensors_read(self) -> list[Tensor]:
        """The tensors that some step has read, and whose writes are counted: those of inference tensors are not."""
        read = reads_of(self._class)
        return [tensor for name, tensor, _ in self.tensors if name in read and not tensor.is_inference()]

    def position(self, timestep: Tensor) -> int | None:
        """Which of the schedule's own timesteps a tensor is a view of, once or expanded; None for any other.

        A loop over `timesteps` yields views, so no value has to be fetched from a device.
        """
        if timestep.dtype is not self._dtype or timestep.dim() > 1:
            return None
        if timestep.dim() == 1 and (timestep.numel() == 0 or (timestep.numel() > 1 and timestep.stride(0) != 0)):
            return None
        place, rest = divmod(timestep.data_ptr() - self._first, self.step_bytes)
        return place if rest == 0 and 0 <= place < self._count else None

    def kept(self, attributes: dict[str, Any]) -> list[KeptAttribute] | None:
        """All that plans depend on, for later loops to be compared with at once; None where something cannot be."""
        timesteps = attributes.get("timesteps")
        if not isinstance(timesteps, Tensor) or not timesteps.is_cpu:
            return None
        found: list[KeptAttribute] = []
        arrays = {name: (tensor, version) for name, tensor, version in self.tensors} | {
            name: (array, 0) for name, array in self.arrays
        }
        read = reads_of(self._class)
        for name, value in attributes.items():
            if name not in read and name != CACHE:
                found.append((name, Kept.NOT_READ, None, 0, b""))
                continue
            if name in arrays:
                value, version = arrays[name]
                each = _kept_array(name, value, version, self._contents[name][2])
            else:
                each = _kept(name, value)
            if each is None:
                return None
            found.append(each)
        return found


def _contents_of(array: Any) -> tuple[Any, ...]:
    if isinstance(array, Tensor):
        flat = array.contiguous().reshape(-1)
        return str(array.dtype), tuple(array.shape), flat.view(torch.uint8).numpy().tobytes()
    return array.dtype.str, array.shape, array.tobytes()


def version_of(tensor: Tensor) -> int:
    """How often a tensor has been written; of inference tensors nobody counts."""
    return 0 if tensor.is_inference() else tensor._version


def comparable(tensor: Tensor) -> bool:
    """Whether it is no wrapper whose sizes are somebody's code."""
    return type(tensor) is Tensor and not tensor.is_nested


def _kept(name: str, value: Any) -> KeptAttribute | None:
    """An attribute that is no array, as it is compared later: alike is what `state_of` says the same of, or less."""
    if name == CACHE:
        return name, Kept.OWNER, None, 0, b""
    if name == CONFIG or type(value) is FunctionType:
        return name, Kept.SAME, value, 0, b""
    if type(value) in PLAIN:
        return name, Kept.EQUAL, value, 0, b""
    if isinstance(value, Tensor):
        if name in HISTORY:
            return (name, Kept.LIKE, value, 0, b"") if comparable(value) else None
        if not value.is_cpu or value.dtype not in (torch.float32, torch.float64):
            return None
        return _kept_array(name, value, version_of(value), value.detach().numpy().tobytes())
    if type(value) in (list, tuple, torch.Size):
        items = [... if isinstance(item, Tensor) and name not in HISTORY else item for item in value]
        if all(type(item) in PLAIN or item is ... for item in items):
            return name, Kept.EQUAL, items if type(value) is list else type(value)(items), 0, b""
    return None


def _kept_array(name: str, array: Any, version: int, contents: bytes) -> KeptAttribute | None:
    if isinstance(array, Tensor):
        # One on a device is compared by identity alone.
        in_order = comparable(array) and (array.is_contiguous() or not array.is_cpu)
        return (name, Kept.TENSOR, array, version, contents) if in_order else None
    plain = type(array) is np.ndarray and array.flags.c_contiguous and not array.dtype.hasobject
    return (name, Kept.ARRAY, array, version, contents) if plain else None


def _of_state(name: str) -> bool:
    return name in HISTORY or name in SCALARS_OF_STATE


def state_of(schedule: Schedule, name: str, value: Any) -> Any:
    """An attribute's value as part of a plan's key: numbers by value, tensors of history by their dtype."""
    if name == "noise_sampler":
        return value is None  # which one it is does not matter to a plan
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, (bool, int, float)):
        return type(value), value  # 4.0 is no 4 where a scheduler counts with it
    if isinstance(value, Tensor):
        return float(value) if name in SCALARS_OF_STATE else value.dtype
    if isinstance(value, (list, tuple)):
        if name in HISTORY:
            return tuple(item.dtype if isinstance(item, Tensor) else item for item in value)
        return len(value), tuple(_item_of(schedule, name, item) for item in value)
    return identity(value)


def _item_of(schedule: Schedule, name: str, item: Any) -> Any:
    """An entry of a list: a timestep by its place in the schedule, so that none is fetched from a device."""
    if not isinstance(item, Tensor):
        return state_of(schedule, name, item)
    place = schedule.position(item)
    if place is None and item.is_cpu and item.numel() == 1:
        return item.dtype, item.item()
    return item.dtype, place
