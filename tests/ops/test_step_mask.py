# SPDX-License-Identifier: MIT
"""A mask blends prev_sample with the row's second kept map in the same pass, on every backend."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastdiff import ops
from fastdiff.ops import backends
from fastdiff.row_layout import STORE_0, STORE_1
from support.oracle import (
    DTYPES,
    Case,
    Shape,
    assert_same_bits,
    assert_within_rounding,
    available_backends,
    cases,
    device_of,
    make,
    plain_row,
)  # fmt: skip

BACKENDS = available_backends()
needs_extension = pytest.mark.skipif(backends.extension is None, reason="the C++ extension was not built")


def examples(backend: str, count: int) -> settings:
    if backend == "triton":  # interpreted, a call takes 20 ms
        return settings(max_examples=4, phases=[Phase.explicit, Phase.reuse, Phase.generate])
    return settings(max_examples=count)


def mask_of(plan: Shape, dtype: torch.dtype) -> Tensor:
    """Return a mask with a third each of 0, of 1 and of values in between."""
    gen = torch.Generator().manual_seed(plan.seed)
    kind, soft = torch.randint(3, plan.shape, generator=gen), torch.rand(plan.shape, generator=gen)
    return torch.where(kind == 2, soft, kind.float()).to(dtype)


def arguments_of(case: Case) -> dict[str, Any]:
    given_ = {
        f.name: getattr(case, f.name) for f in fields(case) if f.name not in ("unused", "keeps", "guidance", "mask")
    }
    return {**given_, "row_index": 0, "guidance_scale": case.guidance}


def masked(case: Case, mask: Tensor, backend: str | None, keeps: int = 1, **more: Any) -> tuple[Tensor, ...]:
    with torch.no_grad():
        return ops.step(**arguments_of(case), keeps=keeps, mask=mask, backend=backend, **more)


@pytest.mark.checks_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_blend_equals_formula(backend: str, dtype: torch.dtype) -> None:
    @examples(backend, 25)
    @given(plan=cases([dtype]), wide_mask=st.booleans(), keeps=st.integers(0, 1))
    def check(plan: Shape, wide_mask: bool, keeps: int) -> None:
        case = make(replace(plan, keeps=2)).to(device_of(backend))
        compute = case.table.dtype
        mask = mask_of(plan, torch.float32 if wide_mask and compute == torch.float32 else dtype).to(case.sample.device)
        got = masked(case, mask, backend, keeps)
        assert_within_rounding(replace(case, mask=mask, keeps=keeps), got, backend)

    check()


@pytest.mark.checks_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_hard_mask_selects_bits(backend: str, dtype: torch.dtype) -> None:
    @examples(backend, 20)
    @given(plan=cases([dtype]), keeps=st.integers(0, 1))
    def check(plan: Shape, keeps: int) -> None:
        case = make(replace(plan, keeps=2)).to(device_of(backend))
        mask = mask_of(plan, dtype).round().to(case.sample.device)
        prev, kept, target = case.run(backend)
        got = masked(case, mask, backend, keeps)
        assert_same_bits(got, [torch.where(mask == 1, target, prev), kept][: keeps + 1])

    check()


@pytest.mark.checks_backend
@pytest.mark.parametrize("backend", BACKENDS)
def test_hard_mask_ignores_what_is_not_finite(backend: str) -> None:
    device = device_of(backend)
    x = torch.tensor([[1.0, float("inf"), 2.0, float("nan")]], device=device)
    known = torch.tensor([[float("nan"), 5.0, -0.0, -0.0]], device=device)
    mask = torch.tensor([[0.0, 1.0, 1.0, 1.0]], device=device)
    table = plain_row(prev_x=2.0, k1_h2=1.0).to(device)
    (got,) = ops.step(x, x, table, 0, history=[None, None, known], mask=mask, backend=backend)
    # A sum begins at +0, so −0 becomes +0, as in every output.
    assert_same_bits([got], [torch.tensor([[2.0, 5.0, 0.0, 0.0]], device=device)])


@pytest.mark.checks_backend
@pytest.mark.parametrize("channels_last", [False, True], ids=["row-major", "channels-last"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_masked_rows_write_history_and_skip(backend: str, channels_last: bool) -> None:
    device, shape = device_of(backend), (4, 3, 5, 7)
    memory = torch.channels_last if channels_last else torch.contiguous_format
    x, c, u, h, known, eps = (torch.randn(shape).to(device, memory_format=memory) for _ in range(6))
    mask = torch.rand(shape).mul(3).sub(1).clamp(0, 1).to(device, memory_format=memory)
    table = torch.randn(3, 32)
    table[:, 2], table[:, STORE_0], table[:, STORE_1], table[:, 5] = 0.9, 0, -1, 0.5
    table[1, STORE_0] = -1
    table, rows = table.to(device), torch.tensor([2, -1, 0, 1], device=device)
    scale, seeds = torch.tensor([1.0, 2.0, 3.0, 4.0], device=device), torch.tensor([1, 2, 3, 4], device=device)
    history, model_input = [h.clone(), None, known, eps], torch.empty_like(torch.cat([x, x]))
    got = ops.step_rows(
        x, c, table, rows, history, uncond=u, guidance_scale=scale, seeds=seeds, noise_step=7, mask=mask,
        threshold=scale, model_input=model_input, backend=backend,
    )  # fmt: skip
    assert_same_bits([got[1], history[0][1], model_input[1], model_input[5]], [x[1], h[1], x[1], x[1]])
    for i in (0, 2, 3):
        one = slice(i, i + 1)
        prev, kept = ops.step(
            x[one], c[one], table, int(rows[i]), uncond=u[one], guidance_scale=scale[one], seeds=seeds[one],
            noise_step=7, mask=mask[one], threshold=scale[one], keeps=1, backend=backend,
            history=[h[one], None, known[one], eps[one]],
        )  # fmt: skip
        assert_same_bits([got[one], history[0][one]], [prev, h[one] if i == 3 else kept])
        assert_same_bits([model_input[one], model_input[i + 4 : i + 5]], [0.5 * prev] * 2)


@pytest.mark.checks_backend
@pytest.mark.parametrize("backend", BACKENDS)
def test_mask_may_be_a_view_and_output_may_lie_on_it(backend: str) -> None:
    device = device_of(backend)
    x, c, known = (torch.randn(2, 3, 4, device=device) for _ in range(3))
    thin = torch.rand(2, 1, 4, device=device)
    table = plain_row(prev_x=0.5, prev_m=0.25, k1_h3=2.0).to(device)
    call: dict[str, Any] = {"table": table, "row_index": 0, "history": [None, None, None, known], "backend": backend}
    expected = ops.step(x, c, mask=thin.expand_as(x).contiguous(), **call)
    assert_same_bits(ops.step(x, c, mask=thin.expand_as(x), **call), expected)
    for target in ("sample", "mask"):
        own = {"sample": x.clone(), "mask": thin.expand_as(x).clone()}
        (got,) = ops.step(model_output=c, **own, **call, out=[own[target]])
        assert got is own[target]
        assert_same_bits([got], expected)


@needs_extension
def test_masked_step_is_taken_by_the_extension_at_once() -> None:
    x, c, known = torch.randn(3, 2, 5)
    found = backends.extension.step(  # type: ignore[union-attr]
        sample=x, model_output=c, table=plain_row(k1_h2=1.0), row_index=0, history=[None, None, known],
        mask=torch.ones(2, 5), out=[x],
    )  # fmt: skip
    assert_same_bits(found, [known])


#: Maps of prev_sample and of a kept output, and of the target, of loops with compiled and with run-time terms.
BLENDED = (
    ("x", "", "h0 h1"), ("x m", "", "h2 h3"), ("x m", "", "h2"), ("x d", "", "h2 h3"), ("x m h0", "", "h2 h3"),
    ("x d z", "d", "h1 h3"), ("x m h0 h1", "x m", "h2 h3"), ("x d h0 h1", "d", "h2 h3"), ("x m h2", "m", "h2 h3"),
    ("x m h0", "x m", "x h1 z"), ("d", "x", "m z"),
)  # fmt: skip


@needs_extension
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("prev", "kept", "target"), BLENDED)
def test_every_loop_blends_alike(prev: str, kept: str, target: str, dtype: torch.dtype) -> None:
    weights, maps = iter(torch.randn(32).tolist()), (("prev", prev), ("k0", kept), ("k1", target))
    terms = {f"{output}_{column}": next(weights) for output, columns in maps for column in columns.split()}
    table = plain_row(dtype, p=next(weights), q=next(weights), clip=0.7, **terms)
    keeps, shape = int(kept != ""), (2, 577)  # more than a tile, vectors and single numbers
    case = replace(make(Shape(1, dtype, shape, "a sample", 15, True)), table=table, keeps=keeps)
    for guided in (case, replace(case, uncond=None, guidance=None)):
        mask = mask_of(Shape(2, torch.float32, shape), torch.bfloat16).half()  # exact in every dtype
        got = masked(guided, mask.to(dtype), "cpu", keeps)
        assert_within_rounding(replace(guided, mask=mask.to(dtype)), got, "cpu")
        if dtype != torch.float16:  # a mask of another dtype is converted in tiles
            assert_same_bits(masked(guided, mask, "cpu", keeps), got)
        above = backends.extension._nontemporal_above(0)  # type: ignore[union-attr]
        try:
            assert_same_bits(masked(guided, mask.to(dtype), "cpu", keeps), got)
        finally:
            backends.extension._nontemporal_above(above)  # type: ignore[union-attr]
        # Output on the input, as in a loop.
        last = guided.sample.clone()
        out = [last, torch.empty_like(last)][: keeps + 1]
        on_input = masked(replace(guided, sample=last), mask.to(dtype), "cpu", keeps, out=out)
        assert_same_bits(on_input, got)


@pytest.mark.parametrize("backend", [b for b in BACKENDS if isinstance(b, str)])
def test_gradients_equal_numerical_ones(backend: str) -> None:
    shape = (3, 2)
    x, c, u, h, known, z = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for _ in range(6))
    scale = torch.tensor([0.5, 2.0, -1.0], dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[0.0, 1.0], [0.25, 0.75], [1.0, 0.5]], dtype=torch.float64)
    table = torch.randn(2, 32, dtype=torch.float64)
    table[:, 2] = 1e9

    def step(*tensors: Tensor) -> tuple[Tensor, ...]:
        x, c, u, scale, h, known, z = tensors
        return ops.step(
            x, c, table, torch.tensor([1, 0, -1]), uncond=u, guidance_scale=scale, history=[h, None, known], noise=z,
            mask=mask, keeps=1, backend=backend,
        )  # fmt: skip

    assert torch.autograd.gradcheck(step, (x, c, u, scale, h, known, z), fast_mode=True)


def test_compiled_masked_step_equals_eager() -> None:
    x, c, known = torch.randn(3, 2, 3, 4)
    mask, table = torch.rand(2, 3, 4).round(decimals=1), plain_row(prev_x=0.5, prev_m=0.3, k1_h2=0.9, k1_x=0.1)

    def step(x: Tensor, c: Tensor, mask: Tensor) -> Tensor:
        return ops.step(x, c, table, 0, history=[None, None, known], mask=mask)[0] * 2

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert_same_bits([compiled(x, c, mask)], [step(x, c, mask)])


def test_malformed_masks_are_refused() -> None:
    x, table = torch.randn(2, 3, 4), torch.stack([plain_row()[0]] * 2)
    table[1, STORE_1] = 0
    for mask, kind, message in (
        (torch.ones(2, 1, 4), ValueError, r"mask has shape \[2, 1, 4\], .*expand_mask\(mask, sample\)"),
        (torch.ones(2, 3, 4, dtype=torch.bool), TypeError, r"mask has dtype torch.bool"),
        (torch.ones(2, 3, 4, dtype=torch.float64), TypeError, r"mask has dtype torch.float64"),
        (torch.ones(2, 3, 4, device="meta"), ValueError, r"mask is on meta"),
        (torch.ones(2, 3, 4, requires_grad=True), ValueError, r"mask requires grad"),
        ([1.0], TypeError, r"mask is a list"),
    ):
        with pytest.raises(kind, match="^step: " + message):
            ops.step(x, x, table, 0, mask=mask)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"mask is given beside two kept outputs, .* second pass"):
        ops.step(x, x, table, 0, mask=torch.ones_like(x), keeps=2)
    before, history = x.clone(), [torch.zeros_like(x)]
    with pytest.raises(ValueError, match=r"mask is given, expected none where a row stores a second kept output"):
        ops.step_rows(x, x, table, torch.tensor([0, 1]), history, mask=torch.ones_like(x), out=x)
    assert_same_bits([x, history[0]], [before, torch.zeros_like(x)])
