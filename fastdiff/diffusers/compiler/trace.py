# SPDX-License-Identifier: MIT
"""Trace one step of a diffusers scheduler: run its own code on proxies.

In: a scheduler's class and the inputs of a call.  Out: a `Trace`, which says what the step returns, which noise it
draws and what it writes to the scheduler, in terms of the inputs; and the `Tape` of its scalars.

The code that runs is that of the installed diffusers: prediction types, orders, corrections, final steps and refusals
are its own.  Tensors have **input names**: ``sample``, ``self.ets:0`` for an entry of a list attribute, ``noise:0`` for
the first draw of noise.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from types import FunctionType
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from . import inputs as read
from . import scalar_functions  # noqa: F401 (it registers the rules of recorded numbers)
from .inputs import ABSENT, CONFIG, HISTORY, LOOKUPS, TENSOR_ARGUMENTS, StepInputs
from .overrides import overriding_class, pristine
from .plan import Constant, Draw, NoiseSource, RecordedValue
from .scalars import NumberProxy, ScalarTensor, guarded_tensor, scalar_of, uniform_index
from .symbolic import INTENDED_DTYPE, AffineProxy, Clamped, LinearExpr, UnsupportedStep
from .tape import Tape, called

_T = TypeVar("_T")
#: The most elements of a tensor argument whose numbers are read one by one.
_MOST_ELEMENTS = 64


@dataclass(frozen=True)
class ExistingValue:
    """An object that the scheduler or the call had before the step, by its input name."""

    name: str


@dataclass(frozen=True)
class ComputedTensor:
    """A tensor that the step computes.

    Two results with one expression are one tensor only if the scheduler's own code has one object; `identity` tells.
    """

    expr: LinearExpr
    dtype: torch.dtype
    identity: int


Value = ExistingValue | ComputedTensor | Constant | RecordedValue


@dataclass(frozen=True)
class Trace:
    """The effect of one step.

    Attributes:
        result_type, result_names: a tuple without names, an output class of diffusers with, or None for a bare value.
        results: the returned values in order.
        writes: by attribute, the value set; for a list, whether it is still the same list object, and its entries.
        draws: each noise in order; its input name is ``noise:`` and its index.
    """

    result_type: type | None
    result_names: tuple[str, ...] | None
    results: tuple[Value, ...]
    writes: Mapping[str, Value | tuple[bool, tuple[Value, ...]]]
    draws: tuple[Draw, ...]


class ScalarMode(Enum):
    """How a traced step's scalars are computed."""

    #: In float64 and recorded: the trace holds for other numbers too.
    RECORDED = 0
    #: In float64; the numbers that are read are guarded.
    WIDENED = 1
    #: In the scheduler's own dtypes; the numbers that are read are guarded.
    UNCHANGED = 2


class Tracer:
    """Runs a step on proxies.

    Args:
        scheduler_class: of the scheduler itself; its `original` is the diffusers class whose step is traced.
        inputs: the call; nothing in it is changed.  A `noise_sampler` among its attributes stands for the scheduler's
            own, which is not called.
        mode: how scalars are computed.

    Attributes:
        tape: the scalars that the trace reads and computes, and its guards.
        attributes_read: names, as the keys of a dictionary.
    """

    def __init__(self, scheduler_class: Any, inputs: StepInputs, mode: ScalarMode) -> None:
        self.scheduler_class, self.original, self.inputs = scheduler_class, scheduler_class.original, inputs
        self.recorded, self.widened = mode is ScalarMode.RECORDED, mode is not ScalarMode.UNCHANGED
        self.tape = Tape(inputs)
        self.attributes_read: dict[str, None] = {}
        self.draws: list[Draw] = []
        #: The input name of each object that stands for one, by identity.
        self._names: dict[int, str] = {}
        self._keep_alive: list[Any] = []
        #: The object that stands for each attribute that has been read.
        self._proxies: dict[str, Any] = {}

    def run(self, method: str) -> Trace:
        """Trace a method.

        Raises:
            UnsupportedStep: no row expresses the step.
            Exception: whatever the scheduler itself raises.
        """
        stub: Any = object.__new__(_stub_class(self.original))
        held = object.__getattribute__(stub, "__dict__")
        held.update(self.inputs.attributes)
        held["_tracer"] = self
        arguments = {name: self._argument(name, value) for name, value in self.inputs.arguments.items()}
        try:
            with TracingMode(self):
                results = getattr(self.original, method)(stub, **arguments)
        finally:
            held.pop("_tracer", None)  # no cycle is left: a scheduler's tensors are freed with their last reference
        return self._finish(results, held)

    # What the stub calls while the step runs.

    def look_up(self, stub: Any, held: dict[str, Any], name: str) -> Any:
        """Return the stub's attribute `name`."""
        if name in held:
            value = held[name]
            if name not in self._proxies and value is self.inputs.attributes.get(name, ABSENT):
                if isinstance(pristine(self.original).get(name), FunctionType):
                    raise UnsupportedStep(f"calls {name}, which the scheduler object replaces")
                if name == "noise_sampler" and value is not None:
                    self.attributes_read[name] = None
                    return self._sampler_noise
                value = held[name] = self._proxies[name] = self._attribute(name, value)
            return value
        owner = overriding_class(self.scheduler_class, self.original, name)
        if owner is not None:
            raise UnsupportedStep(f"uses {name}, which {owner.__name__} overrides")
        if name in LOOKUPS and self.recorded:
            return functools.partial(self._look_up_timestep, name)
        if name == "_threshold_sample" and hasattr(self.original, name):
            return _threshold
        try:
            return object.__getattribute__(stub, name)
        except AttributeError:
            self._guard_structure(name)
            raise

    def _guard_structure(self, name: str) -> None:
        self.attributes_read[name] = None
        self.tape.guard(read.Structure(name))

    def _attribute(self, name: str, value: Any) -> Any:
        """Return the object that stands for an attribute."""
        if name == CONFIG:
            return value  # the key of every trace contains it
        self._guard_structure(name)
        if isinstance(value, list):
            return [self._item(name, i, item) for i, item in enumerate(value)]
        if type(value) is tuple and name not in HISTORY:
            return tuple(self._item(name, i, item) for i, item in enumerate(value))
        if type(value) in (int, float):
            return self._number(read.AttributeNumber(name))
        if not isinstance(value, Tensor):
            return value
        if name in HISTORY:
            return self._tensor(value, f"self.{name}")
        return self._named(self._schedule_tensor(name, value), f"self.{name}")

    def _schedule_tensor(self, name: str, value: Tensor) -> Any:
        schedule = self.inputs.schedule
        if name not in schedule.host:
            if value.numel() == 1:
                return self._scalar(read.AttributeNumber(name), value)
            raise UnsupportedStep(f"reads {name}, a tensor that is neither a schedule nor like the samples")
        host = schedule.host[name]
        if self.recorded and host.dim() < 2 and not host.is_complex():
            index = self.tape.read(read.ScheduleArray(name))
            if host.dim() == 0:
                return ScalarTensor.make(self.tape, (index,), (), host.dtype)
            return ScalarTensor.make(self.tape, (), host.shape, host.dtype, index)
        self.tape.guard(read.Contents(name))
        with torch.inference_mode(False):
            host = host.detach().cpu()
        return host.double() if self.widened and host.is_floating_point() else host

    def _item(self, name: str, index: int, item: Any) -> Any:
        if type(item) in (int, float):
            return self._number(read.AttributeNumber(name, index))
        if _is_plain(item):
            return item
        input_name = f"self.{name}:{index}"
        if isinstance(item, Tensor):
            if name in HISTORY:
                return self._tensor(item, input_name)
            if item.numel() == 1:
                item = self._scalar(read.AttributeNumber(name, index), item)
        return self._named(item, input_name)

    def _argument(self, name: str, value: Any) -> Any:
        if name == "generator" and value is not None:
            return torch.Generator()  # nothing is drawn from it, and its device is not used
        if isinstance(value, Tensor):
            if name in TENSOR_ARGUMENTS:
                return self._tensor(value, TENSOR_ARGUMENTS[name])
            return self._named(self._scalar(read.ArgumentNumber(name), value, name), name)
        return self._number(read.ArgumentNumber(name)) if type(value) in (int, float) else value

    def _number(self, reader: Callable[[StepInputs], Any]) -> Any:
        return NumberProxy(self.tape, None, reader) if self.recorded else self.tape.guard(self.tape.read(reader))

    def _scalar(self, reader: Callable[[StepInputs], Any], value: Tensor, argument: str | None = None) -> Tensor:
        """Return the proxy of a tensor of numbers beside the schedule, such as a timestep."""
        if value.numel() == 1 or self.inputs.schedule.position(value) is not None:
            elements: tuple[int, ...] = (self.tape.read(reader),)
        elif argument is not None and 0 < value.numel() <= _MOST_ELEMENTS:
            elements = tuple(self.tape.read(read.ArgumentNumber(argument, i)) for i in range(value.numel()))
        else:
            raise UnsupportedStep(f"is called with a tensor of {value.numel()} numbers")
        scalar = ScalarTensor.make(self.tape, elements, value.shape, value.dtype)
        if self.recorded:
            return scalar
        plain = guarded_tensor(scalar)
        return plain if self.widened else plain.to(value.dtype)

    def _tensor(self, tensor: Tensor, name: str) -> AffineProxy:
        """Return the proxy of a tensor like the samples."""
        return self._named(AffineProxy.like(tensor, LinearExpr.of(name)), name)

    def _named(self, value: _T, name: str) -> _T:
        """Note the input name of an object that stands for an input."""
        self._names.setdefault(id(value), name)
        if isinstance(value, ScalarTensor):
            value.read_only = True
        self._keep_alive.append(value)
        return value

    def draw(self, like: Tensor, source: NoiseSource, interval: tuple[float, float] | None = None) -> AffineProxy:
        """Return the proxy of one more noise."""
        self.draws.append(Draw(like.dtype, source, interval=interval))
        return self._tensor(like, f"noise:{len(self.draws) - 1}")

    def _sampler_noise(self, sigma: Any, sigma_next: Any) -> AffineProxy:
        """Stand for the scheduler's noise sampler, called with two noise levels.

        They are numbers or tensors of one, never recorded: with a sampler the mode is `ScalarMode.UNCHANGED`.
        """
        return self.draw(self.inputs.arguments["sample"], NoiseSource.PATH, (float(sigma), float(sigma_next)))

    def _look_up_timestep(self, method: str, timestep: Any, schedule_timesteps: Any = None) -> Any:
        """Stand for a method that finds a timestep in the schedule: record the call, whose results are kept."""
        if schedule_timesteps is not None:
            raise UnsupportedStep(f"calls {method} with a schedule of its own")
        schedule, tape = self.inputs.schedule, self.tape
        for name in ("num_inference_steps", "custom_timesteps"):
            if name in self.inputs.attributes:
                self._guard_structure(name)
                if type(self.inputs.attributes[name]) in (int, float):
                    tape.guard(tape.read(read.AttributeNumber(name)))
        if isinstance(timestep, ScalarTensor):
            index, dtype, shape = uniform_index(timestep), timestep.dtype, tuple(timestep.shape)
        elif type(timestep) is NumberProxy:
            index, dtype, shape = timestep.index, None, ()
        else:
            raise UnsupportedStep(f"calls {method} with other than the timestep")
        if index is None:
            raise UnsupportedStep(f"calls {method} with several timesteps")
        reader = read.Lookup(method, dtype, shape)
        example = schedule.look_up(reader, tape.values[index], self.inputs.attributes)
        found = tape.apply(called, tape.read(reader), index)
        if isinstance(example, Tensor):
            return ScalarTensor.make(tape, (found,), example.shape, example.dtype)
        if type(example) not in (int, float):
            raise UnsupportedStep(f"calls {method}, which finds no number")
        return NumberProxy(tape, found)

    # The finished trace.

    def _finish(self, results: Any, held: dict[str, Any]) -> Trace:
        before = self.inputs.attributes
        writes: dict[str, Value | tuple[bool, tuple[Value, ...]]] = {}
        for name, value in held.items():
            if name not in self._proxies and value is before.get(name, ABSENT):
                continue
            proxy = self._proxies.get(name, ABSENT)
            if isinstance(value, list):
                entries = tuple(map(self._value, value))
                if value is not proxy or not self._list_unchanged(name, entries):
                    writes[name] = (value is proxy, entries)
            elif value is not proxy or isinstance(value, AffineProxy):
                found = self._value(value)
                if found != ExistingValue(f"self.{name}"):
                    writes[name] = found
        result_type: type | None = type(results)
        names: tuple[str, ...] | None = None
        if isinstance(results, dict):  # diffusers' outputs are dictionaries with attributes
            names, results = tuple(results), tuple(results.values())
        elif not isinstance(results, tuple):
            result_type, results = None, (results,)
        return Trace(result_type, names, tuple(map(self._value, results)), writes, tuple(self.draws))

    def _value(self, value: Any) -> Value:
        if type(value) is NumberProxy:
            return RecordedValue((value.index,))
        name = self._names.get(id(value))
        if isinstance(value, AffineProxy):
            # The same object with its own expression: equal numbers in a new tensor are computed.
            if value.expr.single_leaf == name is not None:
                return ExistingValue(name)
            return ComputedTensor(value.expr, value.dtype, id(value))
        if name is not None and not _is_plain(value):
            return ExistingValue(name)
        if isinstance(value, ScalarTensor):
            if value.array is not None:
                raise UnsupportedStep("keeps a schedule")
            return RecordedValue(value.elements, tuple(value.shape), value.dtype)
        if isinstance(value, Tensor) and value.dtype == torch.float64:
            value = value.float()  # the dtype that the scheduler itself would give it
        return Constant(value)

    def _list_unchanged(self, name: str, entries: Sequence[Value]) -> bool:
        """Return whether a list attribute holds what it held before the step."""
        before = self.inputs.attributes[name]

        def unchanged(index: int, entry: Value) -> bool:
            if isinstance(entry, RecordedValue):
                old = type(before[index]) in (int, float)
                return old and entry == RecordedValue((self.tape.read(read.AttributeNumber(name, index)),))
            if isinstance(entry, Constant):
                return entry.value is before[index]
            return entry == ExistingValue(f"self.{name}:{index}")

        return len(entries) == len(before) and all(unchanged(i, entry) for i, entry in enumerate(entries))


class TracingMode(TorchFunctionMode):
    """Redirects torch functions while a step is traced: noise is drawn as a proxy, scalars stay on the host in float64.

    It does not outlive the trace, and refers to the tracer; the tracer does not refer to it.
    """

    def __init__(self, tracer: Tracer) -> None:
        super().__init__()
        self.tracer = tracer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in ("tensor", "as_tensor") and self.tracer.recorded and type(args[0]) is NumberProxy:
            scalar: Any = scalar_of(self.tracer.tape, args[0])
            return scalar.to(kwargs["dtype"]) if "dtype" in kwargs else scalar
        if name in ("randn", "randn_like"):
            like = func(*args, **{**kwargs, "device": "meta", "generator": None} if name == "randn" else kwargs)
            return self.tracer.draw(like, NoiseSource.TORCH)
        if name in ("rand", "normal", "randint", "bernoulli", "multinomial"):
            raise UnsupportedStep(f"draws from torch.{name}")
        plain = args and isinstance(args[0], Tensor) and not isinstance(args[0], (AffineProxy, ScalarTensor))
        if name == "to" and plain and args[0].is_floating_point():
            wanted = [value for value in (*args[1:], *kwargs.values()) if isinstance(value, torch.dtype)]
            if not wanted or wanted[0].is_floating_point:
                if not wanted or args[0].dim() == 0:
                    return args[0]
                same = args[0].detach()
                setattr(same, INTENDED_DTYPE, wanted[0])
                return same
        return func(*args, **kwargs)


def with_modes_restored(function: Callable[[], _T]) -> _T:
    """Call a function and leave torch's function modes as they were, even if it is interrupted."""
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
    """Return the class with all attributes looked up by a tracer."""

    def look_up(self: Any, name: str) -> Any:
        if name.startswith("__"):
            return object.__getattribute__(self, name)
        held = object.__getattribute__(self, "__dict__")
        return held["_tracer"].look_up(self, held, name)

    return type(original.__name__, (original,), {"__getattribute__": look_up, "__module__": __name__})


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, (bool, int, float, str))


def _threshold(sample: AffineProxy) -> AffineProxy:
    """Stand for a scheduler's dynamic thresholding."""
    return AffineProxy.like(sample, LinearExpr.of(Clamped(sample.expr, None)))
