# SPDX-License-Identifier: MIT
"""From a call to its plan: kept, made of a trace that holds for it, or traced.

Three stores, each bounded:

1. plans, by the schedule's contents and all that traces of the class have ever read (`PlanStore`);
2. traces, by the kind of the call: one `TraceTree` for each, whose scalars are computed again for other numbers;
3. what traces of a class have read, by name: an attribute that none has is compared by nobody.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from types import FunctionType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..noise.brownian_tree import sampler_maker
from ..ops import backends
from .environment import ABSENT, HISTORY, ArgumentItem, ArgumentNumber, Environment, identity
from .overrides import pristine
from .plan import Plan, compile_trace
from .reads import note_read, reads_of
from .schedule import PLANS, Schedule, state_of
from .symbols import NotAffine
from .tape import TraceTree
from .tracing import INPUTS, Tracer, with_modes_restored

#: Traces that are kept, of all kinds of calls; the kinds that were asked for longest ago are forgotten first.
MOST_TRACES = 512
#: The method that a step is no part of, though a scheduler is asked for it before each.
SCALING = "scale_model_input"

_TREES: OrderedDict[Any, TraceTree[Plan | str]] = OrderedDict()
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
) -> Plan | str:  # fmt: skip
    """The plan of a step, or why there is none.

    Args:
        scheduler: whose step it is.
        name: of the method.
        given: the call's arguments, by name.
        attributes: the scheduler's, as `fastdiff.diffusers.environment.snapshot` gives them.
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
        output.shape == sample.shape, sample.dim(), schedule.of_other_shapes(attributes, sample.shape),
        tuple(n for n in attributes if n in functions), torch.get_default_dtype(),
        tuple([(n, _argument_kind(n, value)) for n, value in given.items()]),
    )  # fmt: skip


def _argument_kind(name: str, value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.dtype if name in INPUTS else (value.dtype, value.shape)
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
) -> Plan | str:  # fmt: skip
    """A plan, of a trace that is kept or of a new one; or why there is none."""
    reason = _refusal(given, attributes, schedule)
    if reason:
        return reason
    lacks_sampler = name != SCALING and attributes.get("noise_sampler", 0) is None
    make_sampler = sampler_maker(scheduler.original) if lacks_sampler else None
    sampler = make_sampler is not None or attributes.get("noise_sampler") is not None
    if make_sampler is not None:
        attributes = {**attributes, "noise_sampler": make_sampler}  # stands for what it makes: a trace asks no sampler
    environment = Environment(attributes, given, schedule)
    # Scalars are computed as the scheduler itself does it where they are times at which a tree of noise has its
    # numbers, and where they are rounded so coarsely that another result would be another picture.
    widened = not sampler and not schedule.half
    for recorded in (True, False) if widened else (False,):
        tree = _tree((kind, make_sampler, recorded))
        found = _found(tree, environment)
        if found is None:
            tracer = Tracer(
                type(scheduler), scheduler.original, environment, recorded=recorded, sampler=sampler, widened=widened
            )
            try:
                leaf = _traced(tracer, name, given, attributes, guided, seeded, make_sampler)
            finally:
                for read in tracer.reads:
                    note_read(scheduler.original, read)
                for reader in tracer.tape.readers:
                    if isinstance(reader, (ArgumentNumber, ArgumentItem)):
                        arguments.setdefault(reader.name)
            tree.add(tracer.tape, leaf)
            _forget_oldest_traces()
            found = leaf, tracer.tape.values
        leaf, values = found
        if isinstance(leaf, Plan):
            try:
                return leaf.with_values(values)
            except NotAffine as refused:
                return str(refused)
    assert isinstance(leaf, str)
    return leaf


def _tree(kind: Any) -> TraceTree[Plan | str]:
    tree = _TREES.get(kind)
    if tree is None:
        tree = _TREES[kind] = TraceTree()
    _TREES.move_to_end(kind)
    return tree


def _found(tree: TraceTree[Plan | str], environment: Environment) -> tuple[Plan | str, list[Any]] | None:
    try:
        return tree.find(environment)
    except (MemoryError, RecursionError):
        raise
    except Exception:
        return None  # an input that no trace has met: the scheduler's own code says what is wrong with it


def _forget_oldest_traces() -> None:
    while sum(tree.count for tree in _TREES.values()) > MOST_TRACES:
        _TREES.popitem(last=False)


def _traced(
    tracer: Tracer, name: str, given: Mapping[str, Any], attributes: Mapping[str, Any], guided: bool, seeded: bool,
    make_sampler: Any,
) -> Plan | str:  # fmt: skip
    """A plan whose numbers are recorded, or why there is none."""
    try:
        trace = tracer.run(name)
        dtypes = dict(_dtypes(given, attributes)) | {f"noise:{k}": dtype for k, dtype in enumerate(trace.draws)}
        seeded = seeded and bool(trace.draws) and not trace.noise_spans  # a path has its seeds itself
        compiled = functools.partial(
            compile_trace, trace, dtypes, guided=guided, seeded=seeded, make_sampler=make_sampler
        )
        if not seeded:
            return compiled()
        try:
            return compiled(drawn=True)
        except NotAffine:
            return compiled()  # the noise is kept, or drawn twice: it has to be a tensor
    except NotAffine as reason:
        return str(reason)
    except (MemoryError, RecursionError):
        raise  # not the scheduler's doing, and perhaps not there the next time
    except Exception as error:
        # The step itself has to fail, so that generators and state stand afterwards where a failure leaves them.
        return f"raises {type(error).__name__}"


def _refusal(given: Mapping[str, Any], attributes: Mapping[str, Any], schedule: Schedule) -> str:
    """Why a call has no plan whatever the scheduler does; empty where that is not known."""
    sample, output = given["sample"], given.get("model_output", given["sample"])
    doubled = output.dim() > 1 and (output.shape[0], output.shape[1] // 2, *output.shape[2:]) == sample.shape
    if output.shape != sample.shape and not doubled:
        return "the model's output and the samples have different shapes"
    if schedule.of_other_shapes(attributes, sample.shape):
        return "the history and the samples have different shapes"
    timestep, levels = given.get("timestep"), schedule.host.get("alphas_cumprod")
    if levels is not None and levels.dtype == torch.float64 and isinstance(timestep, Tensor) and timestep.dim() > 0:
        return "levels in float64, looked up for a tensor of timesteps, make the result float64"
    return ""


def _dtypes(given: Mapping[str, Any], attributes: Mapping[str, Any]) -> Iterator[tuple[str, torch.dtype]]:
    """Of each tensor that a step may read, its place and its dtype."""
    for name, value in given.items():
        if name in INPUTS and isinstance(value, Tensor):
            yield INPUTS[name], value.dtype
    for name in HISTORY & attributes.keys():
        value = attributes[name]
        if isinstance(value, Tensor):
            yield f"self.{name}", value.dtype
        for i, item in enumerate(value if isinstance(value, list) else ()):
            if isinstance(item, Tensor):
                yield f"self.{name}:{i}", item.dtype
