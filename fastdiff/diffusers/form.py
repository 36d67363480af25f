# SPDX-License-Identifier: MIT
"""Formulas of a traced step, brought into the form of a row: one prediction, up to four registers, one noise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from ..row_layout import COLUMNS, NUM_REGISTERS, Variance
from ..solvers.affine import ZERO, Affine
from ..solvers.table import Row
from .scalars import Factor, finite
from .symbols import ONE, Clamped, Leaf, LearnedStd, Masked, NotAffine, ScaledNoise, Terms

_T = TypeVar("_T")


@dataclass(frozen=True)
class Form:
    """A row, and which tensors its columns mean.

    Attributes:
        row: the scalars.
        registers: the place of each history tensor, by register.
        noise: the name of the noise, or None.
        variance_kind: how the noise is scaled by the model's second output.
        thresholding: whether the prediction is held to its own dynamic threshold.
    """

    row: Row
    registers: tuple[str, ...]
    noise: str | None
    variance_kind: Variance
    thresholding: bool


def row_form(formulas: Sequence[Terms]) -> Form:
    """One row for up to three formulas, of which the first is the previous sample.

    Raises:
        NotAffine: they have no such form.
    """
    leaves = [leaf for formula in formulas for leaf, _ in formula]
    if not all(map(_bounded, formulas)):
        raise NotAffine("has a coefficient that is infinite or not a number")
    clamped = _the_only([leaf for leaf in leaves if isinstance(leaf, Clamped)], "clamps two different tensors")
    scaled = _the_only([leaf for leaf in leaves if isinstance(leaf, ScaledNoise)], "scales two different noises")
    names = list(dict.fromkeys(leaf for leaf in leaves if isinstance(leaf, str)))
    noises = [name for name in names if name.startswith("noise")] + ([scaled.noise] if scaled else [])
    if scaled is not None and len(noises) > 1:
        raise NotAffine("adds noise with a fixed and with a learned deviation")
    noise = _the_only(noises, "adds two different noises")
    registers = tuple(n for n in names if n not in ("sample", "model_output", ONE) and not n.startswith("noise"))
    if len(registers) > NUM_REGISTERS:
        raise NotAffine(f"reads {len(registers)} tensors of history, and {NUM_REGISTERS} is the most")
    columns: dict[Leaf, int] = {"sample": 0, "model_output": 1}
    columns |= {name: COLUMNS.index("history_0") + j for j, name in enumerate(registers)}
    for leaf, column in ((clamped, "prediction"), (scaled or noise, "noise")):
        if leaf is not None:
            columns[leaf] = COLUMNS.index(column)

    def affine(formula: Terms) -> Affine:
        coefficients = list(ZERO.coefficients)
        for leaf, coefficient in formula:
            if leaf not in columns:
                raise NotAffine(_WHY_NOT.get(type(leaf), "adds a constant"))
            coefficients[columns[leaf]] += coefficient
        return Affine(coefficients)

    # A row's scalars are recorded coefficients here, until `Plan.with_values` puts numbers in their place.
    prediction: Any = (0.0, 0.0)
    clip: Any = math.inf
    if clamped is not None:
        prediction = _of_two(clamped.inner)
        clip = math.inf if clamped.bound is None else clamped.bound
    kind: Variance
    offset: Any
    slope: Any
    kind, offset, slope = _variance(scaled)
    kept = tuple(affine(formula) for formula in formulas[1:])
    row = Row(
        timestep=0.0,
        prev_sample=affine(formulas[0]),
        prediction=prediction,
        clip=clip,
        kept=kept,
        slots=tuple(range(len(kept))),
        variance_offset=offset,
        variance_slope=slope,
    )
    return Form(row, registers, noise, kind, clamped is not None and clamped.bound is None)


_WHY_NOT = {
    LearnedStd: "uses a learned deviation other than to scale noise",
    Masked: "masks more than the previous sample",
}


def take_mask_apart(formulas: list[Terms]) -> tuple[int, int] | None:
    """Of a masked first formula, A + mask·B: put A in its place, B behind all, and say where they are."""
    masked = [(leaf, c) for leaf, c in formulas[0] if isinstance(leaf, Masked)]
    if not masked:
        return None
    rest = Terms(tuple((leaf, c) for leaf, c in formulas[0] if not isinstance(leaf, Masked)))
    weighted = Terms()
    for leaf, c in masked:
        weighted = weighted.plus(leaf.inner, c)
    formulas[0] = rest
    formulas.append(weighted)
    return 0, len(formulas) - 1


def _bounded(formula: Terms) -> bool:
    """Whether all coefficients are finite, those inside a clamp too."""
    return all(
        finite(c) and not (isinstance(leaf, (Clamped, Masked, LearnedStd)) and not _bounded(leaf.inner))
        for leaf, c in formula
    )


def _the_only(found: list[_T], otherwise: str) -> _T | None:
    different = set(found)
    if len(different) > 1:
        raise NotAffine(otherwise)
    return found[0] if found else None


def _of_two(inner: Terms) -> tuple[Factor, Factor]:
    """p and q of a prediction p·x + q·m."""
    by_leaf = dict(inner.items)
    if not by_leaf.keys() <= {"sample", "model_output"}:
        raise NotAffine("clamps a tensor that depends on more than the sample and the model's output")
    return by_leaf.get("sample", 0.0), by_leaf.get("model_output", 0.0)


def _variance(scaled: ScaledNoise | None) -> tuple[Variance, Factor, Factor]:
    if scaled is None:
        return Variance.FIXED, 0.0, 0.0
    by_leaf = dict(scaled.std.inner.items)
    if not by_leaf.keys() <= {"variance", ONE}:
        raise NotAffine("learns a deviation from something other than the model's second output")
    offset, slope = by_leaf.get(ONE, 0.0), by_leaf.get("variance", 0.0)
    if scaled.std.function == "exp":
        return Variance.LEARNED_RANGE, offset, slope
    if (offset, slope) != (0.0, 1.0):
        raise NotAffine("takes the root of more than the model's second output")
    return Variance.LEARNED, 0.0, 0.0
