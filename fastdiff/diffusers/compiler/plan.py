# SPDX-License-Identifier: MIT
"""The plan of a step: what the runtime executes and the extension reads.

In: nothing; `compile` builds plans.  Out: `Plan`, or `Fallback` for a step without one.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...device_copy import OnDevice
from ...ops import backends
from ...ops.checks import DTYPES
from ...row_layout import CLIP, MODEL_INPUT_SCALE, PREV_SAMPLE, compute_dtype
from ...solvers.table import prediction_rows
from .lower import UNBOUNDED_COEFFICIENT
from .symbolic import UnsupportedStep

_CPU = torch.device("cpu")
#: Makes a scheduler's noise sampler, from its attributes and the call's arguments.
SamplerFactory = Callable[[Mapping[str, Any], Mapping[str, Any]], Any]


class NoiseSource(IntEnum):
    """Where a step's noise comes from."""

    #: torch's generators, as diffusers draws it.
    TORCH = 0
    #: The samples' own seeds (`use_philox`).
    SEEDS = 1
    #: The scheduler's noise sampler: an increment of a Brownian path.
    PATH = 2


@dataclass(frozen=True)
class Draw:
    """One noise of a step.

    Attributes:
        dtype: of the noise.
        source: where it comes from.
        purpose: for `NoiseSource.SEEDS`, the counter word (`fastdiff.philox.purpose_of_draw`).
        fused: the fused step draws it, so it has no slot.
        interval: for `NoiseSource.PATH`, the two noise levels.
    """

    dtype: torch.dtype
    source: NoiseSource
    purpose: int = 0
    fused: bool = False
    interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class Constant:
    """A value that does not depend on recorded numbers: a flag, None, a number in the code."""

    value: Any


@dataclass(frozen=True)
class RecordedValue:
    """A number, or a tensor of numbers, computed from recorded numbers.

    Attributes:
        indices: the tape index of each element; a single index if all are one number.
        shape, dtype: of the tensor; None for a number.
    """

    indices: tuple[int, ...]
    shape: tuple[int, ...] | None = None
    dtype: torch.dtype | None = None

    def of(self, values: Sequence[Any]) -> Any:
        """Return the number or the tensor for these values of the tape."""
        if self.shape is None:
            return values[self.indices[0]]
        with torch.inference_mode(False):
            flat = torch.tensor([values[index] for index in self.indices], dtype=self.dtype, device="cpu")
            return flat.reshape(()).expand(self.shape).clone() if len(self.indices) == 1 else flat.reshape(self.shape)


class ListWrite(NamedTuple):
    """A write to a list attribute: its first `start` entries stay, `entries` follow; a `start` of None, a new list."""

    name: str
    start: int | None
    entries: tuple[Any, ...]


@dataclass(frozen=True)
class Fallback:
    """A step without a plan, which the scheduler's own code takes; `reason` is a clause about the step."""

    reason: str


@dataclass(eq=False)
class Plan:
    """One step of one scheduler in one state.

    A slot is the index of a tensor among, in order, `attribute_inputs`, `argument_inputs`, the draws that are not fused
    and the computed tensors.  A written or returned value is a `Constant` or a slot.

    A template is the plan of a trace: its recorded numbers are tape indices, ``(index,)`` in the row and
    `RecordedValue` elsewhere.  `with_values` puts numbers in their place.

    Attributes:
        row: the step's 32 scalars.
        dtype: the widest of all tensors, before and after; the step is computed in its compute dtype.
        attribute_inputs: scheduler attributes, each with the index in a list or None.
        argument_inputs: arguments by name, `USUAL_ARGUMENTS` first.
        history: the slot of each history tensor.
        kept: the number of outputs beside the previous sample.
        output_dtypes: the dtype of each computed tensor.
        draws: each noise that is drawn.
        noise: the slot of the noise that the row reads; None if it reads none, or a fused one.
        variance_kind, thresholding: as in `RowLowering`.
        blend: (slot of a mask, output, output): the first result is the one output plus mask times the other.
        result_type, result_names, results: as in `Trace`.
        attribute_writes, list_writes: what is written to the scheduler after the step.
        uniform: whether all tensors, before and after, have `dtype`.
        accepted_dtypes: whether the fused step accepts the dtype of each.
        noise_sampler_factory: makes the scheduler's noise sampler before the step, or None.
        next_plan: set by the runtime: the plan that follows where nothing is changed.
        scalings: set by the runtime: the plans by which `scale_model_input` scales samples after this step, by dtype.
    """

    row: list[Any]
    dtype: torch.dtype
    attribute_inputs: tuple[tuple[str, int | None], ...]
    argument_inputs: tuple[str, ...]
    history: tuple[int, ...]
    kept: int
    output_dtypes: tuple[torch.dtype, ...]
    draws: tuple[Draw, ...]
    noise: int | None
    variance_kind: int
    thresholding: bool
    blend: tuple[int, int, int] | None
    result_type: type | None
    result_names: tuple[str, ...] | None
    results: tuple[Constant | int, ...]
    attribute_writes: tuple[tuple[str, Constant | int], ...]
    list_writes: tuple[ListWrite, ...]
    uniform: bool
    accepted_dtypes: bool
    noise_sampler_factory: SamplerFactory | None = None
    scalings: dict[torch.dtype, Plan] = field(default_factory=dict, init=False, repr=False)
    next_plan: Plan | None = field(default=None, init=False, repr=False)
    _tables: dict[Any, OnDevice] = field(default_factory=dict, init=False, repr=False)

    def with_values(self, values: Sequence[Any]) -> Plan:
        """Return the template's plan for these values of its tape.

        Raises:
            UnsupportedStep: a coefficient is infinite or NaN.
        """
        row = [values[entry[0]] if type(entry) is tuple else entry for entry in self.row]
        if not all(map(math.isfinite, row[:CLIP] + row[CLIP + 1 :])):
            raise UnsupportedStep(UNBOUNDED_COEFFICIENT)
        plan = object.__new__(Plan)
        own: dict[str, Any] = {"row": row, "scalings": {}, "next_plan": None, "_tables": {}}
        if self._writes_recorded:
            own["results"] = tuple(_with_value(value, values) for value in self.results)
            own["attribute_writes"] = tuple((name, _with_value(v, values)) for name, v in self.attribute_writes)
            own["list_writes"] = tuple(
                ListWrite(name, start, tuple(_with_value(v, values) for v in entries))
                for name, start, entries in self.list_writes
            )
        vars(plan).update(self._shared | own)
        return plan

    @functools.cached_property
    def _shared(self) -> dict[str, Any]:
        """The attributes that do not depend on the values."""
        for name in (
            "native_eligible", "new_output_dtypes", "converts", "tensor_writes", "fused_draw", "_first_output",
        ):  # fmt: skip
            getattr(self, name)
        return dict(vars(self))

    @functools.cached_property
    def _writes_recorded(self) -> bool:
        """True if a value besides the row is recorded."""
        held = [*self.results, *(value for _, value in self.attribute_writes)]
        held += [value for _, _, entries in self.list_writes for value in entries]
        return any(isinstance(value, RecordedValue) for value in held)

    @functools.cached_property
    def native_eligible(self) -> bool:
        """True if the step is at most draws from generators or seeds and one call of the fused step."""
        more = self.thresholding or self.blend or self.noise_sampler_factory
        plain_draws = all(draw.source is not NoiseSource.PATH for draw in self.draws)
        return self.accepted_dtypes and plain_draws and bool(self.output_dtypes) and not more

    @functools.cached_property
    def fused_draw(self) -> Draw | None:
        """The noise that the fused step draws, or None."""
        return next((draw for draw in self.draws if draw.fused), None)

    @property
    def uses_seeds(self) -> bool:
        """True if a noise comes from the samples' own seeds."""
        return any(draw.source is NoiseSource.SEEDS for draw in self.draws)

    @functools.cached_property
    def new_output_dtypes(self) -> tuple[torch.dtype, ...] | None:
        """The dtype of each output of the fused step; None if all have the sample's."""
        if self.uniform:
            return None
        dtypes = [dtype if dtype in DTYPES else self.dtype for dtype in self.output_dtypes]
        if self.blend is not None:
            # The first result is blended from two outputs, which are not rounded before.
            rest = iter(dtypes[1:])
            dtypes = [self.dtype if o in self.blend[1:] else next(rest) for o in range(self.kept + 1)]
        return tuple(dtypes)

    @functools.cached_property
    def converts(self) -> bool:
        """True if a result may have to be cast after the fused step."""
        return not self.uniform and (self.blend is not None or not self.accepted_dtypes)

    @functools.cached_property
    def native(self) -> Any:
        """The plan as the native executor reads it (csrc/dropin/native_plan.h); None without an extension."""
        return None if backends.extension is None else backends.extension.NativePlan(self)

    def set_next(self, plan: Plan) -> None:
        """Set the plan of the same call one timestep later, with nothing changed between."""
        self.next_plan = plan
        if self.native is not None:
            self.native.set_next(plan.native)

    def set_scaling(self, plan: Plan) -> None:
        """Set the plan by which `scale_model_input` scales samples of its dtype after this step.

        It multiplies by one factor and writes nothing (`scale_only`).  This step's state decides the factor, so a plan
        that is there already stays.
        """
        factor = plan.scale_only
        assert factor is not None
        self.scalings.setdefault(plan.dtype, plan)
        if self.native is not None:
            self.native.set_scaling(plan.native, factor)

    def model_input_scale(self) -> float | None:
        """Return the factor of the model input that the fused step can write beside its sample; None if it cannot.

        The sample has to be the first result, and its scaled copy must have the bits of a pass of its own.
        """
        scaling = self.scalings.get(self.output_dtypes[0]) if self.output_dtypes else None
        if scaling is None or self.blend is not None or self.converts or self.results[0] != self._first_output:
            return None
        return scaling.scale_only if compute_dtype(scaling.dtype) is compute_dtype(self.dtype) else None

    @functools.cached_property
    def _first_output(self) -> int:
        """The slot of the first computed tensor."""
        return len(self.attribute_inputs) + len(self.argument_inputs) + sum(not draw.fused for draw in self.draws)

    @functools.cached_property
    def constant_writes(self) -> dict[str, Any]:
        """The attributes that are set to constants."""
        return {name: value.value for name, value in self.attribute_writes if isinstance(value, Constant)}

    @functools.cached_property
    def tensor_writes(self) -> tuple[tuple[str, int], ...]:
        """The attributes that are set to tensors, each with its slot."""
        return tuple((name, value) for name, value in self.attribute_writes if isinstance(value, int))

    @functools.cached_property
    def scale_only(self) -> float | None:
        """The factor of a step that only scales the sample; None for any other."""
        writes = self.history or self.attribute_writes or self.list_writes
        factor, *others = self.row[PREV_SAMPLE:]
        return factor if self.uniform and len(self.output_dtypes) == 1 and not writes and not any(others) else None

    @functools.cached_property
    def host_table(self) -> Tensor:
        """The row as a table on the CPU."""
        return self.table(_CPU)

    def table(self, device: torch.device, model_input_scale: float | None = None) -> Tensor:
        """Return the row as a table on the samples' device, copied there once without waiting.

        Args:
            device: of the samples.
            model_input_scale: of the row, for a step that writes the next model input.
        """
        key = device, model_input_scale
        if key not in self._tables:
            row = list(self.row)
            if model_input_scale is not None:
                row[MODEL_INPUT_SCALE] = model_input_scale
            self._tables[key] = _on_device(lambda: torch.tensor([row], dtype=self._table_dtype, device="cpu"), device)
        return self._tables[key].get()

    def prediction_table(self, device: torch.device) -> Tensor:
        """Return a table whose step gives the prediction itself, unclipped: the input of dynamic thresholding."""
        key = device, "prediction"
        if key not in self._tables:

            def make() -> Tensor:
                return prediction_rows(torch.tensor([self.row], dtype=torch.float64, device="cpu")).to(
                    self._table_dtype
                )

            self._tables[key] = _on_device(make, device)
        return self._tables[key].get()

    @property
    def _table_dtype(self) -> torch.dtype:
        return compute_dtype(self.dtype)


def _on_device(make: Callable[[], Tensor], device: torch.device) -> OnDevice:
    """Return a table on a device, as a tensor that autograd may save for a backward."""
    if not torch.is_inference_mode_enabled():
        return OnDevice(make(), device)
    with torch.inference_mode(False):
        return OnDevice(make(), device)


def _with_value(value: Any, values: Sequence[Any]) -> Any:
    return Constant(value.of(values)) if isinstance(value, RecordedValue) else value
