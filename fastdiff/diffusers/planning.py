# SPDX-License-Identifier: MIT
"""From a call to its plan: kept, made of a trace that holds for it, or traced.

Three stores, each bounded:

1. plans, by the schedule's contents and all that traces of the class have ever read (`PlanStore`);
2. traces, by the kind of the call: one `TraceTree` for each, whose scalars are computed again for other numbers;
3. what traces of a class have read, by name: an attribute that none has is compared by nobody.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from types import FunctionType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..noise.brownian_tree import sampler_maker
from ..ops import backends
from .compiler.compile import compile_step, has_other_shapes, scalar_modes, unsupported_call
from .compiler.inputs import ABSENT, TENSOR_ARGUMENTS, StepInputs, identity
from .compiler.overrides import pristine
from .compiler.plan import Fallback, Plan
from .compiler.symbolic import UnsupportedStep
from .compiler.tape import TraceTree
from .compiler.trace import with_modes_restored
from .reads import note_read, reads_of
from .schedule import PLANS, Schedule, state_of

#: Traces that are kept, of all kinds of calls; the kinds that were asked for longest ago are forgotten first.
MOST_TRACES = 512
#: The method that a step is no part of, though a scheduler is asked for it before each.
SCALING = "scale_model_input"

_TREES: OrderedDict[Any, TraceTree[Plan | Fallback]] = OrderedDict()
_FUNCTIONS: dict[type, frozenset[str]] = {}
#: By kind of call, the numbers among its arguments that a trace has read.
_ARGUMENTS: OrderedDict[Any, dict[str, None]] = OrderedDict()


def forget_all() -> None:
    """Forget all plans and traces, as if no scheduler had been used before."""
    PLANS.schedules.clear()
    _TREES.clear()
    _ARGUMENTS.clear()


def class_version(kind: type) -> Any:
    """A key that changes when an attribute of a class, or of a base, is replaced."""
    if backends.extension is not None:
        version: int = backends.extension.class_version(kind)
        if version:
            return version
    return tuple(id(value) for base in kind.__mro__ for value in vars(base).values())


def find_plan(
    scheduler: Any, name: str, given: Mapping[str, Any], attributes: dict[str, Any], schedule: Schedule,
    *, guided: bool, seeded: bool,
) -> Plan | Fallback:  # fmt: skip
    """The plan of a step, or why there is none.

    Args:
        scheduler: whose step it is.
        name: of the method.
        given: the call's arguments, by name.
        attributes: the scheduler's, as `fastdiff.diffusers.compiler.inputs.snapshot` gives them.
        schedule: its schedule.
        guided: whether the model's output is combined within the step.
        seeded: whether noise is drawn within the step.
    """
    kind = _kind(scheduler, name, given, attributes, schedule, guided, seeded)
    reads, arguments = reads_of(scheduler.original), _arguments_read(kind)
    known = len(reads) + len(arguments)
    key = _key(reads, arguments, kind, given, attributes, schedule)
    plan = schedule.plans.get(key)
    if plan is not None:
        schedule.plans.move_to_end(key)
        return plan
    plan = with_modes_restored(
        lambda: _make(scheduler, kind, arguments, name, given, attributes, schedule, guided, seeded)
    )
    if len(reads) + len(arguments) != known:
        key = _key(reads, arguments, kind, given, attributes, schedule)
    PLANS.keep(schedule.plans, key, plan)
    return plan


def _kind(
    scheduler: Any, name: str, given: Mapping[str, Any], attributes: Mapping[str, Any], schedule: Schedule,
    guided: bool, seeded: bool,
) -> tuple[Any, ...]:  # fmt: skip
    """What traces are kept by: all of a call but its numbers and what the trace itself observes."""
    sample, output = given["sample"], given.get("model_output", given["sample"])
    original = scheduler.original
    functions = _FUNCTIONS.get(original)
    if functions is None:
        found = (n for n, value in pristine(original).items() if isinstance(value, FunctionType))
        functions = _FUNCTIONS[original] = frozenset(found)
    return (
        type(scheduler), class_version(type(scheduler)), schedule.options, name, guided, seeded,
        output.shape == sample.shape, sample.dim(), has_other_shapes(attributes, sample.shape),
        tuple(n for n in attributes if n in functions), torch.get_default_dtype(),
        tuple([(n, _argument_kind(n, value)) for n, value in given.items()]),
    )  # fmt: skip


def _argument_kind(name: str, value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.dtype if name in TENSOR_ARGUMENTS else (value.dtype, value.shape)
    if name == "generator":
        return value is None
    if value is None or isinstance(value, (bool, str)):
        return value
    if type(value) in (int, float):
        return type(value)  # a recorded number
    if isinstance(value, (np.generic, np.ndarray)):
        return type(value), value.dtype.str, value.shape, value.tobytes()
    return identity(value)


def _arguments_read(kind: Any) -> dict[str, None]:
    """Which arguments' numbers plans of a kind depend on; it only grows."""
    found = _ARGUMENTS.get(kind)
    if found is None:
        found = _ARGUMENTS[kind] = {"timestep": None}
        while len(_ARGUMENTS) > MOST_TRACES:
            _ARGUMENTS.popitem(last=False)
    return found


def _key(
    reads: Mapping[str, None], arguments: Mapping[str, None], kind: tuple[Any, ...], given: Mapping[str, Any],
    attributes: Mapping[str, Any], schedule: Schedule,
) -> tuple[Any, ...]:  # fmt: skip
    """What plans are kept by, beside the schedule's contents."""
    names = schedule.names
    state = [
        value if type(value := attributes.get(n, ABSENT)) in _AS_IT_IS else state_of(schedule, n, value)
        for n in reads
        if n not in names
    ]
    numbers = [_argument_value(schedule, n, given[n]) for n in arguments if n in given]
    return kind, tuple(state), tuple(numbers)


#: Types of attributes that are part of a key as they are.
_AS_IT_IS = frozenset((type(None), bool, str))


def _argument_value(schedule: Schedule, name: str, value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value if isinstance(value, (int, float)) else None  # else it is part of the kind
    place = schedule.position(value)
    return ("timesteps", place) if place is not None else tuple(value.reshape(-1).tolist())


def _make(
    scheduler: Any, kind: tuple[Any, ...], arguments: dict[str, None], name: str, given: Mapping[str, Any],
    attributes: dict[str, Any], schedule: Schedule, guided: bool, seeded: bool,
) -> Plan | Fallback:  # fmt: skip
    """A plan, of a trace that is kept or of a new one; or why there is none."""
    lacks_sampler = name != SCALING and attributes.get("noise_sampler", 0) is None
    factory = sampler_maker(scheduler.original) if lacks_sampler else None
    if factory is not None:
        attributes = {**attributes, "noise_sampler": factory}  # stands for what it makes: a trace asks no sampler
    inputs = StepInputs(attributes, given, schedule)
    refused = unsupported_call(inputs)
    if refused is not None:
        return refused
    leaf: Plan | Fallback | None = None
    for mode in scalar_modes(inputs):
        tree = _tree((kind, factory, mode))
        found = _found(tree, inputs)
        if found is None:
            compiled = compile_step(
                type(scheduler), name, inputs, mode, guided=guided, seeded=seeded, noise_sampler_factory=factory
            )
            for read in compiled.attributes_read:
                note_read(scheduler.original, read)
            arguments.update(dict.fromkeys(compiled.arguments_read))
            tree.add(compiled.tape, compiled.plan)
            _forget_oldest_traces()
            found = compiled.plan, compiled.tape.values
        leaf, values = found
        if isinstance(leaf, Plan):
            try:
                return leaf.with_values(values)
            except UnsupportedStep as error:
                return Fallback(str(error))
    assert leaf is not None
    return leaf


def _tree(kind: Any) -> TraceTree[Plan | Fallback]:
    tree = _TREES.get(kind)
    if tree is None:
        tree = _TREES[kind] = TraceTree()
    _TREES.move_to_end(kind)
    return tree


def _found(tree: TraceTree[Plan | Fallback], inputs: StepInputs) -> tuple[Plan | Fallback, list[Any]] | None:
    try:
        return tree.find(inputs)
    except (MemoryError, RecursionError):
        raise
    except Exception:
        return None  # an input that no trace has met: the scheduler's own code says what is wrong with it


def _forget_oldest_traces() -> None:
    while sum(tree.count for tree in _TREES.values()) > MOST_TRACES:
        _TREES.popitem(last=False)
