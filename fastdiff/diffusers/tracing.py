# SPDX-License-Identifier: MIT
"""One step of a diffusers scheduler, run on symbols: what it returns, what it draws, and what becomes of its state.

The scheduler's own code is what is run, that of the installed diffusers: prediction types, orders, corrections and
final steps are its own, and so are its refusals.  Scalars are its scalars, widened to float64 first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .symbols import Clamped, Symbol, Terms, Tracing

#: Attributes in which schedulers keep tensors like the samples from step to step, alone or in lists.
HISTORY = frozenset(
    (
        "model_outputs", "ets", "derivatives", "last_sample", "sample", "prev_derivative", "cur_sample",
        "cur_model_output", "last_noise",
    )
)  # fmt: skip
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
    """A value that depends on the schedule alone: a number, a flag, a tensor of scalars."""

    value: Any


Value = Given | Made | Constant


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


def trace_step(original: type, name: str, arguments: Mapping[str, Any], state: Mapping[str, Any]) -> Trace:
    """Run `original`'s method `name` on a scheduler in this state, with symbols for all that is like the samples.

    Args:
        original: the diffusers class whose method it is.
        name: "step", or another method of its kind.
        arguments: of the call, by name; without `generator`, which nothing is drawn from here.
        state: the scheduler's attributes before the step, tensors of scalars on the host; nothing of it is changed.

    Raises:
        NotAffine: the step is none that a row can say.
        Exception: whatever the scheduler itself raises.
    """
    # A tree of noise has its numbers at exact times: there scalars stay as they are.
    scalars = _on_host if state.get("noise_sampler") is not None else _widened
    reads: set[str] = set()
    stub: Any = object.__new__(_watched(original, reads))
    stub.__dict__.update(state)
    places: dict[int, Any] = {}
    keep_alive: list[Any] = []

    def known(value: Any, place: Any) -> Any:
        places.setdefault(id(value), place)
        keep_alive.append(value)
        return value

    def symbol(tensor: Tensor, leaf: str) -> Symbol:
        made: Symbol = Symbol.make(tensor, Terms.of(leaf))
        return known(made, leaf)  # type: ignore[no-any-return]

    before: dict[str, Any] = {}
    for attribute, value in state.items():
        if isinstance(value, list):
            stands = [
                symbol(item, f"self.{attribute}:{i}") if attribute in HISTORY and isinstance(item, Tensor) else item
                for i, item in enumerate(value)
            ]
            for i, item in enumerate(stands):
                if not _is_plain(item):
                    known(item, f"self.{attribute}:{i}")
            before[attribute] = stands
        elif isinstance(value, Tensor):
            before[attribute] = symbol(value, f"self.{attribute}") if attribute in HISTORY else scalars(value)
        else:
            before[attribute] = value
    stub.__dict__.update(before)
    lists = {attribute: value for attribute, value in before.items() if isinstance(value, list)}

    tracing = Tracing()
    spans: list[tuple[float, float]] = []
    if state.get("noise_sampler") is not None:

        def sampler(sigma: Any, sigma_next: Any) -> Symbol:
            spans.append((float(sigma), float(sigma_next)))
            return tracing.noise(arguments["sample"])

        stub.noise_sampler = before["noise_sampler"] = sampler
    if hasattr(stub, "_threshold_sample"):
        stub._threshold_sample = _threshold
    given: dict[str, Any] = {}
    for argument, value in arguments.items():
        leaf = INPUTS.get(argument)
        if leaf is not None and isinstance(value, Tensor):
            given[argument] = symbol(value, leaf)
        else:
            given[argument] = known(scalars(value), argument) if isinstance(value, Tensor) else value
    tracing.known = known
    with tracing:
        results = getattr(original, name)(stub, **given)

    def value_of(value: Any) -> Value:
        place = places.get(id(value))
        if isinstance(value, Symbol):
            # The very tensor that it was: equal numbers in a new tensor are made anew.
            return (
                Given(place)
                if value.terms.only_leaf == place is not None
                else Made(value.terms, value.dtype, id(value))
            )
        if place is not None and not _is_plain(value):
            return Given(place)
        if isinstance(value, Tensor) and value.dtype == torch.float64:
            value = value.float()  # as the scheduler itself would have it
        return Constant(value)

    changed: dict[str, Value | tuple[bool, tuple[Value, ...]]] = {}
    seen = frozenset(reads)
    for attribute, value in vars(stub).items():
        if attribute in ("_threshold_sample", "noise_sampler"):
            continue
        if isinstance(value, list):
            same = lists.get(attribute) is value
            entries = tuple(value_of(item) for item in value)
            unchanged = same and len(entries) == len(state[attribute]) and all(
                entry == Given(f"self.{attribute}:{i}") or (isinstance(entry, Constant) and entry.value is old)
                for i, (entry, old) in enumerate(zip(entries, state[attribute], strict=True))
            )  # fmt: skip
            if not unchanged:
                changed[attribute] = (same, entries)
        elif value is not before.get(attribute) or attribute not in before or isinstance(value, Symbol):
            found = value_of(value)
            if found != Given(f"self.{attribute}"):
                changed[attribute] = found
    kind: type | None = type(results)
    names: tuple[str, ...] | None = None
    listed = results
    if isinstance(results, dict):  # diffusers' outputs are dictionaries with attributes
        names, listed = tuple(results), tuple(results.values())
    elif not isinstance(results, tuple):
        kind, listed = None, (results,)
    return Trace(kind, names, tuple(map(value_of, listed)), changed, tuple(tracing.draws), tuple(spans), seen)


def _watched(original: type, reads: set[str]) -> type:
    """The class, telling which attributes are looked at."""

    def look_up(self: Any, name: str) -> Any:
        reads.add(name)
        return object.__getattribute__(self, name)

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
