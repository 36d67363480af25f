# SPDX-License-Identifier: MIT
"""Whole loops of every drop-in beside diffusers' own class, over random configurations.

HYPOTHESIS_PROFILE=thorough takes 200 cases a class; the usual run a few.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from hypothesis import event, given, settings
from hypothesis import strategies as st
from torch import Tensor

from dropin_cases import HALVES, OPTIONS, Case, cases
from dropins import MAKES_SAMPLER, Drawing, Loop, classes, exact_step, exact_walk, made, plans_of, values_of, walk
from fastdiff.diffusers import CLASSES

THOROUGH = os.environ.get("HYPOTHESIS_PROFILE") == "thorough"
NAMES = [name for name in OPTIONS if f"{name}Scheduler" in CLASSES]
#: What a whole loop in float32 may differ by, relative to max(1, |x|): the loops round differently, and every step's
#: difference goes on through the model and the history.
LOOP_TOLERANCE = 3e-4


def examples(thorough: int, usual: int) -> Any:
    return settings(max_examples=thorough if THOROUGH else usual)


def test_every_class_is_here() -> None:
    assert {f"{name}Scheduler" for name in OPTIONS} >= CLASSES.keys()


def same_kind(ours: Any, theirs: Any) -> None:
    """The same types, lengths, names, shapes and dtypes."""
    assert type(ours) is type(theirs)
    if isinstance(theirs, dict):
        assert tuple(ours) == tuple(theirs)
    a, b = values_of(ours), values_of(theirs)
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        assert type(x) is type(y)
        if isinstance(y, Tensor):
            assert (x.shape, x.dtype, x.device) == (y.shape, y.dtype, y.device)


def apart(ours: Tensor, theirs: Tensor) -> float:
    """How far two tensors are apart, relative to max(1, |x|); what is not finite has to be the same."""
    ours, theirs = ours.double(), theirs.double()
    finite = theirs.isfinite()
    if not torch.equal(ours.isfinite(), finite) or not torch.equal(ours.isnan(), theirs.isnan()):
        return float("inf")
    if not bool((ours[theirs.isinf()] == theirs[theirs.isinf()]).all()):
        return float("inf")
    difference = ((ours - theirs).abs() / theirs.abs().clamp(min=1.0))[finite]
    return float(difference.max()) if difference.numel() else 0.0


def farthest(ours: Loop, theirs: Loop) -> float:
    pairs = zip(ours.outputs, theirs.outputs, strict=False)
    tensors = [(x, y) for a, b in pairs for x, y in zip(values_of(a), values_of(b), strict=True)]
    return max((apart(x, y) for x, y in tensors if isinstance(y, Tensor)), default=0.0)


def not_fused(case: Case) -> tuple[str, ...]:
    """Why some of a case's steps are not one fused step, where that is how things are; docs/diffusers.md lists them."""
    reasons = []
    if case.name in MAKES_SAMPLER:
        reasons.append("the first step makes the noise sampler")
    return tuple(reasons)


def check_loop(case: Case) -> None:
    """One loop of ours beside diffusers' own."""
    theirs_class, ours_class = classes(case.name)
    drawing = Drawing()
    theirs = made(case, theirs_class)
    if theirs.error is None:
        theirs.run(mode=drawing)
    their_random = theirs.random_states() if theirs.outputs else []
    ours = walk(case, ours_class)
    assert (type(ours.error), ours.stage) == (type(theirs.error), theirs.stage), (ours.error, theirs.error)
    event(f"diffusers raises: {theirs.stage.split()[0]}" if theirs.error is not None else "a whole loop")
    assert len(ours.outputs) == len(theirs.outputs)
    for mine, other in zip(ours.outputs, theirs.outputs, strict=True):
        same_kind(mine, other)
    if not theirs.outputs:
        return
    for mine, other in zip(ours.random_states(), their_random, strict=True):
        assert torch.equal(mine, other), "a generator stands elsewhere"
    difference = farthest(ours, theirs)
    if not difference <= LOOP_TOLERANCE:
        # Where diffusers' own loop is not that near to exact arithmetic, ours has to be nearer.
        exact = exact_walk(case, drawing.draws, vars(theirs.scheduler).get("noise_sampler"))
        assert type(exact.error) is type(theirs.error)
        event("diffusers is not within tolerance of float64")
        assert farthest(ours, exact) <= max(farthest(theirs, exact), LOOP_TOLERANCE), (difference, farthest(theirs, exact))
    allowed = not_fused(case)
    reasons = {plan for plan in plans_of(ours.scheduler).values() if isinstance(plan, str)}
    assert reasons <= set(allowed), reasons


@pytest.mark.parametrize("name", NAMES)
def test_a_loop_in_float32(name: str) -> None:
    @examples(200, 5)
    @given(cases(name))
    def check(case: Case) -> None:
        check_loop(case)

    check()
