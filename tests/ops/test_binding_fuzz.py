# SPDX-License-Identifier: MIT
"""Fuzz test of the step's binding and of the public steps: a correct result or a refusal, never a crash.

A call is drawn as a `Plan` of plain values, and built and made in a child process (step_plans.py) that is kept between
calls; if it crashes, the failure shows the plan.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdiff.ops import backends
from support.fuzz_process import Server
from support.step_plans import COUNTERS, INTEGERS, LIKE_SAMPLE, LISTS, MASKS, PRIVATE, SLOTS, TENSORS, WAYS, Plan
from support.tensor_mutations import OTHER_CHANGES, TENSOR_CHANGES

#: Rows within the table, to be skipped, just beyond it and far from it.
ROWS = st.sampled_from((0, 1, 2, 0, 1, 2, 0, 1, -1, -2, 3, 2**40, -(2**63)))
STEPS = st.sampled_from((0, 3, 2**32 - 1, 3, 0, 2**32, -1, 2**63 - 1))
#: Registers, none, and what is neither.
STORES = st.sampled_from((-1.0, -1.0, 0.0, 1.0, 2.0, 3.0, 0.0, 1.0, 4.0, 0.5, -0.3, 1e30, float("nan")))
KINDS = st.sampled_from(("number", "number", "one", "a sample", "a sample", "no dimension"))
DTYPES = ("float16", "bfloat16", "float32", "float64")


def a_few(values: st.SearchStrategy) -> st.SearchStrategy:
    return st.lists(values, min_size=1, max_size=4).map(tuple)


CHANGES = st.one_of(
    st.tuples(st.sampled_from(SLOTS), st.sampled_from(sorted(TENSOR_CHANGES))),
    st.tuples(
        st.sampled_from((*COUNTERS, *INTEGERS, *LISTS, *TENSORS, *PRIVATE)),
        st.sampled_from(sorted(OTHER_CHANGES)),
    ),
)
PLANS = st.builds(
    Plan,
    seed=st.integers(0, 2**32 - 1),
    dtype=st.sampled_from(DTYPES),
    shape=st.sampled_from(((2, 3), (1, 5), (3, 1, 4), (32,), (2, 16), (), (1, 1), (2, 520), (0, 3), (1, 32))),
    guidance=st.sampled_from(("none", "scalar", "a sample")),
    registers=st.integers(0, 15),
    noise=st.sampled_from(("none", "given", "drawn", "drawn")),
    variance_kind=st.integers(0, 2),
    threshold=st.booleans(),
    keeps=st.integers(0, 2),
    outs=st.booleans(),
    way=st.sampled_from(WAYS),
    row_as=KINDS,
    rows=a_few(ROWS),
    step_as=KINDS,
    steps=a_few(STEPS),
    purpose=st.sampled_from((0, 1, 1, 2**32 - 1, 2**32, -1)),
    stores=a_few(STORES),
    stored=st.one_of(
        st.just(()), st.lists(st.tuples(st.sampled_from(LIKE_SAMPLE), st.sampled_from(DTYPES)), max_size=4).map(tuple)
    ),
    mask=st.sampled_from((*MASKS, "none", "alone")),
    scatter=st.booleans(),
    parts=st.sampled_from((1, 1, 1, 1, 2, 2, 3, 32, 0, -1, 2**40)),
    copies=st.integers(0, 2),
    model_input=st.sampled_from(DTYPES),
    changes=st.lists(CHANGES, max_size=2).map(tuple),
    shared=st.lists(
        st.tuples(st.sampled_from(SLOTS), st.sampled_from(SLOTS), st.integers(-3, 3)), max_size=2
    ).map(tuple),
    count=st.one_of(st.none(), st.none(), st.none(), st.integers(0, 25)),
)  # fmt: skip

#: Instrumented, the ways that differ in what they hand to the extension are enough.
SANITIZED = os.environ.get("HYPOTHESIS_PROFILE") == "sanitize"
WAYS_THAT_DIFFER = ("binding", "step", "rows") if SANITIZED else WAYS

SERVER = Server(str(Path(__file__).parents[1] / "support" / "step_plans.py"))
pytestmark = pytest.mark.skipif(backends.extension is None, reason="the C++ extension was not built")


@settings(max_examples=6 * settings().max_examples)
@given(plan=PLANS)
def test_any_call_is_correct_or_refused_and_writes_no_input(plan: Plan) -> None:
    answer = SERVER.ask(plan)
    assert not answer.startswith("failed"), answer


#: One good call with all that a call can have but a mask. Registers 0 and 1 are there, and each is stored to.
GOOD = Plan(
    1, "float32", (2, 16), "scalar", 3, "drawn", 1, True, 1, True, "binding", row_as="a sample", rows=(2, 0),
    step_as="a sample", stores=(0, 1), copies=2, model_input="float16",
)  # fmt: skip


def mask_for(*slots: str) -> str:
    return "alone" if "mask" in slots else "none"


ROW_KINDS = ("number", "no dimension", "one", "a sample")


@pytest.mark.parametrize("row_as", ROW_KINDS)
@pytest.mark.parametrize("noise", ["none", "given", "drawn"])
@pytest.mark.parametrize("way", WAYS)
def test_valid_call_returns_result(way: str, noise: str, row_as: str) -> None:
    # Without this a fuzzer whose every call is refused would pass.
    good = replace(GOOD, way=way, noise=noise, row_as=row_as)
    plans = [replace(good, mask=mask) for mask in ("none", "alone")]
    if good.private:
        plans += [replace(plan, scatter=True) for plan in plans] + [replace(good, parts=2)]
    for plan in plans:
        numbered = plan.scatters and row_as == "number"  # what rows name a register each are a tensor
        wanted = ("declined" if plan.private else "TypeError") if numbered else "result"
        assert SERVER.ask(plan) == wanted, plan


@pytest.mark.parametrize("way", WAYS_THAT_DIFFER)
@pytest.mark.parametrize("change", sorted(TENSOR_CHANGES))
def test_every_mutation_of_every_tensor(way: str, change: str) -> None:
    slots = ("sample", "model_output", "table", "guidance_scale", "threshold", "variance", "history 1", "out 0")
    for slot in (*slots, "row_index", "seeds", "noise_step", "model_input", "mask"):
        answer = SERVER.ask(replace(GOOD, way=way, mask=mask_for(slot), changes=((slot, change),)))
        assert not answer.startswith("failed"), f"{slot}: {answer}"


@pytest.mark.parametrize("way", WAYS_THAT_DIFFER)
@pytest.mark.parametrize("change", sorted(OTHER_CHANGES))
def test_every_mutation_of_every_other_argument(way: str, change: str) -> None:
    least = Plan(1, "float32", (2, 3), "none", 0, "none", 0, False, 0, False, way, row_as="a sample")
    for slot in (*COUNTERS, *INTEGERS, *LISTS, *TENSORS, *PRIVATE):
        for base in (replace(GOOD, way=way), least):
            answer = SERVER.ask(replace(base, changes=((slot, change),)))
            assert not answer.startswith("failed"), f"{slot}: {answer}"


@pytest.mark.parametrize("way", WAYS_THAT_DIFFER)
@pytest.mark.parametrize("owner", SLOTS)
def test_every_tensor_overlapping_every_other(way: str, owner: str) -> None:
    for mover in SLOTS:
        for shift in (0, 1) if way == WAYS_THAT_DIFFER[0] else (1,):
            plan = replace(GOOD, way=way, mask=mask_for(mover, owner), shared=((mover, owner, shift),))
            answer = SERVER.ask(plan)
            assert not answer.startswith("failed"), f"{mover} over {owner}, {shift} further: {answer}"
