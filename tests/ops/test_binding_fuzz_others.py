# SPDX-License-Identifier: MIT
"""Fuzz test of the bindings of noise, reductions and the copy: never a crash, no other memory written.

They take canonical arguments, so a refusal may be None or any exception.  Run as a program, this file is the child
process that makes the calls; see fuzz_process.py.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastdiff
from fastdiff import ops
from fastdiff.ops import backends
from support.fuzz_process import Memory, Server, copy_of, serve
from support.oracle import assert_same_bits
from support.tensor_mutations import OTHER_CHANGES, TENSOR_CHANGES, UNREADABLE, in_a_room

#: Each binding's arguments in their order, without `stream`.
ARGUMENTS = {
    "randn": ("out", "seeds", "steps", "step", "purpose"),
    "sum": ("kind", "x", "y", "correction"),
    "quantile": ("x", "low", "weight", "absolute"),
    "_copy_kernel": ("src", "dst", "streaming"),
}
WRITTEN = {"randn": "out", "_copy_kernel": "dst"}
SHAPES = ((2, 3), (1, 5), (3, 1, 4), (32,), (2, 1500), (0, 3), (2, 0), (), (1, 1))
NUMBERS = (0, 1, 2, 3, 4, -1, 2**31, 2**32, 2**63 - 1, -(2**63))


@dataclass(frozen=True)
class Plan:
    """One call of a binding, and its mutations."""

    binding: str
    dtype: str
    shape: tuple[int, ...]
    #: A second shape, for whatever has to match the first.
    other: tuple[int, ...]
    #: The integers of the call, in turn.
    numbers: tuple[int, ...]
    fraction: float = 0.5
    flag: bool = False
    second: bool = False
    changes: tuple[tuple[str, str], ...] = ()
    #: The elements by which the second tensor lies further than the first's, in the first's memory.
    over: int | None = None


def build(plan: Plan) -> dict[str, Any]:
    dtype = getattr(torch, plan.dtype)
    a, b = ((torch.arange(float(torch.Size(s).numel())).reshape(s) - 1).to(dtype) for s in (plan.shape, plan.other))
    batch = plan.other[0] if plan.other else 1
    n = (*plan.numbers,) * 2
    a = in_a_room(a, 4).reshape(a.shape)
    if plan.over is not None and (plan.over + 4 + b.numel()) * b.element_size() <= a.untyped_storage().nbytes():
        b = torch.empty(0, dtype=dtype).set_(a.untyped_storage(), 4 + plan.over, b.shape)
    arguments: dict[str, Any] = {
        "out": a, "seeds": torch.arange(batch) - 1, "steps": torch.arange(batch) + 2**32 if plan.second else None,
        "step": n[0], "purpose": n[1], "kind": n[0], "x": a, "y": b if plan.second else None,
        "correction": plan.fraction, "low": n[0], "weight": plan.fraction, "absolute": plan.flag,
        "src": a, "dst": b, "streaming": plan.flag,
    }  # fmt: skip
    arguments = {name: arguments[name] for name in ARGUMENTS[plan.binding]}
    unreadable: set[str] = set()
    for slot, change in plan.changes:
        value = arguments.get(slot)
        if change in OTHER_CHANGES and slot in arguments:
            arguments[slot] = OTHER_CHANGES[change]
        elif isinstance(value, Tensor) and change in TENSOR_CHANGES and type(value) is Tensor:
            if slot in unreadable:
                continue  # torch itself would read what is not there
            if change in UNREADABLE:
                unreadable.add(slot)
            try:
                arguments[slot] = TENSOR_CHANGES[change](value)
            except Exception:  # torch has no such tensor of this dtype or shape: the good one stays
                continue
    return arguments


def outcome(plan: Plan) -> str:
    assert backends.extension is not None
    arguments = build(plan)
    unreadable = {change for _, change in plan.changes} & UNREADABLE
    tensors = {name: value for name, value in arguments.items() if isinstance(value, Tensor)}
    memory = Memory(tensors.values())
    clean = {} if unreadable else {name: copy_of(value) for name, value in arguments.items()}
    stream = () if plan.binding == "_copy_kernel" else (0,)
    try:
        result = getattr(backends.extension, plan.binding)(*arguments.values(), *stream)
    except SystemError:
        raise
    except Exception as error:
        result, word = None, type(error).__name__
    else:
        word = "declined" if result is None and plan.binding not in WRITTEN else "result"
    written = tensors.get(WRITTEN.get(plan.binding, ""))
    changed = memory.changed_outside([written] if word == "result" and written is not None else [])
    assert changed == 0, f"{word}: {changed} bytes outside of the output were written"
    if word == "result" and not unreadable:
        _hold(plan.binding, clean, result, written)
    return word


def _hold(binding: str, clean: dict[str, Any], result: Any, written: Tensor | None) -> None:
    """Assert that a result equals the reference's, or for the copy its source if the tensors do not overlap."""
    if binding == "randn":
        assert written is not None
        if clean["seeds"].numel() * clean["out"].numel() == 0:
            return
        count, mask = clean["seeds"].numel(), 2**32 - 1
        step = int(clean["step"]) & mask if clean["steps"] is None else clean["steps"].reshape(-1) & mask
        expected = fastdiff.randn(
            (count, written.numel() // count), clean["seeds"].reshape(-1), step, int(clean["purpose"]) & mask,
            dtype=written.dtype, backend="reference",
        )  # fmt: skip
        assert_same_bits([copy_of(written).reshape(-1)], [expected.reshape(-1)])
    elif binding == "sum":
        kind, x = int(clean["kind"]), clean["x"]
        assert result.shape == x.shape[:1]
        if kind == 0 and x.dtype == torch.float64 and bool(torch.isfinite(x).all()):
            # Whole numbers of up to 1500, which float64 adds exactly in any order; the division rounds once.
            assert torch.equal(result, x.reshape(len(x), -1).sum(1) / x[0].numel())
    elif binding == "quantile":
        x, low = clean["x"].reshape(len(clean["x"]), -1), int(clean["low"])
        x = x.abs() if clean["absolute"] else x
        if clean["weight"] == 0 and not x.isnan().any():
            assert torch.equal(result.to(x.dtype), x.sort(dim=1).values[:, low])


SERVER = Server(__file__)
needs_extension = pytest.mark.skipif(backends.extension is None, reason="the C++ extension was not built")
SLOTS = sorted({name for names in ARGUMENTS.values() for name in names})
PLANS = st.builds(
    Plan,
    binding=st.sampled_from(sorted(ARGUMENTS)),
    dtype=st.sampled_from(("float16", "bfloat16", "float32", "float64", "int64", "uint8")),
    shape=st.sampled_from(SHAPES),
    other=st.sampled_from(SHAPES),
    numbers=st.lists(st.sampled_from(NUMBERS), min_size=1, max_size=2).map(tuple),
    fraction=st.sampled_from((0.0, 0.5, 1.0, -1.0, 1e300, float("inf"), float("nan"))),
    flag=st.booleans(),
    second=st.booleans(),
    changes=st.lists(
        st.tuples(st.sampled_from(SLOTS), st.sampled_from(sorted({**TENSOR_CHANGES, **OTHER_CHANGES}))), max_size=2
    ).map(tuple),
    over=st.one_of(st.none(), st.integers(-4, 4)),
)  # fmt: skip


@needs_extension
@settings(max_examples=4 * settings().max_examples)
@given(plan=PLANS, same=st.booleans())
def test_any_call_of_any_binding_returns_or_is_refused(plan: Plan, same: bool) -> None:
    answer = SERVER.ask(replace(plan, other=plan.shape) if same else plan)
    assert not answer.startswith("failed"), answer


@needs_extension
@pytest.mark.parametrize("binding", sorted(ARGUMENTS))
def test_valid_call_returns_and_every_mutation_returns_or_is_refused(binding: str) -> None:
    good = Plan(binding, "float32", (2, 16), (2, 16), (3,), second=True)
    assert SERVER.ask(good) == "result"
    for change in sorted(TENSOR_CHANGES):
        for slot in ARGUMENTS[binding]:
            answer = SERVER.ask(replace(good, changes=((slot, change),)))
            assert not answer.startswith("failed"), f"{slot} {change}: {answer}"
            if change in ("freed", "cut") and slot in ("x", "y", "src", "dst", "out", "seeds", "steps"):
                assert answer != "result", f"{slot} {change}"


@needs_extension
@pytest.mark.parametrize("numbers", [(0,), (3,), (4,), (-1,), (2**32,), (2**63 - 1,), (-(2**63),)])
def test_unknown_sum_and_rank_out_of_range_are_declined(numbers: tuple[int]) -> None:
    (number,) = numbers
    x = torch.arange(6.0).reshape(2, 3)
    kinds = {0: None, 3: x}
    for y in (None, x):
        done = backends.extension.sum(number, x, y, 0.0, 0)  # type: ignore[union-attr]
        assert (done is not None) == (number in kinds and (kinds[number] is None) == (y is None))
    for weight in (0.0, 0.5):
        done = backends.extension.quantile(x, number, weight, False, 0)  # type: ignore[union-attr]
        assert (done is not None) == (number == 0)


@needs_extension
@pytest.mark.parametrize("held", [0, 3])
def test_reductions_report_freed_storage(held: int) -> None:
    x, y = torch.ones(2, 4), torch.ones(2, 4)
    y.untyped_storage().resize_(held * 4)
    for call in (lambda: ops.mean(y), lambda: ops.quantile(y, 0.5), lambda: ops.dot(x, y)):
        with pytest.raises(ValueError, match=rf"^\w+: [xy] has a storage of {4 * held} bytes, expected the 32 that "):
            call()


if __name__ == "__main__":
    serve(Plan, outcome)
