# SPDX-License-Identifier: MIT
"""A traced step as a row of the fused step's table, and what becomes of its results."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor

from ..ops import backends
from ..ops.checks import DTYPES
from ..philox import purpose_of_draw
from ..row_layout import CLIP, PREV_SAMPLE, compute_dtype
from ..solvers.table import prediction_rows
from .form import row_form, take_mask_apart
from .scalars import Coefficient
from .symbols import NotAffine, Terms
from .tracing import INPUTS, USUAL, Computed, Constant, Given, Made, Trace, Value

#: Arguments by the names that formulas have for them.
_NAMES = {leaf: name for name, leaf in INPUTS.items()}
_CPU = torch.device("cpu")
#: Why a step with a coefficient that is infinite or NaN has no plan.
UNBOUNDED_COEFFICIENT = "has a coefficient that is infinite or not a number"
#: The most tensors that the fused step makes: the previous sample and two to keep.
MOST_MADE = 3


@dataclass(eq=False)
class Plan:
    """One step of one scheduler in one state, ready to be run any number of times.

    A value of the result or of the state afterwards is a `Constant`, or the number of a slot.  Slots hold in turn what
    comes from attributes, from the three usual arguments, from other arguments, from draws of noise, and what the step
    makes.

    Attributes:
        row: the step's 32 scalars; before `with_values`, a tuple with its index on the tape for each recorded one.
        dtype: the widest of all tensors, before and after: the step is taken in its compute dtype.
        from_attributes: by name, and by the place in a list where there is one.
        from_arguments, from_keywords: by the number among `USUAL`, and by name.
        registers: the slots of the history tensors, by register.
        made: the dtype of each tensor that the step makes.
        kind, names, results: how the result is put together.
        attributes, lists: what is written to the scheduler afterwards: single values, and lists with how many of their
            first entries stay where they are, None for a new list, and what comes behind them.
        draws: the dtype of each draw of noise.
        noise: the slot of the noise that counts, or None.
        draws_inside: the fused step draws that noise itself.
        purpose: of noise of the samples' own seeds, which draw of the step it is (`fastdiff.philox.purpose_of_draw`).
        seeded: the draws are those of the samples' own seeds.
        spans: for noise from the scheduler's own sampler, its arguments.
        variance_kind, thresholding: of the fused step.
        blend: (slot of a mask, made, made): the first result is the one plus mask times the other.
        make_sampler: what makes the scheduler's noise sampler, of its attributes and the call's arguments, before a
            step that finds none.
    """

    row: list[Any]
    dtype: torch.dtype
    from_attributes: tuple[tuple[str, int | None], ...]
    from_arguments: tuple[int, ...]
    from_keywords: tuple[str, ...]
    registers: tuple[int, ...]
    made: tuple[torch.dtype, ...]
    kind: type | None
    names: tuple[str, ...] | None
    results: tuple[Constant | int, ...]
    attributes: tuple[tuple[str, Constant | int], ...]
    lists: tuple[tuple[str, int | None, tuple[Constant | int, ...]], ...]
    draws: tuple[torch.dtype, ...]
    noise: int | None
    draws_inside: bool
    purpose: int
    seeded: bool
    spans: tuple[tuple[Any, Any], ...]
    variance_kind: int
    thresholding: bool
    blend: tuple[int, int, int] | None
    #: The scheduler's attributes that the step looked at.
    reads: frozenset[str]
    #: How many tensors the fused step keeps beside the previous sample.
    keeps: int
    #: Whether all tensors, before and after, are of `dtype`; and whether each is of one that the fused step takes.
    uniform: bool
    taken_as_they_are: bool
    make_sampler: Callable[[Mapping[str, Any], Mapping[str, Any]], Any] | None = None
    #: Samples of which dtype `scale_model_input` multiplies by what in the state after this step, once asked there.
    next_scale: tuple[torch.dtype, float] | None = field(default=None, init=False, repr=False)
    _tables: dict[Any, Tensor] = field(default_factory=dict, init=False, repr=False)

    def with_values(self, values: Sequence[Any]) -> Plan:
        """The plan whose recorded numbers are these, by their index on the tape.

        Raises:
            NotAffine: a coefficient is infinite or NaN with these numbers.
        """
        row = [values[entry[0]] if type(entry) is tuple else entry for entry in self.row]
        if not all(map(math.isfinite, row[:CLIP] + row[CLIP + 1 :])):
            raise NotAffine(UNBOUNDED_COEFFICIENT)
        own = object.__new__(Plan)
        fresh: dict[str, Any] = {"row": row, "next_scale": None, "_tables": {}}
        vars(own).update(self._shared | fresh)
        if self._computes:
            computed: dict[str, Any] = {
                "results": tuple(_valued(value, values) for value in self.results),
                "attributes": tuple((name, _valued(value, values)) for name, value in self.attributes),
                "lists": tuple((n, stay, tuple(_valued(v, values) for v in items)) for n, stay, items in self.lists),
                "spans": tuple((_number(a, values), _number(b, values)) for a, b in self.spans),
            }
            vars(own).update(computed)
        return own

    @functools.cached_property
    def _shared(self) -> dict[str, Any]:
        """What plans of all values have alike."""
        for name in ("simple", "outputs", "converts", "variables"):
            getattr(self, name)
        return {name: value for name, value in vars(self).items() if name not in ("constants", "_shared", "_computes")}

    @functools.cached_property
    def _computes(self) -> bool:
        """Whether anything but the row depends on recorded numbers."""
        held = [*self.results, *(value for _, value in self.attributes)]
        held += [value for _, _, items in self.lists for value in items]
        return bool(self.spans) or any(isinstance(value, Computed) for value in held)

    @functools.cached_property
    def simple(self) -> bool:
        """Whether the step is one call of the fused step, and nothing before or after it but a draw of noise."""
        more = self.thresholding or self.variance_kind or self.spans or self.blend or not self.made
        return self.taken_as_they_are and not (more or self.make_sampler or (self.seeded and self.draws))

    @functools.cached_property
    def outputs(self) -> tuple[torch.dtype, ...] | None:
        """The dtype of each output of the fused step; None where all are the sample's own."""
        if self.uniform:
            return None
        made = [dtype if dtype in DTYPES else self.dtype for dtype in self.made]
        if self.blend is not None:
            # The first result is made of two, which are not rounded before.
            rest = iter(made[1:])
            made = [self.dtype if o in self.blend[1:] else next(rest) for o in range(self.keeps + 1)]
        return tuple(made)

    @functools.cached_property
    def converts(self) -> bool:
        """Whether a result may have to be brought to its dtype after the fused step."""
        return not self.uniform and (self.blend is not None or not self.taken_as_they_are)

    @functools.cached_property
    def program(self) -> Any:
        """The plan as the extension reads it (csrc/bindings/program.h); None without an extension."""
        return None if backends.extension is None else backends.extension.Program(self)

    @functools.cached_property
    def constants(self) -> dict[str, Any]:
        """The attributes that are set to constants."""
        return {name: value.value for name, value in self.attributes if isinstance(value, Constant)}

    @functools.cached_property
    def variables(self) -> tuple[tuple[str, int], ...]:
        """The attributes that are set to tensors, and the slots of those."""
        return tuple((name, value) for name, value in self.attributes if isinstance(value, int))

    def table(self, device: torch.device) -> Tensor:
        """The row as a table on the samples' device, brought there once."""
        table = self._tables.get(device)
        if table is None:
            table = self._tables[device] = _table([self.row], compute_dtype(self.dtype), device)
        return table

    @functools.cached_property
    def only_scale(self) -> float | None:
        """The number that the sample is multiplied by, where that is all that the step does."""
        alone = self.uniform and len(self.made) == 1 and not (self.registers or self.attributes or self.lists)
        factor, *others = self.row[PREV_SAMPLE:]
        return factor if alone and not any(others) else None

    @functools.cached_property
    def host_table(self) -> Tensor:
        """The row as a table on the CPU."""
        return self.table(_CPU)

    def prediction_table(self, device: torch.device) -> Tensor:
        """A table whose step gives the prediction itself, unclipped: what dynamic thresholding measures."""
        key = device, "prediction"
        if key not in self._tables:
            rows = prediction_rows(torch.tensor([self.row], dtype=torch.float64, device="cpu"))
            self._tables[key] = rows.to(device=device, dtype=compute_dtype(self.dtype))
        return self._tables[key]


def compile_trace(
    trace: Trace,
    dtypes: Mapping[str, torch.dtype],
    *,
    guided: bool = False,
    drawn: bool = False,
    seeded: bool = False,
    make_sampler: Any = None,
) -> Plan:
    """The plan of a traced step.

    Args:
        trace: what the step does.
        dtypes: of the tensors that stand before it, by place.
        guided: the model's output is combined of two within the step, and exists nowhere else.
        drawn: likewise the noise.
        seeded: the noise is that of the samples' own seeds.
        make_sampler: as in `Plan`.

    Raises:
        NotAffine: the step needs more than a row can say.
    """
    absent = {"model_output"} if guided else set()
    absent |= {f"noise:{k}" for k in range(len(trace.draws))} if drawn else set()
    made: list[Made] = []

    def located(value: Value) -> Constant | Computed | str | int:
        """A constant, the place of what stands before the step, or the number of what it makes."""
        if isinstance(value, (Constant, Computed)):
            return value
        if isinstance(value, Given):
            if value.where not in absent:
                return value.where
            value = Made(Terms.of(value.where), dtypes["sample"], 0)
        if value not in made:
            made.append(value)
        return made.index(value)

    results = [located(value) for value in trace.results]
    singles = [(name, located(v)) for name, v in trace.state.items() if not isinstance(v, tuple)]
    lists = [
        _shortened(name, value[0], [located(entry) for entry in value[1]])
        for name, value in trace.state.items()
        if isinstance(value, tuple)
    ]
    formulas = [entry.terms for entry in made]
    if not formulas:
        raise NotAffine("computes no tensor")
    blend = take_mask_apart(formulas)
    if len(formulas) > MOST_MADE:
        raise NotAffine(f"computes {len(formulas)} tensors, and {MOST_MADE} is the most")
    form = row_form(formulas)
    noise = None if form.noise is None or form.noise in absent else form.noise

    wanted = [*results, *(at for _, at in singles), *(at for _, _, entries in lists for at in entries)]
    places = {*form.registers, *filter(None, [noise, "mask" if blend else None])}
    places |= {at for at in wanted if isinstance(at, str)}
    # Registers first: in most plans they are the slots 0, 1, ...
    attributes = [place for place in form.registers if place.startswith("self.")]
    attributes += sorted(place for place in places - {*attributes} if place.startswith("self."))
    arguments = [place for place in USUAL if place in places]
    keywords = sorted(places - {*attributes, *arguments} - {p for p in places if _is_draw(p)})
    draws = [f"noise:{k}" for k in range(0 if drawn else len(trace.draws))]
    slots = [*attributes, *arguments, *keywords, *draws]

    def slot(at: Any) -> Any:
        if isinstance(at, (Constant, Computed)):
            return at
        return slots.index(at) if isinstance(at, str) else len(slots) + at

    read = {"sample", "model_output", *form.registers, *filter(None, [noise])}
    stored = [*(dtypes[place] for place in sorted(read) if place in dtypes), *(entry.dtype for entry in made)]
    dtype = _widest(stored)
    if blend is not None or form.thresholding:
        # What is made on the way to the result must not be rounded to a half type.
        dtype = torch.promote_types(dtype, torch.float32)
    return Plan(
        # By their index alone: a coefficient has its tape, and that the tensors of the call that was traced.
        row=[(c.index,) if type(c) is Coefficient else c for c in cast(list[Any], form.row.scalars())],
        dtype=dtype,
        from_attributes=tuple(map(_attribute, attributes)),
        from_arguments=tuple(map(USUAL.index, arguments)),
        from_keywords=tuple(_NAMES.get(place, place) for place in keywords),
        registers=tuple(slots.index(place) for place in form.registers),
        made=tuple(entry.dtype for entry in made),
        kind=trace.kind,
        names=trace.names,
        results=tuple(map(slot, results)),
        attributes=tuple((name, slot(at)) for name, at in singles),
        lists=tuple((name, stay, tuple(map(slot, entries))) for name, stay, entries in lists),
        draws=() if drawn else trace.draws,
        noise=None if noise is None else slots.index(noise),
        draws_inside=drawn and form.noise is not None and _is_draw(form.noise),
        purpose=purpose_of_draw(int(form.noise[6:])) if form.noise is not None and _is_draw(form.noise) else 0,
        seeded=seeded,
        spans=trace.noise_spans,
        variance_kind=int(form.variance_kind),
        thresholding=form.thresholding,
        blend=None if blend is None else (slots.index("mask"), *blend),
        reads=trace.reads,
        keeps=len(formulas) - 1,
        uniform={dtype, *stored} == {dtype},
        taken_as_they_are=all(each in DTYPES for each in stored),
        make_sampler=make_sampler,
    )


def _table(rows: list[list[float]], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Rows as a tensor that autograd may save for a backward."""
    if not torch.is_inference_mode_enabled():
        return torch.tensor(rows, dtype=dtype, device=device)
    with torch.inference_mode(False):
        return torch.tensor(rows, dtype=dtype, device=device)


def _valued(value: Any, values: Sequence[Any]) -> Any:
    """A recorded value as a constant; any other as it is."""
    return Constant(value.of(values)) if isinstance(value, Computed) else value


def _number(value: Any, values: Sequence[Any]) -> float:
    return float(values[value.index]) if type(value) is Coefficient else value


def _shortened(
    name: str, same: bool, entries: list[Constant | Computed | str | int]
) -> tuple[str, int | None, list[Constant | Computed | str | int]]:
    """A list of the state without the first entries that stay where they are: some schedulers only ever append."""
    if not same:
        return name, None, entries
    stay = 0
    while stay < len(entries) and entries[stay] == f"self.{name}:{stay}":
        stay += 1
    return name, stay, entries[stay:]


def _is_draw(place: str) -> bool:
    return place.startswith("noise:") and place[6:].isdigit()


def _attribute(place: str) -> tuple[str, int | None]:
    name, _, index = place.removeprefix("self.").partition(":")
    return name, int(index) if index else None


def _widest(dtypes: list[torch.dtype]) -> torch.dtype:
    """The dtype that holds all of them."""
    return functools.reduce(torch.promote_types, dtypes)
