# SPDX-License-Identifier: MIT
"""The recorder that proves which backend computed: it sees every backend at hand, and a fallback does not pass it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch

import fastdiff
from fastdiff import ops
from fastdiff.ops import backends, reference
from support.backend_used import answered
from support.oracle import backends_at_hand, device_of, plain_row

TESTS = Path(__file__).parents[1]
BACKENDS = backends_at_hand()
needs_extension = pytest.mark.skipif(backends.extension is None, reason="the C++ extension was not built")

# ------------------------------------------------------------------------------------------------------ the recorder


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_operation_is_recorded_as_the_backend_that_computes_it(backend: str) -> None:
    x = torch.randn(2, 70, device=device_of(backend))
    table, seeds = plain_row(prev_x=2.0, prev_z=1.0).to(x.device), torch.tensor([1, 2], device=x.device)
    table[:, 6:8] = -1.0  # the row keeps nothing
    rows = torch.tensor([0, 0], device=x.device)
    calls = [
        lambda: ops.step(x, x, table, 0, backend=backend),
        lambda: ops.step_rows(x, x, table, rows, seeds=seeds, backend=backend),
        lambda: ops.randn((2, 5), seeds, backend=backend),
        lambda: ops.quantile(x, 0.5, backend=backend),
        lambda: ops.dot(x, x, backend=backend),
        *(lambda kind=kind: getattr(ops, kind)(x, backend=backend) for kind in ("mean", "std", "norm")),
    ]
    for call in calls:
        with answered() as record:
            call()
        assert set(record.computed) == {backend}
        record.check(backend)


@needs_extension
def test_calls_that_name_no_backend_and_a_loop_are_recorded() -> None:
    x = torch.randn(2, 3, 4, 4)
    with answered() as record:
        ops.step(x, x, plain_row(prev_x=2.0), 0)
        ops.randn((2, 5), [1, 2])
        ops.norm(x)
    assert record.computed == {"cpu": 3}
    stepper = fastdiff.create_sampler("linear", "ddim", num_inference_steps=3).stepper()
    with answered() as record:
        while not stepper.done:
            x = stepper.step(x, x)
    assert record.computed == {"cpu": 3}


def test_nothing_is_left_behind() -> None:
    places = [(ops, "step"), (reference, "step"), (backends.extension, "sum")]
    before = [getattr(owner, name, None) for owner, name in places]
    with answered(), pytest.raises(TypeError):
        ops.step(None, None, None, 0)  # type: ignore[arg-type]
    assert all(getattr(owner, name, None) is value for (owner, name), value in zip(places, before, strict=True))


@needs_extension
def test_a_backend_that_falls_back_in_silence_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    # What a lazy implementation might do: hand the call of one backend to another.
    x = torch.randn(2, 70)
    monkeypatch.setattr(ops.reductions, "_run_sum", lambda kind, x, y, correction, backend: x.mean(1))
    by_name = backends.RUN["cpu"]
    monkeypatch.setitem(backends.RUN, "triton", lambda call: by_name(call))
    monkeypatch.setattr(backends, "why_missing", lambda name: "")
    monkeypatch.setattr(backends, "_serves", lambda name, device: True)
    with pytest.raises(AssertionError, match=r"step asked for triton and was computed by \['cpu'\]"), answered():
        ops.step(x, x, plain_row(prev_x=2.0), 0, backend="triton")
    with pytest.raises(AssertionError, match="mean asked for reference and was computed by nobody"), answered():
        ops.mean(x, backend="reference")
    with answered() as record:
        ops.norm(x)
    with pytest.raises(AssertionError, match=r"triton computed nothing; who did: \{'cpu': 1\}"):
        record.check("triton")


def test_empty_tensors_ask_nobody() -> None:
    with answered() as record:
        ops.step(torch.empty(0, 3), torch.empty(0, 3), plain_row(prev_x=2.0), 0, backend="reference")
        ops.mean(torch.empty(2, 0))
    assert set(record.computed) <= {"reference"}


# ------------------------------------------------------------------------------------- tests that need a GPU say so

#: What a test may ask of torch.cuda anywhere: whether there is a GPU at all.
ASKING = {"is_available"}


def uses_of_cuda(source: str) -> list[int]:
    """Lines on which torch.cuda is used outside of functions, classes and modules that are marked gpu."""
    found: list[int] = []

    def visit(node: ast.AST) -> None:
        if is_marked(node):
            return
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "torch.cuda" and node.attr not in ASKING:
            found.append(node.lineno)
        # `torch.cuda` itself may be handed to monkeypatch, which takes the name of what it replaces.
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(source))
    return found


def is_marked(node: ast.AST) -> bool:
    """Whether a module, a class or a function is marked gpu."""
    marks = list(getattr(node, "decorator_list", []))
    if isinstance(node, ast.Module):
        marks = [n.value for n in node.body if isinstance(n, ast.Assign) and _named(n.targets[0]) == "pytestmark"]
    return any("pytest.mark.gpu" in ast.unparse(mark) for mark in marks)


def _named(node: ast.AST) -> str:
    return node.id if isinstance(node, ast.Name) else ""


def test_no_test_uses_cuda_without_being_marked() -> None:
    files = sorted(TESTS.rglob("test_*.py"))
    assert len(files) > 30
    assert {file.name: lines for file in files if (lines := uses_of_cuda(file.read_text(encoding="utf-8")))} == {}


@pytest.mark.parametrize(
    ("source", "lines"),
    [
        ("def test():\n    torch.cuda.synchronize()", [2]),
        ("import torch\nx = torch.cuda.device_count()", [2]),
        ("@pytest.mark.gpu\ndef test():\n    torch.cuda.synchronize()", []),
        ("pytestmark = [pytest.mark.gpu, pytest.mark.slow]\ndef test():\n    torch.cuda.synchronize()", []),
        ("if torch.cuda.is_available():\n    torch.cuda.Stream()", [2]),
    ],
)
def test_what_counts_as_a_use(source: str, lines: list[int]) -> None:
    assert uses_of_cuda(source) == lines


@pytest.mark.parametrize("name", ["test_gpu.py", "test_gpu_loops.py", "test_gpu_reductions.py"])
def test_files_of_gpu_tests_are_marked_whole(name: str) -> None:
    assert is_marked(ast.parse((TESTS / "gpu" / name).read_text(encoding="utf-8")))
