# SPDX-License-Identifier: MIT
"""Compile a step: trace it, lower its expressions to a row, and build its plan.

In: a scheduler's class and the inputs of a call.  Out: a `CompiledStep`: a plan template or a `Fallback`, and the tape
whose guards say for which calls it holds.

These functions keep nothing: the caller stores templates in a `TraceTree`, and calls `Plan.with_values`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...ops.checks import DTYPES
from ...philox import purpose_of_draw
from .inputs import HISTORY, TENSOR_ARGUMENTS, USUAL_ARGUMENTS, ArgumentNumber, StepInputs
from .lower import lower_to_row, split_mask
from .plan import Constant, Fallback, ListWrite, NoiseSource, Plan, RecordedValue, SamplerFactory
from .scalars import Coefficient
from .symbolic import LinearExpr, UnsupportedStep
from .tape import Tape
from .trace import ComputedTensor, ExistingValue, ScalarMode, Trace, Tracer, Value

#: Arguments by their input names in expressions.
_ARGUMENTS = {name: argument for argument, name in TENSOR_ARGUMENTS.items()}


class CompiledStep(NamedTuple):
    """The result of compiling a step.

    Attributes:
        plan: a template, or why there is none.
        tape: its scalars and guards.
        attributes_read, arguments_read: the scheduler's attributes, and the call's arguments, that it depends on.
    """

    plan: Plan | Fallback
    tape: Tape
    attributes_read: tuple[str, ...]
    arguments_read: tuple[str, ...]


def scalar_modes(inputs: StepInputs) -> tuple[ScalarMode, ...]:
    """Return the modes in which to compile a step, until one gives a plan.

    Scalars are computed as the scheduler does it where they are times at which a tree of noise has its numbers, and
    where they are rounded so coarsely that another result would be another picture.
    """
    if inputs.attributes.get("noise_sampler") is not None or inputs.schedule.half:
        return (ScalarMode.UNCHANGED,)
    return ScalarMode.RECORDED, ScalarMode.WIDENED


def compile_step(
    scheduler_class: Any, method: str, inputs: StepInputs, mode: ScalarMode, *, guided: bool, seeded: bool,
    noise_sampler_factory: SamplerFactory | None = None,
) -> CompiledStep:  # fmt: skip
    """Compile one call of a step.

    Args:
        scheduler_class: as for `Tracer`.
        method: the name of the method that takes the step.
        inputs: the call.
        mode: one of `scalar_modes`.
        guided: the model output is combined from two within the step, and exists nowhere else.
        seeded: noise comes from the samples' own seeds, and the fused step draws it if it can.
        noise_sampler_factory: as in `Plan`; `inputs` then has it for the noise sampler.

    Raises:
        MemoryError, RecursionError: these are not the scheduler's doing, and may not occur the next time.
    """
    tracer = Tracer(scheduler_class, inputs, mode)
    plan: Plan | Fallback
    try:
        trace = tracer.run(method)
        if seeded:
            trace = _with_seeds(trace)
        build = functools.partial(build_plan, trace, _tensor_dtypes(inputs), guided, noise_sampler_factory)
        try:
            plan = build(fuse_noise=True)
        except UnsupportedStep:
            if not seeded:
                raise
            plan = build(fuse_noise=False)  # the noise is kept, or drawn twice: it has to be a tensor
    except UnsupportedStep as error:
        plan = Fallback(str(error))
    except (MemoryError, RecursionError):
        raise
    except Exception as error:
        # The step itself has to fail, so that generators and state are left as a failure of diffusers leaves them.
        plan = Fallback(f"raises {type(error).__name__}")
    readers = tracer.tape.readers
    arguments = [reader.name for reader in readers if isinstance(reader, ArgumentNumber)]
    return CompiledStep(plan, tracer.tape, tuple(tracer.attributes_read), tuple(arguments))


def unsupported_call(inputs: StepInputs) -> Fallback | None:
    """Return why a call has no plan whatever the scheduler does; None if that is not known."""
    arguments = inputs.arguments
    sample, output = arguments["sample"], arguments.get("model_output", arguments["sample"])
    doubled = output.dim() > 1 and (output.shape[0], output.shape[1] // 2, *output.shape[2:]) == sample.shape
    if output.shape != sample.shape and not doubled:
        return Fallback("the model's output and the samples have different shapes")
    if has_other_shapes(inputs.attributes, sample.shape):
        return Fallback("the history and the samples have different shapes")
    timestep, levels = arguments.get("timestep"), inputs.schedule.host.get("alphas_cumprod")
    if levels is not None and levels.dtype == torch.float64 and isinstance(timestep, Tensor) and timestep.dim() > 0:
        return Fallback("levels in float64, looked up for a tensor of timesteps, make the result float64")
    return None


def build_plan(
    trace: Trace, dtypes: Mapping[str, torch.dtype], guided: bool, noise_sampler_factory: SamplerFactory | None,
    *, fuse_noise: bool,
) -> Plan:  # fmt: skip
    """Lower a trace to a plan template.

    Args:
        trace: what the step does.
        dtypes: of the tensors that exist before the step, by input name.
        guided, noise_sampler_factory: as for `compile_step`.
        fuse_noise: the fused step draws the noise of `NoiseSource.SEEDS`, which exists nowhere else.

    Raises:
        UnsupportedStep: no row expresses the step.
    """
    draws = {f"noise:{k}": draw for k, draw in enumerate(trace.draws)}
    dtypes = {**dtypes, **{name: draw.dtype for name, draw in draws.items()}}
    fused = {name for name, draw in draws.items() if fuse_noise and draw.source is NoiseSource.SEEDS}
    absent = fused | {"model_output"} if guided else fused
    computed: list[ComputedTensor] = []

    def located(value: Value) -> Constant | RecordedValue | str | int:
        """Return a constant, the input name of what exists before the step, or the index of a computed tensor."""
        if isinstance(value, (Constant, RecordedValue)):
            return value
        if isinstance(value, ExistingValue):
            if value.name not in absent:
                return value.name
            value = ComputedTensor(LinearExpr.of(value.name), dtypes["sample"], 0)
        if value not in computed:
            computed.append(value)
        return computed.index(value)

    results = [located(value) for value in trace.results]
    writes = [(name, located(v)) for name, v in trace.writes.items() if not isinstance(v, tuple)]
    lists = [
        _list_write(name, v[0], [located(entry) for entry in v[1]])
        for name, v in trace.writes.items()
        if isinstance(v, tuple)
    ]
    exprs = [tensor.expr for tensor in computed]
    if not exprs:
        raise UnsupportedStep("computes no tensor")
    blend = split_mask(exprs)
    lowering = lower_to_row(exprs)
    noise = None if lowering.noise in fused else lowering.noise

    # Slots: history first, since in most plans these are 0, 1, ...
    wanted = [*results, *(value for _, value in writes), *(value for entries in lists for value in entries[2])]
    names = {*lowering.history, *filter(None, [noise, "mask" if blend else None])}
    names |= {value for value in wanted if isinstance(value, str)}
    attributes = [name for name in lowering.history if name.startswith("self.")]
    attributes += sorted(name for name in names - {*attributes} if name.startswith("self."))
    arguments = [name for name in USUAL_ARGUMENTS if name in names]
    arguments += sorted(names - {*attributes, *arguments, *draws})
    slots = [*attributes, *arguments, *(name for name in draws if name not in fused)]

    def slot(value: Constant | RecordedValue | str | int) -> Any:
        if isinstance(value, (Constant, RecordedValue)):
            return value
        return slots.index(value) if isinstance(value, str) else len(slots) + value

    read = {"sample", "model_output", *lowering.history, *filter(None, [noise])}
    stored = [*(dtypes[name] for name in sorted(read) if name in dtypes), *(tensor.dtype for tensor in computed)]
    dtype = functools.reduce(torch.promote_types, stored)
    if blend is not None or lowering.thresholding:
        dtype = torch.promote_types(dtype, torch.float32)  # intermediate results must not be rounded to a half type
    return Plan(
        # A coefficient refers to its tape, and that to the tensors of the traced call: keep its index alone.
        row=[(c.index,) if type(c) is Coefficient else c for c in lowering.row],
        dtype=dtype,
        attribute_inputs=tuple(map(_attribute, attributes)),
        argument_inputs=tuple(_ARGUMENTS.get(name, name) for name in arguments),
        history=tuple(slots.index(name) for name in lowering.history),
        kept=len(exprs) - 1,
        output_dtypes=tuple(tensor.dtype for tensor in computed),
        draws=tuple(
            dataclasses.replace(draw, fused=name in fused)
            for name, draw in draws.items()
            if name not in fused or name == lowering.noise
        ),
        noise=None if noise is None else slots.index(noise),
        variance_kind=int(lowering.variance_kind),
        thresholding=lowering.thresholding,
        blend=None if blend is None else (slots.index("mask"), *blend),
        result_type=trace.result_type,
        result_names=trace.result_names,
        results=tuple(map(slot, results)),
        attribute_writes=tuple((name, slot(value)) for name, value in writes),
        list_writes=tuple(ListWrite(name, start, tuple(map(slot, entries))) for name, start, entries in lists),
        uniform={dtype, *stored} == {dtype},
        accepted_dtypes=all(each in DTYPES for each in stored),
        noise_sampler_factory=noise_sampler_factory,
    )


def _with_seeds(trace: Trace) -> Trace:
    """Draw the noise of torch's generators from the samples' own seeds; a path has seeds of its own."""
    draws = tuple(
        dataclasses.replace(draw, source=NoiseSource.SEEDS, purpose=purpose_of_draw(k))
        if draw.source is NoiseSource.TORCH
        else draw
        for k, draw in enumerate(trace.draws)
    )
    return dataclasses.replace(trace, draws=draws)


def has_other_shapes(attributes: Mapping[str, Any], shape: torch.Size) -> bool:
    """Return whether tensors of history have another shape than the samples, which they would be broadcast to."""
    for name in HISTORY & attributes.keys():
        value = attributes[name]
        for item in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(item, Tensor) and item.shape != shape:
                return True
    return False


def _tensor_dtypes(inputs: StepInputs) -> dict[str, torch.dtype]:
    """Return the dtype of each tensor that a step may read, by input name."""
    tensors = {name: inputs.arguments.get(argument) for argument, name in TENSOR_ARGUMENTS.items()}
    for name in HISTORY & inputs.attributes.keys():
        value = inputs.attributes[name]
        tensors[f"self.{name}"] = value
        tensors |= {f"self.{name}:{i}": item for i, item in enumerate(value if isinstance(value, list) else ())}
    return {name: tensor.dtype for name, tensor in tensors.items() if isinstance(tensor, Tensor)}


def _list_write(name: str, same: bool, entries: list[Any]) -> tuple[str, int | None, list[Any]]:
    """Return a write without the first entries that stay where they are: some schedulers only ever append."""
    if not same:
        return name, None, entries
    start = 0
    while start < len(entries) and entries[start] == f"self.{name}:{start}":
        start += 1
    return name, start, entries[start:]


def _attribute(name: str) -> tuple[str, int | None]:
    """Split an input name into the attribute's name and the index in a list."""
    attribute, _, index = name.removeprefix("self.").partition(":")
    return attribute, int(index) if index else None
