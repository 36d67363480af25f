# SPDX-License-Identifier: MIT
"""`StepCall` declares each argument once: derived definitions, and the number of calls into C++."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastdiff
from fastdiff import ops
from fastdiff.ops import backends
from fastdiff.ops.call import (
    COUNTER_TENSORS,
    FIELDS,
    HISTORY_SLOTS,
    RESULT_DTYPES,
    STEP_ARGUMENTS,
    STEP_ROWS_ARGUMENTS,
    StepCall,
    call_of,
    named,
    operator_values,
    schema,
)
from support.oracle import assert_same_bits, plain_row
from support.recorded_operators import RecordedOperators

needs_extension = pytest.mark.skipif(backends.extension is None, reason="the C++ extension was not built")

#: Public arguments that are no field: they choose who runs the call, or are former names.
NOT_FIELDS = {"backend", "row", "rows", "registers", "guidance"}


# --- One declaration -------------------------------------------------------------------------------------------------


def test_every_field_has_role_and_documentation() -> None:
    roles = {"sample", "mask", "history", "table", "scalar", "counter", "option", "output"}
    for field in dataclasses.fields(StepCall):
        assert field.metadata["role"] in roles
        assert field.metadata["doc"].strip()


@needs_extension
def test_extension_reads_fields_and_launch_options() -> None:
    assert backends.extension.step_fields == (*FIELDS, "triton", "in_operator")  # type: ignore[union-attr]


@needs_extension
def test_missing_option_has_declared_default() -> None:
    # Noise depends on the purpose, a call that draws none of it on nothing that is left out.
    x, seeds, table = torch.randn(2, 5), torch.tensor([1, 2]), plain_row(prev_z=1.0, prev_x=0.5)
    least = {"sample": x, "model_output": x, "table": table, "row_index": 0, "seeds": seeds}
    call = StepCall(**least)  # type: ignore[arg-type]
    whole = {name: getattr(call, name) for name in FIELDS}
    step = backends.extension.step  # type: ignore[union-attr]
    assert_same_bits(step(**least), step(**whole))


def test_public_steps_accept_fields_by_name() -> None:
    step = set(inspect.signature(ops.step).parameters) - NOT_FIELDS
    assert step == set(FIELDS) - {"write_history", "parts"}
    assert set(inspect.signature(ops.step_rows).parameters) - NOT_FIELDS == step - {"keeps"}


@pytest.mark.parametrize(
    ("arguments", "operator"),
    [(STEP_ARGUMENTS, "step"), (STEP_ROWS_ARGUMENTS, "step_rows")],
    ids=["step", "step_rows"],
)
def test_operator_schema_matches_declaration(arguments: Any, operator: str) -> None:
    found = getattr(torch.ops.fastdiff, operator).default._schema
    assert [argument.name for argument in found.arguments] == [argument.name for argument in arguments]
    returns = "Tensor[]" if operator == "step" else "(Tensor, Tensor)"
    assert re.sub(r"\(a\d*!\)", "(a!)", str(found)) == f"fastdiff::{operator}{schema(arguments, returns)}"


@pytest.mark.parametrize("write_history", [False, True])
def test_call_round_trips_through_operator_values(write_history: bool) -> None:
    like = torch.randn(9, 2, 5).unbind()
    call = StepCall(
        sample=like[0],
        model_output=like[1],
        table=plain_row(),
        row_index=torch.tensor([0, -1]),
        uncond=like[2],
        guidance_scale=torch.tensor([2.0]),
        history=(like[3], None, like[4], None),
        variance=like[5],
        variance_kind=2,
        threshold=torch.tensor([1.0, 2.0]),
        keeps=0 if write_history else 2,
        seeds=torch.tensor([1, 2]),
        noise_step=7,
        purpose=3,
        write_history=write_history,
        out=(torch.float16,) if write_history else (torch.float16, None, torch.float64),
    )
    values = operator_values(call, "cpu")
    given = named(STEP_ROWS_ARGUMENTS if write_history else STEP_ARGUMENTS, values)
    again = call_of(given)
    assert given["backend"] == "cpu"
    for name in FIELDS:
        mine, theirs = getattr(call, name), getattr(again, name)
        same = mine is theirs or (not isinstance(mine, Tensor) and mine == theirs)
        assert same or all(a is b for a, b in zip(mine, theirs, strict=True)), name


def test_triton_kernel_takes_declared_tensors() -> None:
    pytest.importorskip("triton")
    source = Path(backends.__file__).parents[2] / "kernels" / "triton" / "step.py"
    if not source.exists():
        pytest.skip("the kernels' source is not beside the package")
    parameters = re.search(r"def _step_kernel\((.*?)\n\):", source.read_text(encoding="utf-8"), re.DOTALL)
    assert parameters is not None
    pointers = re.findall(r"^    (\w+)_ptr,", parameters.group(1), re.MULTILINE)
    tensors = [argument.name for argument in STEP_ARGUMENTS if argument.type in ("Tensor", "Tensor?")]
    results = [name.removesuffix("_dtype") for name in RESULT_DTYPES]
    assert pointers == [*tensors, *results, "model_input"]
    assert {*COUNTER_TENSORS.values(), *HISTORY_SLOTS} < set(pointers)


@pytest.mark.filterwarnings("default::DeprecationWarning")  # each call has several
def test_former_names_warn_and_work() -> None:
    x, table = torch.randn(2, 5), plain_row(prev_x=0.5, prev_m=2.0, prev_h0=1.0)
    rows, scale = torch.zeros(1, dtype=torch.int64), 3.0
    with pytest.warns(
        DeprecationWarning, match=r"^step: guidance is renamed to guidance_scale .*; pass guidance_scale="
    ):
        old = ops.step(x, x, table, row=0, uncond=x + 1, guidance=scale, history=[x])
    assert_same_bits(old, ops.step(x, x, table, 0, uncond=x + 1, guidance_scale=scale, history=[x]))
    with pytest.warns(DeprecationWarning, match=r"^step_rows: registers is renamed to history "):
        old_rows = ops.step_rows(x, x, table, rows=rows, registers=[x.clone()], uncond=x + 1, guidance=scale)
    assert_same_bits([old_rows], old)
    with pytest.raises(TypeError, match=r"^step: guidance is given beside guidance_scale, expected one of the two"):
        ops.step(x, x, table, 0, uncond=x, guidance=1.0, guidance_scale=1.0)
    stepper = fastdiff.create_sampler("linear", "ddim", num_inference_steps=2).stepper()
    with pytest.warns(DeprecationWarning, match=r"^step: guidance is renamed"):
        stepper.step(x, x, uncond=x, guidance=scale)


# --- How often a call reaches C++ ------------------------------------------------------------------------------------


@pytest.fixture
def offers(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Record the result of each call into C++: "run", or the reason why it was declined."""
    if backends.extension is None:
        pytest.skip("the C++ extension was not built")
    step, answers = backends.extension.step, []

    def recorded(**fields: Any) -> Any:
        answer = step(**fields)
        answers.append(answer if isinstance(answer, str) else "run")
        return answer

    monkeypatch.setattr(backends.extension, "step", recorded)
    return answers


X = torch.randn(2, 3, 5)
TABLE = plain_row(prev_x=0.5, prev_m=0.25, k0_x=1.0)


def transposed(tensor: Tensor) -> Tensor:
    return tensor.transpose(0, 2).contiguous().transpose(0, 2)


def under_a_mode(x: Tensor) -> Any:
    with RecordedOperators() as mode:
        result = ops.step(x, x, TABLE, 0)
    assert mode.names.count("fastdiff.step.default") == 1
    return result


KINDS: dict[str, tuple[Callable[[], Any], list[str]]] = {
    "plain": (lambda: ops.step(X, X, TABLE, 0), ["run"]),
    "plain, in place": (lambda: ops.step(y := X.clone(), y, TABLE, 0, out=[y]), ["run"]),
    "plain, a row a sample": (lambda: ops.step_rows(X, X, TABLE, torch.tensor([0, -1]), [X.clone()]), ["run"]),
    "another layout": (lambda: ops.step(X, transposed(X), TABLE, 0), ["layout", "run"]),
    "gaps": (lambda: ops.step(X[..., ::2], X[..., ::2], TABLE, 0), ["layout", "run"]),
    "kept outputs of skipped samples": (
        lambda: ops.step(X, X, TABLE, torch.tensor([0, -1]), keeps=1), ["argument", "run"]),
    "outputs over inputs": (
        lambda: ops.step(y := torch.randn(31)[:30].view(2, 3, 5), X, TABLE, 0, out=[y._base[1:].view(2, 3, 5)]),
        ["overlap", "run"]),
    "autograd": (lambda: ops.step(X.clone().requires_grad_(), X, TABLE, 0), ["autograd", "run"]),
    # Once more for the way that the extension records, which takes no other layout.
    "autograd, another layout": (
        lambda: ops.step(X.clone().requires_grad_(), transposed(X), TABLE, 0), ["autograd", "layout", "layout", "run"]),
    "a dispatch mode": (lambda: under_a_mode(X), ["modes", "run"]),
    "vmap": (lambda: torch.func.vmap(lambda x: ops.step(x, x, TABLE, 0)[0])(X), ["wrapper", "run"]),
    "a forced backend": (lambda: ops.step(X, X, TABLE, 0, backend="cpu"), ["run"]),
    "the reference": (lambda: ops.step(X, X, TABLE, 0, backend="reference"), []),
    "the operator": (lambda: torch.ops.fastdiff.step(*operator_values(
        StepCall(sample=X, model_output=X, table=TABLE, row_index=0), "")), ["run"]),
    "the operator, another layout": (lambda: torch.ops.fastdiff.step(*operator_values(
        StepCall(sample=X, model_output=transposed(X), table=TABLE, row_index=0), "")), ["layout", "run"]),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_call_reaches_extension_as_often_as_its_kind_needs(kind: str, offers: list[str]) -> None:
    call, expected = KINDS[kind]
    call()
    assert offers == expected


WRONG: dict[str, tuple[Callable[[], Any], str]] = {
    "no tensor": (lambda: ops.step([1.0], X, TABLE, 0), "argument"),  # type: ignore[arg-type]
    "nothing": (lambda: ops.step(None, None, None, 0), "argument"),  # type: ignore[arg-type]
    "a dtype": (lambda: ops.step(X.to(torch.int32), X, TABLE, 0), "dtype"),
    "the table's dtype": (lambda: ops.step(X.double(), X, TABLE, 0), "dtype"),
    "a shape": (lambda: ops.step(X, X[:1], TABLE, 0), "shape"),
    "a row": (lambda: ops.step(X, X, TABLE, 1), "value"),
    "a device": (lambda: ops.step(X, X.to("meta"), TABLE, 0), "device"),
    "a layout of no memory": (lambda: ops.step(X, X.to_sparse(), TABLE, 0), "layout"),
    "no scale": (lambda: ops.step(X, X, TABLE, 0, uncond=X), "argument"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_wrong_argument_is_declined_once_with_reason(kind: str, offers: list[str]) -> None:
    call, reason = WRONG[kind]
    with pytest.raises((TypeError, ValueError), match=r"^step: "):
        call()
    assert offers == [reason]


def test_loop_steps_reach_extension_once(offers: list[str]) -> None:
    stepper = fastdiff.create_sampler("linear", "dpm_solver", num_inference_steps=4).stepper()
    x = X
    while not stepper.done:
        x = stepper.step(x, X)
    assert offers == ["run"] * 4
    offers.clear()
    stepper = fastdiff.create_sampler("linear", "ddim", num_inference_steps=2).stepper()
    stepper.step(X, transposed(X))
    assert offers == ["layout", "run"]


@needs_extension
def test_declined_canonical_call_has_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends.extension, "step", lambda **fields: "storage")
    with pytest.raises(AssertionError, match=r"^step: the extension declined a canonical call \(storage\): StepCall\("):
        ops.step(X, X, TABLE, 0)


@needs_extension
@pytest.mark.parametrize("wrong", [{"positional": 1}, {"unknown": 1}], ids=["positional", "unknown"])
def test_binding_refuses_unknown_field(wrong: dict[str, Any]) -> None:
    step = backends.extension.step  # type: ignore[union-attr]
    if "positional" in wrong:
        with pytest.raises(TypeError, match=r"^step: got 1 positional arguments, expected keywords"):
            step(X)
        return
    with pytest.raises(TypeError, match=r"^step: got an unknown keyword 'unknown', expected a field of StepCall"):
        step(sample=X, model_output=X, table=TABLE, row_index=0, **wrong)
    # A name that was put together at run time is found by its letters.
    assert isinstance(step(**{"".join(["sam", "ple"]): X}, model_output=X, table=TABLE, row_index=0), tuple)
