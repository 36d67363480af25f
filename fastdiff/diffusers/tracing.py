# SPDX-License-Identifier: MIT
"""One step of a diffusers scheduler, run on symbols: what it returns, what it draws, and what becomes of its state.

The scheduler's own code is what is run, that of the installed diffusers: prediction types, orders, corrections and
final steps are its own, and so are its refusals.  Scalars are its scalars, widened to float64 first.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import FunctionType
from typing import Any, TypeVar

import torch
from torch import Tensor

from .environment import (
    ABSENT,
    CONFIG,
    HISTORY,
    LOOKUPS,
    ArgumentItem,
    ArgumentNumber,
    AttributeNumber,
    Contents,
    Environment,
    ItemNumber,
    Lookup,
    ScheduleArray,
    Structure,
)  # fmt: skip
from .overrides import overriding_class, pristine
from .scalars import Number, Scalar, element, observed_tensor
from .symbols import Clamped, NotAffine, Symbol, Terms, Tracing, unknown
from .tape import Tape, called

_T = TypeVar("_T")
#: What a step's first arguments are in nearly all classes.
USUAL = ("model_output", "timestep", "sample")
#: Tensors of a call that take part in the arithmetic, by argument, and what formulas call them.
INPUTS = {
    "model_output": "model_output",
    "sample": "sample",
    "variance_noise": "noise:given",
    "old_pred_original_sample": "old_pred_original_sample",
    "pred_original_sample": "pred_original_sample",
    "original_image": "original_image",
    "mask": "mask",
}
#: The most elements of a tensor argument that are told apart.
_MOST_ELEMENTS = 64


@dataclass(frozen=True)
class Given:
    """What stands in the state after the step and stood somewhere before it: `where` names the place."""

    where: str


@dataclass(frozen=True)
class Made:
    """A tensor of the state, or of the result, that the step computes.

    Two of one formula are one tensor only where the scheduler's own code has one: `identity` tells.
    """

    terms: Terms
    dtype: torch.dtype
    identity: int


@dataclass(frozen=True)
class Constant:
    """A value that is the same whatever the recorded numbers are: a flag, None, a number of the code."""

    value: Any


@dataclass(frozen=True)
class Computed:
    """A number, or a tensor of numbers, that is computed from recorded ones.

    Attributes:
        indices: of the elements on the tape; one index where all are one number.
        shape, dtype: of the tensor; None of a number.
    """

    indices: tuple[int, ...]
    shape: tuple[int, ...] | None = None
    dtype: torch.dtype | None = None

    def of(self, values: Sequence[Any]) -> Any:
        """The number or the tensor, where these are the values of the tape."""
        if self.shape is None:
            return values[self.indices[0]]
        with torch.inference_mode(False):
            flat = torch.tensor([values[index] for index in self.indices], dtype=self.dtype, device="cpu")
            return flat.reshape(()).expand(self.shape).clone() if len(self.indices) == 1 else flat.reshape(self.shape)


Value = Given | Made | Constant | Computed


@dataclass(frozen=True)
class Trace:
    """What one step does.

    Attributes:
        kind, names: of the result: a tuple without names, an output of diffusers' with, or None for a value alone.
        results: what it returns, one after another.
        state: by attribute, what it is set to; of lists the entries, and whether it is still the same list.
        draws: the dtype of each draw of noise.
        reads: the scheduler's attributes that it looked at.
        noise_spans: of each noise that comes from the scheduler's own sampler, its two arguments.
    """

    kind: type | None
    names: tuple[str, ...] | None
    results: tuple[Value, ...]
    state: Mapping[str, Value | tuple[bool, tuple[Value, ...]]]
    draws: tuple[torch.dtype, ...]
    noise_spans: tuple[tuple[float, float], ...]
    reads: frozenset[str]


class Tracer:
    """Runs a step on symbols in one environment, and says what it reads.

    Args:
        scheduler_class: the class of the scheduler itself, whose overrides are looked for.
        original: the diffusers class whose step it is.
        environment: the call; nothing of it is changed.
        recorded: record scalars as functions of what they are read from; else they are observed where they are read.
        sampler: whether the scheduler has, or makes, a noise sampler of its own.
        widened: compute scalars in float64; else as the scheduler itself does, which only goes with not `recorded`.

    Attributes:
        tape: what the trace reads, computes of scalars and depends on.
        reads: the attributes that were looked at.
    """

    def __init__(
        self, scheduler_class: type, original: type, environment: Environment, *, recorded: bool, sampler: bool,
        widened: bool,
    ) -> None:  # fmt: skip
        self.scheduler_class, self.original, self.environment = scheduler_class, original, environment
        self.recorded, self.sampler, self.widened = recorded, sampler, widened
        self.tape = Tape(environment)
        self.reads: set[str] = set()
        self.spans: list[tuple[float, float]] = []
        self.tracing = Tracing(self.tape if recorded else None)
        #: Of each object that stands for something before the step, by its identity, the place of that.
        self._places: dict[int, str] = {}
        self._keep_alive: list[Any] = []
        #: What stands for each attribute that has been read.
        self._stands: dict[str, Any] = {}

    def run(self, name: str) -> Trace:
        """The trace of the method `name`.

        Raises:
            NotAffine: the step is none that a row can say.
            Exception: whatever the scheduler itself raises.
        """
        attributes = self.environment.attributes
        stub: Any = object.__new__(_stub_class(self.original))
        held = object.__getattribute__(stub, "__dict__")
        held.update(attributes)
        held["_tracer"] = self
        given = {argument: self._argument(argument, value) for argument, value in self.environment.arguments.items()}
        self.tracing.known = self._known
        try:
            with self.tracing:
                results = getattr(self.original, name)(stub, **given)
        finally:
            # No cycle is left: a scheduler's tensors go with their last reference.
            held.pop("_tracer", None)
            self.tracing.known = unknown
        return self._finished(results, held)

    # What the stub asks while the step runs.

    def look_up(self, stub: Any, held: dict[str, Any], name: str) -> Any:
        """The attribute `name` of the stub."""
        if name in held:
            if name not in self._stands and held[name] is self.environment.attributes.get(name, ABSENT):
                self._refuse_shadowing(name)
                held[name] = self._stands[name] = self._attribute(name, held[name])
            return held[name]
        if self.sampler and name == "noise_sampler":
            return None
        self._refuse_override(name)
        if name in LOOKUPS and self.recorded:
            return functools.partial(self._look_up_timestep, name)
        if name == "_threshold_sample" and hasattr(self.original, name):
            return _threshold
        try:
            return object.__getattribute__(stub, name)
        except AttributeError:
            self._observe_structure(name)
            raise

    def _refuse_shadowing(self, name: str) -> None:
        if isinstance(pristine(self.original).get(name), FunctionType):
            raise NotAffine(f"calls {name}, which the scheduler object replaces")

    def _refuse_override(self, name: str) -> None:
        owner = overriding_class(self.scheduler_class, self.original, name)
        if owner is not None:
            raise NotAffine(f"uses {name}, which {owner.__name__} overrides")

    def _observe_structure(self, name: str) -> None:
        self.reads.add(name)
        self.tape.observe(Structure(name))

    def _attribute(self, name: str, value: Any) -> Any:
        """What stands for an attribute in the trace."""
        if name == CONFIG:
            return value  # which the key of the trace has
        if self.sampler and name == "noise_sampler":
            self.reads.add(name)
            return self._sampled
        self._observe_structure(name)
        if isinstance(value, list):
            return [self._item(name, i, item) for i, item in enumerate(value)]
        if isinstance(value, tuple) and type(value) is tuple and name not in HISTORY:
            return tuple(self._item(name, i, item) for i, item in enumerate(value))
        if type(value) in (int, float):
            return self._number(AttributeNumber(name))
        if not isinstance(value, Tensor):
            return value
        if name in HISTORY:
            return self._symbol(value, f"self.{name}")
        return self._known(self._schedule_tensor(name, value), f"self.{name}")

    def _schedule_tensor(self, name: str, value: Tensor) -> Any:
        schedule = self.environment.schedule
        if name not in schedule.host:
            return self._scalar(AttributeNumber(name), value) if value.numel() == 1 else self._plain(name, value)
        host = schedule.host[name]
        if self.recorded and host.dim() < 2 and not host.is_complex():
            index = self.tape.read(ScheduleArray(name))
            if host.dim() == 0:
                return Scalar.make(self.tape, (index,), (), host.dtype)
            return Scalar.make(self.tape, (), host.shape, host.dtype, index)
        self.tape.observe(Contents(name))
        return _widened(host) if self.widened else _on_host(host)

    def _plain(self, name: str, value: Tensor) -> Tensor:
        raise NotAffine(f"reads {name}, a tensor that is neither a schedule nor like the samples")

    def _item(self, name: str, place: int, item: Any) -> Any:
        where = f"self.{name}:{place}"
        if isinstance(item, Tensor):
            if name in HISTORY:
                return self._symbol(item, where)
            if item.numel() == 1:
                return self._known(self._scalar(ItemNumber(name, place), item), where)
            return self._known(item, where)
        if type(item) in (int, float):
            return self._number(ItemNumber(name, place))
        return item if _is_plain(item) else self._known(item, where)

    def _argument(self, argument: str, value: Any) -> Any:
        leaf = INPUTS.get(argument)
        if leaf is not None and isinstance(value, Tensor):
            return self._symbol(value, leaf)
        if argument == "generator" and value is not None:
            return torch.Generator()  # nothing is drawn from it, and no device is asked of it
        if isinstance(value, Tensor):
            return self._known(self._scalar(ArgumentNumber(argument), value, argument), argument)
        return self._number(ArgumentNumber(argument)) if type(value) in (int, float) else value

    def _number(self, reader: Callable[[Environment], Any]) -> Any:
        return Number(self.tape, None, reader) if self.recorded else self.tape.observe(self.tape.read(reader))

    def _scalar(self, reader: Callable[[Environment], Any], value: Tensor, argument: str | None = None) -> Tensor:
        """A tensor of numbers beside the schedule, such as a timestep."""
        if value.numel() == 1 or self.environment.schedule.position(value) is not None:
            elements: tuple[int, ...] = (self.tape.read(reader),)
        elif argument is not None and 0 < value.numel() <= _MOST_ELEMENTS:
            elements = tuple(self.tape.read(ArgumentItem(argument, i)) for i in range(value.numel()))
        else:
            raise NotAffine(f"is called with a tensor of {value.numel()} numbers")
        scalar = Scalar.make(self.tape, elements, value.shape, value.dtype)
        if self.recorded:
            return scalar
        plain = observed_tensor(scalar)
        return plain if self.widened else plain.to(value.dtype)

    def _symbol(self, tensor: Tensor, leaf: str) -> Symbol:
        made: Symbol = Symbol.make(tensor, Terms.of(leaf))
        return self._known(made, leaf)  # type: ignore[no-any-return]

    def _known(self, value: Any, place: Any) -> Any:
        self._places.setdefault(id(value), place)
        if isinstance(value, Scalar):
            value.held = True
        self._keep_alive.append(value)
        return value

    def _sampled(self, sigma: Any, sigma_next: Any) -> Symbol:
        self.spans.append((float(sigma), float(sigma_next)))
        return self.tracing.noise(self.environment.arguments["sample"])

    def _look_up_timestep(self, name: str, timestep: Any, schedule_timesteps: Any = None) -> Any:
        """A method that finds a timestep in the schedule: by the schedule's own numbers, and not again for each."""
        if schedule_timesteps is not None:
            raise NotAffine(f"calls {name} with a schedule of its own")
        schedule, tape = self.environment.schedule, self.tape
        for read in ("num_inference_steps", "custom_timesteps"):
            if read in self.environment.attributes:
                self._observe_structure(read)
                value = self.environment.attributes[read]
                if type(value) in (int, float):
                    tape.observe(tape.read(AttributeNumber(read)))
        if isinstance(timestep, Scalar):
            index, dtype, shape = element(timestep), timestep.dtype, tuple(timestep.shape)
        elif type(timestep) is Number:
            index, dtype, shape = timestep.index, None, ()
        else:
            raise NotAffine(f"calls {name} with other than the timestep")
        if index is None:
            raise NotAffine(f"calls {name} with several timesteps")
        which = Lookup(name, dtype, shape)
        sample = schedule.look_up(which, tape.values[index], self.environment.attributes)
        found = tape.apply(called, tape.read(which), index)
        if isinstance(sample, Tensor):
            return Scalar.make(tape, (found,), sample.shape, sample.dtype)
        if type(sample) not in (int, float):
            raise NotAffine(f"calls {name}, which finds no number")
        return Number(tape, found)

    # What has become of it.

    def _value(self, value: Any) -> Value:
        if type(value) is Number:
            return Computed((value.index,))
        place = self._places.get(id(value))
        if isinstance(value, Symbol):
            # The very tensor that it was: equal numbers in a new tensor are made anew.
            if value.terms.only_leaf == place is not None:
                return Given(place)
            return Made(value.terms, value.dtype, id(value))
        if place is not None and not _is_plain(value):
            return Given(place)
        if isinstance(value, Scalar):
            if value.array is not None:
                raise NotAffine("keeps a schedule")
            return Computed(value.elements, tuple(value.shape), value.dtype)
        if isinstance(value, Tensor) and value.dtype == torch.float64:
            value = value.float()  # as the scheduler itself would have it
        return Constant(value)

    def _finished(self, results: Any, held: dict[str, Any]) -> Trace:
        before = self.environment.attributes
        changed: dict[str, Value | tuple[bool, tuple[Value, ...]]] = {}
        for attribute, value in held.items():
            stood = self._stands.get(attribute, before.get(attribute, ABSENT))
            if isinstance(value, list):
                same = stood is value
                entries = tuple(map(self._value, value))
                if not (same and self._unchanged(attribute, entries, before[attribute])):
                    changed[attribute] = (same, entries)
            elif value is not stood or isinstance(value, Symbol):
                found = self._value(value)
                if found != Given(f"self.{attribute}"):
                    changed[attribute] = found
        kind: type | None = type(results)
        names: tuple[str, ...] | None = None
        listed = results
        if isinstance(results, dict):  # diffusers' outputs are dictionaries with attributes
            names, listed = tuple(results), tuple(results.values())
        elif not isinstance(results, tuple):
            kind, listed = None, (results,)
        return Trace(
            kind, names, tuple(map(self._value, listed)), changed, tuple(self.tracing.draws), tuple(self.spans),
            frozenset(self.reads),
        )  # fmt: skip

    def _unchanged(self, attribute: str, entries: tuple[Value, ...], before: Sequence[Any]) -> bool:
        """Whether a list holds what it held."""
        if len(entries) != len(before):
            return False
        stands = self._stands.get(attribute)
        for i, (entry, old) in enumerate(zip(entries, before, strict=True)):
            same_number = (
                isinstance(entry, Computed) and stands is not None and entry == self._value_before(attribute, i)
            )
            if not (
                entry == Given(f"self.{attribute}:{i}")
                or (isinstance(entry, Constant) and entry.value is old)
                or same_number
            ):
                return False
        return True

    def _value_before(self, attribute: str, place: int) -> Computed | None:
        old = self.environment.attributes[attribute][place]
        return Computed((self.tape.read(ItemNumber(attribute, place)),)) if type(old) in (int, float) else None


def with_modes_restored(function: Callable[[], _T]) -> _T:
    """Call a function and leave torch's function modes as they were, whenever an interrupt comes."""
    depth, enabled = torch._C._len_torch_function_stack(), torch._C._is_torch_function_enabled()
    try:
        return function()
    finally:
        # Twice, since an interrupt may come in here as well.
        try:
            _restore_modes(depth, enabled)
        finally:
            _restore_modes(depth, enabled)


def _restore_modes(depth: int, enabled: bool) -> None:
    while torch._C._len_torch_function_stack() > depth:
        torch._C._pop_torch_function_stack()
    if enabled and not torch._C._is_torch_function_enabled():
        # What a block that was never left would have done: a guard that was not entered has the state "enabled".
        torch._C.DisableTorchFunctionSubclass().__exit__(None, None, None)


@functools.cache
def _stub_class(original: type) -> type:
    """The class, with a tracer that is asked for all attributes."""

    def look_up(self: Any, name: str) -> Any:
        if name.startswith("__"):
            return object.__getattribute__(self, name)
        held = object.__getattribute__(self, "__dict__")
        return held["_tracer"].look_up(self, held, name)

    return type(original.__name__, (original,), {"__getattribute__": look_up, "__module__": __name__})


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, (bool, int, float, str))


def _on_host(tensor: Tensor) -> Tensor:
    with torch.inference_mode(False):
        return tensor.detach().cpu()


def _widened(tensor: Tensor) -> Tensor:
    """Scalars on the host, in float64 where they are floating-point numbers."""
    host = _on_host(tensor)
    return host.double() if host.is_floating_point() else host


def _threshold(sample: Symbol) -> Symbol:
    return Symbol.make(sample, Terms.of(Clamped(sample.terms, None)))
