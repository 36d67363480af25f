# SPDX-License-Identifier: MIT
"""The plans of one schedule: a scheduler's configuration and arrays as they were read, and the plans made for them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...ops import backends
from ..compiler.inputs import CACHE, CONFIG, HISTORY, SCALARS_OF_STATE, Lookup
from ..compiler.overrides import names_in_code
from ..compiler.plan import Fallback, Plan
from .guards import HostCopy, array_record, has_plain_sizes
from .reads import attributes_read

#: Schedules whose plans are kept, and plans in all; those used longest ago are dropped first.
MOST_SCHEDULES = 128
MOST_PLANS = 4096

#: Types of devices whose tensors take no wait to read, or cannot be read.
_HOST = ("cpu", "meta")
#: The plans of one schedule by `fastdiff.diffusers.runtime.lookup.PlanKey`.
Plans = OrderedDict[Any, Plan | Fallback]


class PlanStore:
    """The plans of all schedules in this process, shared by schedulers of one class, configuration and schedule."""

    def __init__(self) -> None:
        self.schedules: OrderedDict[Any, Plans] = OrderedDict()

    def of_schedule(self, key: Any) -> Plans:
        """Return the plans of the schedule with this key."""
        plans = self.schedules.setdefault(key, OrderedDict())
        self.schedules.move_to_end(key)
        while len(self.schedules) > MOST_SCHEDULES:
            self.schedules.popitem(last=False)
        return plans

    def add(self, plans: Plans, key: Any, plan: Plan | Fallback) -> None:
        """Add a plan to those of one schedule, and drop the oldest above `MOST_PLANS`."""
        plans[key] = plan
        while len(plans) > MOST_PLANS:
            plans.popitem(last=False)
        if len(plans) % 64:
            return  # all plans are counted now and then
        while sum(map(len, self.schedules.values())) > MOST_PLANS:
            oldest = next(iter(self.schedules.values()))
            if oldest is plans:
                plans.popitem(last=False)
            else:
                oldest.clear()  # a scheduler may still hold it
                self.schedules.popitem(last=False)


PLANS = PlanStore()


class PlanCache:
    """A scheduler's configuration and arrays, read once, and the plans made for them.

    Attributes:
        config: the scheduler's configuration object.
        options: the configuration as a string, part of a plan's key.
        host: the arrays that are tensors, on the CPU, by attribute.
        contents: (class, dtype, shape, bytes) of each array, by attribute.
        names: the attributes that are not part of a scheduler's state.
        half: whether an array is in a half type.
        step_bytes: how far apart timesteps lie in memory.
        plans: by key; shared with other schedulers of the same class, configuration and contents.
    """

    def __init__(
        self, scheduler: Any, before: PlanCache | None = None, copies: Mapping[str, HostCopy] = MappingProxyType({})
    ) -> None:
        """Read a scheduler's arrays.

        Args:
            scheduler: the scheduler.
            before: arrays that are as they were in this cache are not copied again.
            copies: of arrays on devices, by attribute.
        """
        attributes = vars(scheduler)
        self.config = attributes[CONFIG]
        self._class = type(scheduler).original
        arrays = arrays_of(scheduler)
        self.tensors = tuple((n, t, version_of(t)) for n, t in arrays.items() if isinstance(t, Tensor))
        self.arrays = tuple((n, a) for n, a in arrays.items() if isinstance(a, np.ndarray))
        self.names = frozenset(arrays) | {CONFIG, CACHE}
        seen = set() if before is None else {(n, id(t), version) for n, t, version in before.tensors}
        self.host: dict[str, Tensor] = {}
        self.contents: dict[str, tuple[Any, ...]] = {}
        with torch.inference_mode(False):
            for name, tensor, version in self.tensors:
                copy = copies.get(name)
                if copy is not None and copy.holds(tensor):
                    self.host[name], self.contents[name] = copy.host, copy.record
                elif before is not None and (name, id(tensor), version) in seen and not tensor.is_inference():
                    self.host[name], self.contents[name] = before.host[name], before.contents[name]
                else:
                    self.host[name] = tensor.detach().cpu()
                    self.contents[name] = array_record(self.host[name])
        self.contents |= {name: array_record(array) for name, array in self.arrays}
        self._values: dict[str, Any] = {}
        self._lookups: dict[Any, dict[Any, Any]] = {}
        self.half = any(tensor.dtype in (torch.float16, torch.bfloat16) for tensor in self.host.values())
        self._locate(attributes.get("timesteps"))
        same_config = before is not None and before.config is self.config
        self.options: str = before.options if before and same_config else repr(sorted(self.config.items()))
        self.plans = PLANS.of_schedule((type(scheduler), self.options, tuple(sorted(self.contents.items()))))

    def _locate(self, timesteps: object) -> None:
        """Record where the schedule's timesteps lie in memory."""
        self._dtype: torch.dtype | None = None
        self.step_bytes = 1
        if isinstance(timesteps, Tensor) and timesteps.dim() == 1 and timesteps.numel() > 0:
            self._dtype, self._count = timesteps.dtype, timesteps.numel()
            self._first, self.step_bytes = timesteps.data_ptr(), timesteps.element_size() * max(timesteps.stride(0), 1)

    def values(self, name: str) -> Any:
        """Return the numbers of an array as a list; of a tensor without dimensions, the number."""
        found = self._values.get(name)
        if found is None:
            found = self._values[name] = self.host[name].tolist()
        return found

    def lookup(self, which: Lookup, attributes: dict[str, Any]) -> Callable[[Any], Any]:
        """Return a scheduler method that looks a timestep up in this schedule, as a function of the timestep's value.

        Results are kept: schedulers compare the timestep with every one of the schedule's.
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
        """Call the scheduler's own method for a timestep of this value, on the arrays of the host."""
        stub: Any = object.__new__(self._class)
        vars(stub).update({name: self.host.get(name, held) for name, held in attributes.items() if name != CACHE})
        with torch.inference_mode(False):
            timestep = value
            if which.dtype is not None:
                timestep = torch.tensor(value, dtype=which.dtype, device="cpu").expand(which.shape)
            return getattr(self._class, which.method)(stub, timestep)

    def matches(self, attributes: Mapping[str, Any]) -> bool:
        """Return whether a scheduler still has this configuration and these arrays, unwritten since they were read."""
        if attributes[CONFIG] is not self.config:
            return False
        for name, tensor, version in self.tensors:
            if attributes.get(name) is not tensor or version_of(tensor) != version:
                return False
        return all(attributes.get(name) is array for name, array in self.arrays)

    def tensors_read(self) -> list[Tensor]:
        """Return the arrays that steps of the class read and whose writes torch counts: no inference tensors."""
        read = attributes_read(self._class)
        return [tensor for name, tensor, _ in self.tensors if name in read and not tensor.is_inference()]

    def position(self, timestep: Tensor) -> int | None:
        """Return the index of the schedule's timestep that a tensor is a view of, once or expanded; None for others.

        A loop over `timesteps` yields views, so that no value has to be copied from a device.
        """
        if timestep.dtype is not self._dtype or timestep.dim() > 1:
            return None
        if timestep.dim() == 1 and (timestep.numel() == 0 or (timestep.numel() > 1 and timestep.stride(0) != 0)):
            return None
        place, rest = divmod(timestep.data_ptr() - self._first, self.step_bytes)
        return place if rest == 0 and 0 <= place < self._count else None

    def array_guards(self) -> dict[str, tuple[Any, ...] | None]:
        """Return the arrays as ARRAY guards hold them; None for one that cannot be compared at once."""
        comparable = {n: t.is_contiguous() and has_plain_sizes(t) for n, t, _ in self.tensors}
        comparable |= {n: type(a) is np.ndarray and a.flags.c_contiguous for n, a in self.arrays}
        return {name: self.contents[name] if comparable[name] else None for name in comparable}


def arrays_of(scheduler: Any) -> dict[str, np.ndarray[Any, Any] | Tensor]:
    """Return the attributes of a scheduler that are arrays of its schedule."""
    own = names_in_code(type(scheduler).original)
    return {
        name: value
        for name, value in vars(scheduler).items()
        if isinstance(value, (np.ndarray, Tensor)) and name in own and not _is_state(name)
    }


def copies_of_device_arrays(scheduler: Any, before: Mapping[str, HostCopy]) -> dict[str, HostCopy]:
    """Copy the scheduler's arrays that are on a device to the host, except those that are in `before` unwritten.

    The host waits for the copies.  Inference tensors are left out: writes to them are not counted.
    """
    copies = {}
    for name, value in arrays_of(scheduler).items():
        if not isinstance(value, Tensor) or value.device.type in _HOST or value.is_inference():
            continue
        if has_plain_sizes(value):
            kept = before.get(name)
            copies[name] = kept if kept is not None and kept.holds(value) else HostCopy.of(value)
    return copies


def class_version(kind: type) -> Any:
    """Return a key that changes when an attribute of a class or of a base is replaced."""
    if backends.extension is not None:
        version: int = backends.extension.class_version(kind)
        if version:
            return version
    return tuple(id(value) for base in kind.__mro__ for value in vars(base).values())


def version_of(tensor: Tensor) -> int:
    """Return how often a tensor has been written; 0 for inference tensors, whose writes are not counted."""
    return 0 if tensor.is_inference() else tensor._version


def _is_state(name: str) -> bool:
    return name in HISTORY or name in SCALARS_OF_STATE
