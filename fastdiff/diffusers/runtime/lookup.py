# SPDX-License-Identifier: MIT
"""From a call to its plan: one that is kept under the call's key, or a new one from the compiler.

A key has two parts: the kind of the call, for which the compiler keeps traces, and the numbers that traces of that kind
have read.  Both are bounded stores; the entries used longest ago are dropped first.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from types import FunctionType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...noise.brownian_tree import sampler_maker
from ..compiler.compile import compile_step, has_other_shapes, scalar_modes, unsupported_call
from ..compiler.inputs import ABSENT, HISTORY, SCALARS_OF_STATE, TENSOR_ARGUMENTS, StepInputs, identity
from ..compiler.overrides import pristine
from ..compiler.plan import Fallback, Plan
from ..compiler.symbolic import UnsupportedStep
from ..compiler.tape import TraceTree
from ..compiler.trace import with_modes_restored
from .plan_cache import PLANS, PlanCache, class_version
from .reads import attributes_read, note_read

#: The method that scales a model's input: no step, though a scheduler is asked for it before each.
SCALING = "scale_model_input"
#: Traces that are kept, of all kinds of calls.
MOST_TRACES = 512


class CallKind(NamedTuple):
    """A call without its numbers: what traces are kept by."""

    scheduler_class: type
    class_version: Any
    options: str
    method: str
    guided: bool
    seeded: bool
    same_shapes: bool
    dim: int
    history_has_other_shapes: bool
    shadowed_methods: tuple[str, ...]
    default_dtype: torch.dtype
    arguments: tuple[tuple[str, Any], ...]


class PlanKey(NamedTuple):
    """What a plan is kept by, beside the contents of the schedule."""

    kind: CallKind
    #: The value of each attribute that traces of the class have read and that is no array.
    state: tuple[Any, ...]
    #: The value of each argument whose number traces of the kind have read.
    numbers: tuple[Any, ...]


#: The traces of each kind of call.
_TRACES: OrderedDict[Any, TraceTree[Plan | Fallback]] = OrderedDict()
#: The arguments whose numbers traces of a kind have read; it only grows.
_NUMBERS_READ: OrderedDict[CallKind, dict[str, None]] = OrderedDict()
#: The methods of a diffusers class.
_METHODS: dict[type, frozenset[str]] = {}


def forget_plans() -> None:
    """Drop all plans and traces, as if no scheduler had been used before."""
    PLANS.schedules.clear()
    _TRACES.clear()
    _NUMBERS_READ.clear()


def find_plan(
    scheduler: Any, method: str, arguments: Mapping[str, Any], attributes: dict[str, Any], plan_cache: PlanCache,
    *, guided: bool, seeded: bool,
) -> Plan | Fallback:  # fmt: skip
    """Return the plan of a step, or the reason why the class's own code has to take it.

    Args:
        scheduler: the scheduler.
        method: the name of the step method.
        arguments: of the call, by name, without those that are the defaults.
        attributes: the scheduler's, as `snapshot` copies them.
        plan_cache: the scheduler's.
        guided: the model's output is combined of two within the step.
        seeded: noise comes from the samples' own seeds.
    """
    kind = _kind(scheduler, method, arguments, attributes, plan_cache, guided, seeded)
    reads, numbers = attributes_read(scheduler.original), _numbers_read(kind)
    known = len(reads) + len(numbers)
    key = _key(reads, numbers, kind, arguments, attributes, plan_cache)
    plan = plan_cache.plans.get(key)
    if plan is not None:
        plan_cache.plans.move_to_end(key)
        return plan
    plan = with_modes_restored(lambda: _compile(scheduler, kind, arguments, attributes, plan_cache))
    if len(reads) + len(numbers) != known:
        key = _key(reads, numbers, kind, arguments, attributes, plan_cache)
    PLANS.add(plan_cache.plans, key, plan)
    return plan


def _compile(
    scheduler: Any, kind: CallKind, arguments: Mapping[str, Any], attributes: dict[str, Any], plan_cache: PlanCache
) -> Plan | Fallback:
    """Return a plan from a trace that holds for the call, or from a new one."""
    lacks_sampler = kind.method != SCALING and attributes.get("noise_sampler", 0) is None
    factory = sampler_maker(scheduler.original) if lacks_sampler else None
    if factory is not None:
        attributes = {**attributes, "noise_sampler": factory}  # in place of the sampler that it makes
    inputs = StepInputs(attributes, arguments, plan_cache)
    unsupported = unsupported_call(inputs)
    if unsupported is not None:
        return unsupported
    template: Plan | Fallback | None = None
    for mode in scalar_modes(inputs):
        tree = _trace_tree((kind, factory, mode))
        found = _find_trace(tree, inputs)
        if found is None:
            compiled = compile_step(
                kind.scheduler_class, kind.method, inputs, mode, guided=kind.guided, seeded=kind.seeded,
                noise_sampler_factory=factory,
            )  # fmt: skip
            for name in compiled.attributes_read:
                note_read(scheduler.original, name)
            _numbers_read(kind).update(dict.fromkeys(compiled.arguments_read))
            tree.add(compiled.tape, compiled.plan)
            while sum(each.count for each in _TRACES.values()) > MOST_TRACES:
                _TRACES.popitem(last=False)
            found = compiled.plan, compiled.tape.values
        template, values = found
        if isinstance(template, Plan):
            try:
                return template.with_values(values)
            except UnsupportedStep as error:
                return Fallback(str(error))
    assert template is not None
    return template


def _trace_tree(key: Any) -> TraceTree[Plan | Fallback]:
    tree = _TRACES.get(key)
    if tree is None:
        tree = _TRACES[key] = TraceTree()
    _TRACES.move_to_end(key)
    return tree


def _find_trace(tree: TraceTree[Plan | Fallback], inputs: StepInputs) -> tuple[Plan | Fallback, list[Any]] | None:
    try:
        return tree.find(inputs)
    except (MemoryError, RecursionError):
        raise
    except Exception:
        return None  # an input that no trace has seen: the scheduler's own code raises the error


def _kind(
    scheduler: Any, method: str, arguments: Mapping[str, Any], attributes: Mapping[str, Any], plan_cache: PlanCache,
    guided: bool, seeded: bool,
) -> CallKind:  # fmt: skip
    sample, output = arguments["sample"], arguments.get("model_output", arguments["sample"])
    original = scheduler.original
    methods = _METHODS.get(original)
    if methods is None:
        found = (n for n, value in pristine(original).items() if isinstance(value, FunctionType))
        methods = _METHODS[original] = frozenset(found)
    return CallKind(
        type(scheduler), class_version(type(scheduler)), plan_cache.options, method, guided, seeded,
        output.shape == sample.shape, sample.dim(), has_other_shapes(attributes, sample.shape),
        tuple(n for n in attributes if n in methods), torch.get_default_dtype(),
        tuple([(n, _argument_kind(n, value)) for n, value in arguments.items()]),
    )  # fmt: skip


def _argument_kind(name: str, value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.dtype if name in TENSOR_ARGUMENTS else (value.dtype, value.shape)
    if name == "generator":
        return value is None
    if value is None or isinstance(value, (bool, str)):
        return value
    if type(value) in (int, float):
        return type(value)  # its number is recorded on the tape
    if isinstance(value, (np.generic, np.ndarray)):
        return type(value), value.dtype.str, value.shape, value.tobytes()
    return identity(value)


def _numbers_read(kind: CallKind) -> dict[str, None]:
    found = _NUMBERS_READ.get(kind)
    if found is None:
        found = _NUMBERS_READ[kind] = {"timestep": None}
        while len(_NUMBERS_READ) > MOST_TRACES:
            _NUMBERS_READ.popitem(last=False)
    return found


def _key(
    reads: Mapping[str, None], numbers: Mapping[str, None], kind: CallKind, arguments: Mapping[str, Any],
    attributes: Mapping[str, Any], plan_cache: PlanCache,
) -> PlanKey:  # fmt: skip
    names = plan_cache.names
    state = [
        value if type(value := attributes.get(n, ABSENT)) in _KEY_TYPES else attribute_key(plan_cache, n, value)
        for n in reads
        if n not in names
    ]
    found = [_number(plan_cache, arguments[n]) for n in numbers if n in arguments]
    return PlanKey(kind, tuple(state), tuple(found))


#: Types of attributes that are keys themselves.
_KEY_TYPES = frozenset((type(None), bool, str))


def attribute_key(plan_cache: PlanCache, name: str, value: Any) -> Any:
    """Return an attribute's value as part of a key: numbers by value, tensors of history by dtype."""
    if name == "noise_sampler":
        return value is None  # no plan depends on which one it is
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, (bool, int, float)):
        return type(value), value  # 4.0 is not 4 to a scheduler that counts with it
    if isinstance(value, Tensor):
        return float(value) if name in SCALARS_OF_STATE else value.dtype
    if isinstance(value, (list, tuple)):
        if name in HISTORY:
            return tuple(item.dtype if isinstance(item, Tensor) else item for item in value)
        return len(value), tuple(_item_key(plan_cache, name, item) for item in value)
    return identity(value)


def _item_key(plan_cache: PlanCache, name: str, item: Any) -> Any:
    """Return an entry of a list as part of a key: a timestep by its index, so that no value is copied from a device."""
    if not isinstance(item, Tensor):
        return attribute_key(plan_cache, name, item)
    place = plan_cache.position(item)
    if place is None and item.is_cpu and item.numel() == 1:
        return item.dtype, item.item()
    return item.dtype, place


def _number(plan_cache: PlanCache, value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value if isinstance(value, (int, float)) else None  # anything else is part of the kind
    place = plan_cache.position(value)
    return ("timesteps", place) if place is not None else tuple(value.reshape(-1).tolist())
