# SPDX-License-Identifier: MIT
"""Lower linear expressions to one row of the fused step: one prediction, up to four history tensors, one noise.

In: the expressions of the tensors that a traced step computes, the previous sample's first.  Out: a `RowLowering`, the
row's scalars with the input names that its columns read.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from ... import row_layout as layout
from ...row_layout import COLUMNS, NUM_REGISTERS, ROW_WIDTH, Variance
from .scalars import Factor, finite
from .symbolic import ONE, Clamped, Leaf, LearnedStd, LinearExpr, Masked, ScaledNoise, UnsupportedStep

_T = TypeVar("_T")
#: Why a step with a coefficient that is infinite or NaN has no plan.
UNBOUNDED_COEFFICIENT = "has a coefficient that is infinite or not a number"
#: The first column in the row of each tensor that the fused step computes.
_OUTPUTS = (layout.PREV_SAMPLE, layout.KEEP_0, layout.KEEP_1)


@dataclass(frozen=True)
class RowLowering:
    """A row and the inputs that its columns read.

    Attributes:
        row: the scalars, constant or recorded.
        history: the input name of each history tensor, by history slot.
        noise: the input name of the noise, or None.
        variance_kind: how the noise is scaled by the model's second output.
        thresholding: whether the prediction is clamped to its dynamic threshold.
    """

    row: list[Factor]
    history: tuple[str, ...]
    noise: str | None
    variance_kind: Variance
    thresholding: bool


def lower_to_row(exprs: Sequence[LinearExpr]) -> RowLowering:
    """Return one row for up to three expressions, the previous sample's first.

    Raises:
        UnsupportedStep: no row expresses them.
    """
    if len(exprs) > len(_OUTPUTS):
        raise UnsupportedStep(f"computes {len(exprs)} tensors, and {len(_OUTPUTS)} is the most")
    if not all(finite(c) for expr in exprs for c in _coefficients(expr)):
        raise UnsupportedStep(UNBOUNDED_COEFFICIENT)
    leaves = [leaf for expr in exprs for leaf, _ in expr]
    clamped = _the_only([leaf for leaf in leaves if isinstance(leaf, Clamped)], "clamps two different tensors")
    scaled = _the_only([leaf for leaf in leaves if isinstance(leaf, ScaledNoise)], "scales two different noises")
    names = list(dict.fromkeys(leaf for leaf in leaves if isinstance(leaf, str)))
    noises = [name for name in names if name.startswith("noise")] + ([scaled.noise] if scaled else [])
    if scaled is not None and len(noises) > 1:
        raise UnsupportedStep("adds noise with a fixed and with a learned deviation")
    noise = _the_only(noises, "adds two different noises")
    history = tuple(n for n in names if n not in ("sample", "model_output", ONE) and not n.startswith("noise"))
    if len(history) > NUM_REGISTERS:
        raise UnsupportedStep(f"reads {len(history)} tensors of history, and {NUM_REGISTERS} is the most")

    row: list[Factor] = [0.0] * ROW_WIDTH
    row[layout.CLIP], row[layout.MODEL_INPUT_SCALE] = math.inf, 1.0
    row[layout.STORE_0], row[layout.STORE_1] = (float(k) if k + 1 < len(exprs) else -1.0 for k in (0, 1))
    columns: dict[Leaf, int] = {"sample": 0, "model_output": 1}
    columns |= {name: COLUMNS.index("history_0") + j for j, name in enumerate(history)}
    if clamped is not None:
        columns[clamped] = COLUMNS.index("prediction")
        row[layout.PREDICTION_SAMPLE], row[layout.PREDICTION_OUTPUT] = _prediction(clamped.inner)
        row[layout.CLIP] = math.inf if clamped.bound is None else clamped.bound
    if noise is not None:
        columns[scaled or noise] = COLUMNS.index("noise")
    kind, row[layout.VARIANCE_OFFSET], row[layout.VARIANCE_SLOPE] = _variance(scaled)
    for first, expr in zip(_OUTPUTS, exprs, strict=False):
        for leaf, c in expr:
            if leaf not in columns:
                raise UnsupportedStep(_WHY_NOT.get(type(leaf), "adds a constant"))
            row[first + columns[leaf]] += c
    return RowLowering(row, history, noise, kind, clamped is not None and clamped.bound is None)


_WHY_NOT = {
    LearnedStd: "uses a learned deviation other than to scale noise",
    Masked: "masks more than the previous sample",
}


def split_mask(exprs: list[LinearExpr]) -> tuple[int, int] | None:
    """Split a first expression A + mask·B: A replaces it, B is appended.  Return their indices; None without a mask."""
    masked = [(leaf, c) for leaf, c in exprs[0] if isinstance(leaf, Masked)]
    if not masked:
        return None
    exprs[0] = LinearExpr(tuple((leaf, c) for leaf, c in exprs[0] if not isinstance(leaf, Masked)))
    weighted = LinearExpr()
    for leaf, c in masked:
        weighted = weighted.plus(leaf.inner, c)
    exprs.append(weighted)
    return 0, len(exprs) - 1


def _coefficients(expr: LinearExpr) -> Iterator[Factor]:
    """All coefficients, those inside other leaves included."""
    for leaf, c in expr:
        yield c
        if isinstance(leaf, (Clamped, Masked, LearnedStd)):
            yield from _coefficients(leaf.inner)


def _the_only(found: list[_T], reason: str) -> _T | None:
    if len(set(found)) > 1:
        raise UnsupportedStep(reason)
    return found[0] if found else None


def _prediction(inner: LinearExpr) -> tuple[Factor, Factor]:
    """Return p and q of a prediction p·x + q·m."""
    by_leaf = dict(inner.terms)
    if not by_leaf.keys() <= {"sample", "model_output"}:
        raise UnsupportedStep("clamps a tensor that depends on more than the sample and the model's output")
    return by_leaf.get("sample", 0.0), by_leaf.get("model_output", 0.0)


def _variance(scaled: ScaledNoise | None) -> tuple[Variance, Factor, Factor]:
    """Return the kind of a learned deviation, its offset and its slope."""
    if scaled is None:
        return Variance.FIXED, 0.0, 0.0
    by_leaf = dict(scaled.std.inner.terms)
    if not by_leaf.keys() <= {"variance", ONE}:
        raise UnsupportedStep("learns a deviation from something other than the model's second output")
    offset, slope = by_leaf.get(ONE, 0.0), by_leaf.get("variance", 0.0)
    if scaled.std.function == "exp":
        return Variance.LEARNED_RANGE, offset, slope
    if (offset, slope) != (0.0, 1.0):
        raise UnsupportedStep("takes the root of more than the model's second output")
    return Variance.LEARNED, 0.0, 0.0
