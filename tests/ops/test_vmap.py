# SPDX-License-Identifier: MIT
"""torch.func over the step: vmap equals a loop bitwise, grad equals autograd, and refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad, jacrev, vjp, vmap

import fastdiff
from fastdiff import ops
from fastdiff.ops import backends
from fastdiff.ops.call import STEP_NAMES, StepCall, operator_values
from support.oracle import DTYPES, assert_same_bits, plain_row

pytestmark = pytest.mark.skipif(backends.extension is None, reason="the C++ extension was not built")
SIZE, SHAPE = 4, (2, 3, 5)


def tables(*shape: int, clip: float = 0.8) -> Tensor:
    table = torch.randn(*shape, 3, 32)
    table[..., 2], table[..., 6:8] = clip, -1
    return table


#: One argument beside the sample and the model's output: its value, and the dimension that is mapped, or None.
ARGUMENTS: dict[str, dict[str, tuple[Any, int | None]]] = {
    "nothing": {},
    "history at dim 2": {"h": (torch.randn(2, 3, SIZE, 5), 2)},
    "noise not mapped": {"noise": (torch.randn(SHAPE), None)},
    "one scale": {"guidance_scale": (torch.tensor([2.0]), None)},
    "a scale a sample": {"guidance_scale": (torch.tensor([2.0, -1.0]), None)},
    "a scale a call": {"guidance_scale": (torch.randn(SIZE), 0)},
    "a scale a call and sample": {"guidance_scale": (torch.randn(2, SIZE), 1)},
    "thresholds": {"threshold": (torch.rand(2) + 0.3, None)},
    "thresholds a call": {"threshold": (torch.rand(SIZE, 2) + 0.3, 0)},
    "one row": {"row_index": (torch.tensor([2]), None)},
    "a row a sample": {"row_index": (torch.tensor([2, -1]), None)},
    "a row a call": {"row_index": (torch.tensor([0, 2, -1, 1]), 0)},
    "seeds": {"seeds": (torch.tensor([3, 4]), None)},
    "seeds a call, steps a call": {"seeds": (torch.arange(8).reshape(SIZE, 2), 0), "noise_step": (torch.arange(4), 0)},
    "a mask": {"mask": (torch.rand(2, SIZE, 3, 5).round(decimals=0), 1)},
    "a mask not mapped": {"mask": (torch.rand(SHAPE), None)},
    "parts": {"row_index": (torch.tensor([[2, -1, 0], [0, 1, 2]]), None), "seeds": (torch.tensor([3, 4]), None)},
    "parts a call": {
        "row_index": (torch.randint(-1, 3, (2, SIZE, 3)), 1),
        "seeds": (torch.arange(8).reshape(SIZE, 2), 0),
        "noise_step": (torch.arange(6).reshape(2, 3), None),
        "guidance_scale": (torch.randn(2), None),
    },
    "tables and rows of parts": {
        "table": (tables(SIZE), 0),
        "row_index": (torch.tensor([[2, -1, 0], [0, 1, 2]]), None),
    },
    "tables": {"table": (tables(SIZE), 0)},
    "tables and rows": {"table": (tables(SIZE), 0), "row_index": (torch.tensor([2, -1]), None)},
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_mapped_step_equals_loop_of_steps(name: str) -> None:
    given = ARGUMENTS[name]
    names = ["sample", "model_output", *given]
    values = [torch.randn(SIZE, *SHAPE), torch.randn(*SHAPE), *(value for value, _ in given.values())]
    dims: list[int | None] = [0, None, *(dim for _, dim in given.values())]
    table = tables()

    def step(*arguments: Tensor) -> tuple[Tensor, ...]:
        call: dict[str, Any] = {"table": table, "row_index": 1, **dict(zip(names, arguments, strict=True))}
        if "guidance_scale" in call:
            call["uncond"] = call["sample"] * 0.5
        call["history"] = [call.pop("h", None)]
        return ops.step(keeps=1, **call)

    mapped = vmap(step, tuple(dims))(*values)
    one_by_one = [
        step(*(v if dim is None else v.select(dim, i) for v, dim in zip(values, dims, strict=True)))
        for i in range(SIZE)
    ]
    assert_same_bits(mapped, [torch.stack(results) for results in zip(*one_by_one, strict=True)])


def test_zero_dimensional_samples_and_two_mapped_dimensions_work() -> None:
    x, m, table = torch.randn(4, 5), torch.randn(4, 5), tables()
    threshold = torch.tensor([0.5])
    step = lambda x, m: ops.step(x, m, table, 1, threshold=threshold)[0]  # noqa: E731
    expected = ops.step(x, m, table, 1, threshold=torch.full((4,), 0.5))[0]
    assert_same_bits([vmap(vmap(step))(x, m)], [expected])


@pytest.mark.parametrize("copies", [1, 2])
def test_model_input_of_operator_is_mapped(copies: int) -> None:
    x, table = torch.randn(SIZE, *SHAPE), tables()

    def step(x: Tensor) -> list[Tensor]:
        call = StepCall(sample=x, model_output=x, table=table, row_index=1)
        given = dict(zip(STEP_NAMES, operator_values(call, ""), strict=True))
        given |= {"model_input_dtype": torch.float16, "model_input_copies": copies}
        return torch.ops.fastdiff.step(*given.values())  # type: ignore[no-any-return]

    assert_same_bits(vmap(step)(x), [torch.stack(r) for r in zip(*(step(one) for one in x), strict=True)])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mapped_noise_equals_loop(dtype: torch.dtype) -> None:
    seeds, step = torch.arange(6).reshape(3, 2), torch.arange(3)
    draw = lambda seeds, step: fastdiff.randn((2, 3, 5), seeds, step, dtype=dtype)  # noqa: E731
    expected = torch.stack([draw(a, b) for a, b in zip(seeds, step, strict=True)])
    assert_same_bits([vmap(draw)(seeds, step)], [expected])


def test_step_rows_with_registers_is_refused_with_alternative() -> None:
    table, rows, register = plain_row(prev_x=1.0), torch.tensor([0, 0]), torch.zeros(2, 3)
    with pytest.raises(
        RuntimeError, match=r"^step_rows: history is written in place and vmap .* ops\.step\(row_index="
    ):
        vmap(lambda x: ops.step_rows(x, x, table, rows, [register]))(torch.ones(4, 2, 3))


# --- Derivatives -----------------------------------------------------------------------------------------------------


def loss(x: Tensor, m: Tensor, table: Tensor, backend: str | None = None) -> Tensor:
    (prev,) = ops.step(x, m, table, 1, uncond=x, guidance_scale=1.5, backend=backend)
    return prev.pow(3).sum()


@pytest.mark.parametrize("clip", [float("inf"), 0.8])
def test_grad_vjp_and_jacrev_match_autograd(clip: float) -> None:
    x, m = torch.randn(SHAPE, dtype=torch.float64, requires_grad=True), torch.randn(SHAPE, dtype=torch.float64)
    table = tables(clip=clip).double()
    (expected,) = torch.autograd.grad(loss(x, m, table), x)
    x = x.detach()
    found = [grad(loss)(x, m, table), vjp(lambda x: loss(x, m, table), x)[1](torch.ones(()).double())[0]]
    found.append(jacrev(loss)(x, m, table))
    for one in found:
        # The same operators on the same numbers, but for sums that vmap may add up in another order: 2⁻⁵³ each, of
        # fewer than 100 terms below 10⁴ (a cube's derivative).
        torch.testing.assert_close(one, expected, rtol=0.0, atol=100 * 1e4 * 2.0**-53)


@pytest.mark.parametrize("clip", [float("inf"), 0.8])
def test_second_derivatives_equal_reference(clip: float) -> None:
    x, m, table = torch.randn(SHAPE).double(), torch.randn(SHAPE).double(), tables(clip=clip).double()
    second = grad(lambda x, backend: grad(loss)(x, m, table, backend).square().sum())
    # As above, once more multiplied by numbers below 10⁴.
    torch.testing.assert_close(second(x, None), second(x, "reference"), rtol=0.0, atol=100 * 1e8 * 2.0**-53)


def test_per_sample_gradients_equal_separate_samples() -> None:
    x, m, table = torch.randn(SIZE, *SHAPE).double(), torch.randn(SIZE, *SHAPE).double(), tables().double()
    together = vmap(grad(loss), (0, 0, None))(x, m, table)
    alone = torch.stack([grad(loss)(a, b, table) for a, b in zip(x, m, strict=True)])
    torch.testing.assert_close(together, alone, rtol=0.0, atol=100 * 1e4 * 2.0**-53)


def test_forward_mode_is_refused_with_alternative() -> None:
    x, table = torch.ones(2, 3), plain_row(prev_x=3.0)
    with pytest.raises(RuntimeError, match=r"^step: sample carries a forward-mode tangent .* torch\.func\.vjp$"):
        torch.func.jvp(lambda x: ops.step(x, x, table, 0)[0], (x,), (x,))
    _, tangent = torch.func.jvp(lambda x: ops.step(x, x, table, 0, backend="reference")[0], (x,), (x,))
    assert torch.equal(tangent, 3 * x)


# --- Reductions and log-probabilities --------------------------------------------------------------------------------

REDUCTIONS: dict[str, tuple[Any, Any]] = {
    "mean": (ops.mean, lambda x: x.flatten(1).mean(1)),
    "std": (ops.std, lambda x: x.flatten(1).std(1)),
    "norm": (ops.norm, lambda x: x.flatten(1).square().sum(1).sqrt()),
    "dot": (lambda x: ops.dot(x, x.exp()), lambda x: (x * x.exp()).flatten(1).sum(1)),
    "quantile": (lambda x: ops.quantile(x, 0.3), lambda x: x.flatten(1).quantile(0.3, dim=1)),
    "gram": (lambda x: ops.gram([x, x.exp()])[:, 0, 1], lambda x: (x * x.exp()).flatten(1).sum(1)),
}


@pytest.mark.parametrize("name", REDUCTIONS)
@pytest.mark.filterwarnings("error:There is a performance drop")
def test_reductions_under_torch_func_equal_torch_and_single_calls(name: str) -> None:
    mine, theirs = REDUCTIONS[name]
    x, many = torch.randn(2, 3, dtype=torch.float64), torch.randn(2, 3, SIZE, 5)
    # Both are float64 with fewer than 100 roundings of numbers below 100.
    torch.testing.assert_close(jacrev(mine)(x), jacrev(theirs)(x), rtol=0.0, atol=1e-10)
    torch.testing.assert_close(jacrev(jacrev(mine))(x), jacrev(jacrev(theirs))(x), rtol=0.0, atol=1e-10)
    assert_same_bits([vmap(mine, 2)(many)], [torch.stack([mine(one) for one in many.unbind(2)])])
    for transform in (torch.func.hessian, lambda f: lambda x: torch.func.jvp(f, (x,), (x,))):
        with pytest.raises(RuntimeError, match=rf"^{name}: .* carries a forward-mode tangent .* torch\.func\.vjp$"):
            transform(mine)(x)


def test_log_prob_under_torch_func_equals_autograd_and_single_calls() -> None:
    prev, x, m = (torch.randn(SIZE, *SHAPE, dtype=torch.float64) for _ in range(3))
    table = tables(clip=float("inf")).double()

    def of(prev: Tensor, x: Tensor, m: Tensor) -> Tensor:
        return ops.log_prob(prev, x, m, table, 1)

    alone = [one.clone().requires_grad_() for one in (prev, x, m)]
    values = torch.stack([of(*one) for one in zip(*alone, strict=True)])
    expected = torch.autograd.grad(values.sum(), alone, create_graph=True)
    assert_same_bits([vmap(of)(prev, x, m)], [values.detach()])
    found = vmap(grad(lambda *t: of(*t).sum(), argnums=(0, 1, 2)))(prev, x, m)
    torch.testing.assert_close(found, tuple(e.detach() for e in expected), rtol=1e-12, atol=1e-12)
    with pytest.raises(RuntimeError, match=r"^log_prob: trying to differentiate twice, expected once; "):
        expected[0].sum().backward()
    with pytest.raises(RuntimeError, match=r"^log_prob: prev_sample carries a forward-mode tangent"):
        torch.func.jvp(lambda p: of(p, x[0], m[0]), (prev[0],), (prev[0],))
