# SPDX-License-Identifier: MIT
"""Reductions as operators: opcheck, gradients, torch.compile, refusals."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastdiff import ops
from support.oracle import assert_same_bits
from support.reduction_cases import KINDS, QUANTILES, SEEDS, SPREADS, by_torch, call, numbers

# --- Operators and gradients -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*KINDS, "quantile"])
@pytest.mark.parametrize("backend", ["", "reference"])
def test_operators_pass_opcheck(kind: str, backend: str) -> None:
    for dtype, grad in ((torch.float32, True), (torch.float16, False), (torch.float64, True)):
        x, y = (numbers(i, (2, 3, 5), dtype).requires_grad_(grad) for i in range(2))
        extra: dict[str, tuple[Any, ...]] = {"dot": (y,), "std": (0.5,), "quantile": (0.3, True)}
        operator = getattr(torch.ops.fastdiff, kind).default
        torch.library.opcheck(operator, (x, *extra.get(kind, ()), backend))


@pytest.mark.parametrize("backend", [None, "reference"])
def test_gradients_match_finite_differences(backend: str | None) -> None:
    x, y = (numbers(i, (2, 3, 5), torch.float64).requires_grad_() for i in range(2))
    for kind in KINDS:
        assert torch.autograd.gradcheck(lambda a, b, k=kind: call(k, a, b, 0.5, backend=backend), (x, y))
    for q, absolute in ((0.3, False), (0.3, True), (1.0, False)):
        assert torch.autograd.gradcheck(lambda a, q=q, m=absolute: ops.quantile(a, q, m, backend=backend), (x,))


@settings(max_examples=40)
@given(seed=SEEDS, q=QUANTILES, absolute=st.booleans(), spread=SPREADS, nan=st.booleans())
def test_quantile_gradient_matches_torch(seed: int, q: float, absolute: bool, spread: str, nan: bool) -> None:
    x = numbers(seed, (3, 50), torch.float32, spread)
    if nan:
        x[1, 7] = math.nan
    mine, theirs = (x.clone().requires_grad_() for _ in range(2))
    ops.quantile(mine, q, absolute).backward(torch.tensor([1.0, 2.0, -3.0]))
    by_torch(theirs, q, absolute).backward(torch.tensor([1.0, 2.0, -3.0]))
    # lerp's own gradient is grad·(1 − weight) and grad·weight, each rounded once or twice.
    assert torch.allclose(mine.grad, theirs.grad, rtol=4 * 2.0**-24, atol=0.0, equal_nan=True)  # type: ignore[arg-type]


def test_constant_samples_have_zero_gradient() -> None:
    for kind, value in (("std", 2.0), ("norm", 0.0)):
        x = torch.full((2, 4), value, requires_grad=True)
        call(kind, x, x).sum().backward()
        assert torch.equal(x.grad, torch.zeros(2, 4))  # type: ignore[arg-type]


def test_reductions_compile_to_one_graph() -> None:
    def all_of_them(x: Tensor, y: Tensor) -> list[Tensor]:
        return [*(call(kind, x, y) for kind in KINDS), ops.quantile(x, 0.9, True)]

    compiled = torch.compile(all_of_them, fullgraph=True, backend="aot_eager")
    for dtype in (torch.float16, torch.float32):
        x, y = (numbers(i, (2, 3, 40), dtype) for i in range(2))
        assert_same_bits(compiled(x, y), all_of_them(x, y))
    x = numbers(0, (2, 3, 40), torch.float32).requires_grad_()
    (expected,) = torch.autograd.grad(sum(t.sum() for t in all_of_them(x, x)), x)
    (got,) = torch.autograd.grad(sum(t.sum() for t in compiled(x, x)), x)
    assert torch.equal(got, expected)


# --- Refusals --------------------------------------------------------------------------------------------------------

X = torch.ones(2, 3)


@pytest.mark.parametrize(
    ("run", "error", "message"),
    [
        (lambda: ops.mean(torch.tensor(1.0)), ValueError, r"mean: x has no dimension, expected \[B, \.\.\.\]"),
        (lambda: ops.norm([1.0]), TypeError, "norm: x is a list, expected a torch.Tensor"),
        (
            lambda: ops.std(torch.ones(2, dtype=torch.int64)),
            TypeError,
            "std: x has dtype torch.int64, expected float16",
        ),
        (lambda: ops.std(X, math.nan), ValueError, "std: correction is nan"),
        (lambda: ops.std(X, "1"), TypeError, "std: correction has type str"),
        (lambda: ops.quantile(X, 1.5), ValueError, "quantile: q is 1.5, expected 0 to 1"),
        (lambda: ops.quantile(X, -0.1), ValueError, "quantile: q is -0.1"),
        (lambda: ops.quantile(X, math.nan), ValueError, "quantile: q is nan"),
        (lambda: ops.quantile(X, torch.tensor(0.5)), TypeError, "quantile: q has type Tensor"),
        (lambda: ops.quantile(torch.ones(2, 0), 0.5), ValueError, r"quantile: x has shape \[2, 0\]"),
        (lambda: ops.dot(X, None), TypeError, "dot: y is a NoneType, expected a torch.Tensor"),
        (lambda: ops.dot(X, X[:, :2]), ValueError, r"dot: y has shape \[2, 2\], expected \[2, 3\] like x"),
        (lambda: ops.dot(X, X.double()), TypeError, "dot: y has dtype torch.float64, expected torch.float32 like x"),
        (lambda: ops.mean(X, backend="abacus"), ValueError, "backend is 'abacus'"),
        (lambda: ops.norm(X, backend="cuda"), RuntimeError, "norm: backend 'cuda' was asked for and is missing"),
    ],
)
def test_invalid_arguments_are_refused_with_one_sentence(run: Any, error: type[Exception], message: str) -> None:
    if "'cuda'" in message and torch.cuda.is_available():
        pytest.skip("the backend is not missing here")
    with pytest.raises(error, match=message):
        run()


def test_integer_quantile_is_accepted() -> None:
    assert ops.quantile(X, 1).tolist() == [1.0, 1.0]
