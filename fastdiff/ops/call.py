# SPDX-License-Identifier: MIT
"""The arguments of one fused step, declared once.

`StepCall` is carried from the public functions to the kernels.  Each field states its role, from which the registered
operators' schemas, autograd's slots and vmap's batching rules follow; csrc/bindings/step_call.h lists the same fields.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ..philox import Purpose
from ..row_layout import NUM_REGISTERS, Variance

#: Destination of one output: a tensor to write, the dtype of a new tensor, or None for a new one like the sample.
Target = Tensor | torch.dtype | None

#: Roles of arguments:
#: ``sample``: a tensor of the samples' shape and device, differentiable; vmap folds it into the batch;
#: ``mask``: one like those, without a gradient;
#: ``history``: up to four of those, by history slot;
#: ``table``: the coefficients, without a gradient;
#: ``scalar``: compute-dtype numbers, one for all samples, one a sample, or one a part of a sample, differentiable;
#: ``counter``: int64 numbers, one for all samples, one a sample, or one a part;
#: ``option``: a number that selects code;
#: ``output``: tensors to write.
Role = Literal["sample", "mask", "history", "table", "scalar", "counter", "option", "output"]


def _argument(role: Role, doc: str) -> dict[str, str]:
    return {"role": role, "doc": doc}


@dataclass(frozen=True, kw_only=True)
class StepCall:
    """The arguments of one step."""

    sample: Tensor = field(metadata=_argument("sample", "x: [B, ...] or [...], float16, bfloat16, float32 or float64"))
    model_output: Tensor = field(metadata=_argument("sample", "c: like sample, of any of the four dtypes"))
    table: Tensor = field(metadata=_argument("table", "[R, 32] in the compute dtype"))
    row_index: int | Tensor = field(
        metadata=_argument("counter", "int, or int64 [], [1], [B] or [B, T]; a negative one skips its sample or part")
    )
    uncond: Tensor | None = field(
        default=None, metadata=_argument("sample", "u: like sample, of any of the four dtypes")
    )
    guidance_scale: float | Tensor | None = field(
        default=None, metadata=_argument("scalar", "g: a number, or [], [1], [B] or [B, T] in the compute dtype")
    )
    history: tuple[Tensor | None, ...] = field(
        default=(), metadata=_argument("history", "h_j: like sample, of any of the four dtypes")
    )
    noise: Tensor | None = field(
        default=None, metadata=_argument("sample", "z: like sample, of any of the four dtypes")
    )
    variance: Tensor | None = field(
        default=None, metadata=_argument("sample", "v: like sample, of any of the four dtypes")
    )
    mask: Tensor | None = field(
        default=None, metadata=_argument("mask", "w: like sample, of any of the four dtypes; 1 takes keep_1's map")
    )
    threshold: Tensor | None = field(
        default=None, metadata=_argument("scalar", "s: [B] or [B, T] in the compute dtype")
    )
    variance_kind: int = field(default=Variance.FIXED, metadata=_argument("option", "a fastdiff.row_layout.Variance"))
    keeps: int = field(default=0, metadata=_argument("option", "kept outputs, 0 to 2"))
    seeds: Tensor | None = field(default=None, metadata=_argument("counter", "int64 [B]: noise is drawn in the step"))
    noise_step: int | Tensor = field(
        default=0, metadata=_argument("counter", "int, or int64 [1], [B] or [B, T]; read beside seeds alone")
    )
    purpose: int = field(
        default=Purpose.STEP, metadata=_argument("option", "a fastdiff.Purpose; read beside seeds alone")
    )
    parts: int = field(
        default=1, metadata=_argument("option", "consecutive samples that share a seed and are counted through")
    )
    model_input: Tensor | None = field(
        default=None, metadata=_argument("output", "[B, ...] or [2·B, ...], of any of the four dtypes")
    )
    write_history: bool = field(
        default=False, metadata=_argument("option", "kept outputs go to the history slots that the rows name")
    )
    out: tuple[Target, ...] | None = field(
        default=None, metadata=_argument("output", "1 + keeps targets; None: new like sample")
    )

    @property
    def targets(self) -> tuple[Target, ...]:
        """The destination of each output."""
        return (None,) * (self.keeps + 1) if self.out is None else self.out

    @property
    def output_dtypes(self) -> list[torch.dtype]:
        """The dtype of each output."""
        return [stored_as(target, self.sample) for target in self.targets]

    def model_tensors(self) -> Iterator[tuple[str, Tensor]]:
        yield "model_output", self.model_output
        for name in ("uncond", "variance"):
            tensor = getattr(self, name)
            if tensor is not None:
                yield name, tensor

    def inputs(self) -> Iterator[tuple[str, Tensor]]:
        """The tensors like the sample that are read."""
        yield "sample", self.sample
        yield from self.model_tensors()
        for j, tensor in enumerate(self.history):
            if tensor is not None:
                yield f"history[{j}]", tensor
        if self.noise is not None:
            yield "noise", self.noise
        if self.mask is not None:
            yield "mask", self.mask

    def scalars(self) -> Iterator[tuple[str, Tensor]]:
        """The tensors in the compute dtype."""
        yield "table", self.table
        for name in SCALARS:
            tensor = getattr(self, name)
            if isinstance(tensor, Tensor):
                yield name, tensor

    def counters(self) -> Iterator[tuple[str, Tensor]]:
        """The integer tensors that are read: without seeds no other than the row index."""
        for name in ("row_index",) if self.seeds is None else COUNTERS:
            tensor = getattr(self, name)
            if isinstance(tensor, Tensor):
                yield name, tensor

    def guidance_tensor(self) -> Tensor | None:
        """Return the guidance scale as a tensor: a number as a new one ``[1]`` on the samples' device."""
        scale = self.guidance_scale
        if scale is None or isinstance(scale, Tensor):
            return scale
        return torch.full((1,), scale, dtype=self.table.dtype, device=self.sample.device)

    @property
    def model_input_copies(self) -> int:
        """The number of times that the model input holds the samples: 0 where none is wanted."""
        if self.model_input is None:
            return 0
        return 1 if self.model_input.shape == self.sample.shape else 2

    @property
    def differs_per_sample(self) -> bool:
        """Return whether anything but the elements differs from sample to sample."""
        return (
            self.threshold is not None
            or self.seeds is not None
            or any(isinstance(v, Tensor) and v.numel() > 1 for v in (self.row_index, self.guidance_scale))
        )

    @property
    def has_parts(self) -> bool:
        """Return whether a tensor of numbers is ``[B, T]``: samples are batches of parts then."""
        numbers = [self.row_index, self.guidance_scale, self.threshold]
        numbers += [] if self.seeds is None else [self.noise_step]
        return any(isinstance(values, Tensor) and values.dim() == 2 for values in numbers)

    def blocks(self) -> tuple[int, int, int]:
        """The batch of a canonical call, its elements a sample, and the model tensors' stride from sample to sample.

        All elements are one sample where nothing differs from sample to sample.
        """
        total = self.sample.numel()
        if not self.differs_per_sample and self.model_output.stride() == self.sample.stride():
            return 1, total, total
        batch = self.sample.shape[0] if self.sample.dim() > 0 else 1
        return batch, total // batch, self.model_output.stride(0) if batch > 1 else total // batch

    def channels(self) -> int:
        """Return 1 where a canonical call's samples are in row-major order, their channels where channels-last.

        Any other dense order counts as the latter; only a call with seeds asks, and has neither.
        """
        expected = 1
        for size, stride in zip(reversed(self.sample.shape[1:]), reversed(self.sample.stride()[1:]), strict=True):
            if size != 1 and stride != expected:
                return self.sample.shape[1]
            expected *= size
        return 1


def stored_as(target: Target, sample: Tensor) -> torch.dtype:
    """Return the dtype of an output."""
    if target is None:
        return sample.dtype
    return target if isinstance(target, torch.dtype) else target.dtype


#: The names of all fields, in order.
FIELDS = tuple(each.name for each in fields(StepCall))


def _fields_of(*roles: Role) -> tuple[str, ...]:
    return tuple(each.name for each in fields(StepCall) if each.metadata["role"] in roles)


SCALARS = _fields_of("scalar")
COUNTERS = _fields_of("counter")


class OperatorArgument(NamedTuple):
    """One argument of a registered operator.

    Attributes:
        name: in the schema.
        type: in the schema's language.
        role: of the field that it carries, or of a part of it; None for the backend.
    """

    name: str
    type: str
    role: Role | None


#: Schema names of the parts of fields that one schema argument cannot carry.
HISTORY_SLOTS = tuple(f"history_{j}" for j in range(NUM_REGISTERS))
RESULT_DTYPES = ("prev_sample_dtype", "keep_0_dtype", "keep_1_dtype")
#: The tensor in place of a counter that is a number otherwise.
COUNTER_TENSORS = {"row_index": "row_indices", "noise_step": "noise_steps"}


def _operator_arguments(write_history: bool) -> Iterator[OperatorArgument]:
    for each in fields(StepCall):
        name, role = each.name, each.metadata["role"]
        if role in ("sample", "mask", "table", "scalar") or name == "seeds":
            required = each.default is MISSING
            yield OperatorArgument(name, "Tensor" if required else "Tensor?", role)
        elif role == "history" and write_history:
            # A schema cannot say that tensors that may be None are written: those present, and their slots.
            yield OperatorArgument("history", "Tensor(a!)[]", role)
            yield OperatorArgument("history_slots", "SymInt[]", role)
        elif role == "history":
            yield from (OperatorArgument(slot, "Tensor?", role) for slot in HISTORY_SLOTS)
        elif name == "row_index" and write_history:
            yield OperatorArgument(COUNTER_TENSORS[name], "Tensor", role)
        elif role == "counter":
            yield OperatorArgument(name, "SymInt", role)
            yield OperatorArgument(COUNTER_TENSORS[name], "Tensor?", role)
        elif name == "model_input":
            yield OperatorArgument("model_input_dtype", "ScalarType?", role)
            yield OperatorArgument("model_input_copies", "SymInt", role)
        elif name == "out":
            names = RESULT_DTYPES[:1] if write_history else RESULT_DTYPES
            yield from (OperatorArgument(dtype, "ScalarType?", role) for dtype in names)
        elif name != "write_history" and not (name == "keeps" and write_history):
            yield OperatorArgument(name, "SymInt", role)
    yield OperatorArgument("backend", "str", None)


#: The arguments of ``fastdiff::step`` and ``fastdiff::step_rows``, in order.
STEP_ARGUMENTS = tuple(_operator_arguments(write_history=False))
STEP_ROWS_ARGUMENTS = tuple(_operator_arguments(write_history=True))
STEP_NAMES = tuple(argument.name for argument in STEP_ARGUMENTS)
STEP_ROWS_NAMES = tuple(argument.name for argument in STEP_ROWS_ARGUMENTS)


def schema(arguments: Sequence[OperatorArgument], returns: str) -> str:
    """Return an operator's schema."""
    return f"({', '.join(f'{a.type} {a.name}' for a in arguments)}) -> {returns}"


def operator_values(call: StepCall, backend: str) -> list[Any]:
    """Return the arguments of the operator that takes this call, in its schema's order.

    Outputs become dtypes: operators return new tensors, and their caller copies.  Dynamo traces this function.
    """
    given: dict[str, Any] = {name: getattr(call, name) for name in FIELDS}
    for name, tensor in COUNTER_TENSORS.items():
        value = given[name]
        given[name], given[tensor] = (0, value) if isinstance(value, Tensor) else (value, None)
    given["guidance_scale"] = call.guidance_tensor()
    given["variance_kind"], given["purpose"] = int(call.variance_kind), int(call.purpose)
    asked = call.model_input
    given["model_input_dtype"], given["model_input_copies"] = None, 1
    if asked is not None:
        given["model_input_dtype"], given["model_input_copies"] = asked.dtype, call.model_input_copies
    # The sample's own dtype, which most calls have, is None.
    dtypes = [None if dtype == call.sample.dtype else dtype for dtype in call.output_dtypes]
    for o, name in enumerate(RESULT_DTYPES):
        given[name] = dtypes[o] if o < len(dtypes) else None
    given["backend"] = backend
    if call.write_history:
        slots = [j for j, tensor in enumerate(call.history) if tensor is not None]
        given["history"], given["history_slots"] = [call.history[j] for j in slots], slots
        return [given[name] for name in STEP_ROWS_NAMES]
    for j, name in enumerate(HISTORY_SLOTS):
        given[name] = call.history[j] if j < len(call.history) else None
    return [given[name] for name in STEP_NAMES]


def named(arguments: Sequence[OperatorArgument], values: Sequence[Any]) -> dict[str, Any]:
    """Return an operator's values by the names of its schema."""
    return {argument.name: value for argument, value in zip(arguments, values, strict=True)}


def call_of(given: dict[str, Any], model_input: Tensor | None = None) -> StepCall:
    """Return the call of an operator's values by name, with the tensor that stands for a wanted model input."""
    write_history = "history_slots" in given
    values = {name: given[name] for name in FIELDS if name in given and name not in ("history", "out")}
    for name, tensor in COUNTER_TENSORS.items():
        if given[tensor] is not None:
            values[name] = given[tensor]
    if write_history:
        history: list[Tensor | None] = [None] * NUM_REGISTERS
        for slot, tensor in zip(given["history_slots"], given["history"], strict=True):
            history[slot] = tensor
    else:
        history = [given[name] for name in HISTORY_SLOTS]
    dtypes = tuple(given[name] for name in RESULT_DTYPES if name in given)
    return StepCall(
        **values,
        history=tuple(history),
        model_input=model_input,
        write_history=write_history,
        out=dtypes[: values.get("keeps", 0) + 1],
    )
