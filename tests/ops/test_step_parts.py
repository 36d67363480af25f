# SPDX-License-Identifier: MIT
"""Numbers for each part of a sample, ``[B, T]`` over samples ``[B, T, ...]``, on every backend."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fastdiff
from fastdiff import ops
from fastdiff.ops import backends
from fastdiff.row_layout import MODEL_INPUT_SCALE, STORE_0, STORE_1
from support.oracle import DTYPES, assert_same_bits, available_backends, device_of, plain_row

BACKENDS = available_backends()
needs_extension = pytest.mark.skipif(backends.extension is None, reason="the C++ extension was not built")
#: Parts of whole chunks of noise, of none, and of several dimensions.
INNERS = [(8,), (5,), (3, 2, 2), (1,)]
B, T = 2, 3


def tables(dtype: torch.dtype, device: str) -> Tensor:
    table = torch.randn(4, 32, dtype=torch.float64)
    table[:, 2], table[:, MODEL_INPUT_SCALE] = 0.9, 0.5
    table[:, STORE_0], table[:, STORE_1] = torch.tensor([0.0, -1.0, 1.0, 0.0]), torch.tensor([-1.0, -1.0, 0.0, 1.0])
    return table.to(device, torch.float64 if dtype == torch.float64 else torch.float32)


def tensors(count: int, inner: tuple[int, ...], dtype: torch.dtype, device: str) -> list[Tensor]:
    return [torch.randn(B, T, *inner, dtype=torch.float64).to(device, dtype) for _ in range(count)]


@pytest.mark.checks_backend
@pytest.mark.parametrize("inner", INNERS, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_numbers_of_parts_equal_whole_samples(backend: str, inner: tuple[int, ...]) -> None:
    device = device_of(backend)
    x, c, u, h, mask = tensors(5, inner, torch.float32, device)
    mask, table = mask.clamp(0, 1), tables(torch.float32, device)
    table[:, STORE_1] = -1
    numbers = {
        "row_index": torch.tensor([2, 0], device=device),
        "guidance_scale": torch.tensor([1.5, -2.0], device=device),
        "threshold": torch.tensor([0.5, 0.7], device=device),
        "noise_step": torch.tensor([9, 2**31], device=device),
    }
    results = []
    for per_part in (False, True):
        given = {name: value[:, None].repeat(1, T) if per_part else value for name, value in numbers.items()}
        history, model_input = [h.clone(), h.clone()], torch.zeros(2 * B, T, *inner, device=device)
        prev = ops.step_rows(
            x, c, table, uncond=u, seeds=torch.tensor([3, -4], device=device), mask=mask, history=history,
            model_input=model_input, backend=backend, **given,
        )  # fmt: skip
        results.append([prev, *history, model_input])
    assert_same_bits(results[1], results[0])


@pytest.mark.checks_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("inner", INNERS[:3], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_any_numbers_of_parts_equal_loop_over_parts(backend: str, inner: tuple[int, ...], dtype: torch.dtype) -> None:
    device = device_of(backend)
    x, c, u, v, h = tensors(5, inner, dtype, device)
    v, table = v.abs(), tables(dtype, device)
    rows = torch.randint(-1, 4, (B, T), device=device)
    rows[0, 1] = -1
    scale, threshold = (torch.rand(B, T, device=device).add(0.2).to(table.dtype) for _ in range(2))
    steps, seeds = torch.randint(0, 2**32, (B, T), device=device), torch.randint(-(2**62), 2**62, (B,), device=device)
    history, model_input = [h.clone(), h.clone() + 1], torch.empty_like(x)
    before = [slot.clone() for slot in history]
    got = ops.step_rows(
        x, c, table, rows, history, uncond=u, guidance_scale=scale, threshold=threshold, variance=v, variance_kind=2,
        seeds=seeds, noise_step=steps, model_input=model_input, backend=backend,
    )  # fmt: skip
    for b in range(B):
        for t in range(T):
            at = (slice(b, b + 1), t)
            if rows[b, t] < 0:
                assert_same_bits([got[at], history[0][at], history[1][at], model_input[at]],
                                 [x[at], before[0][at], before[1][at], x[at]])  # fmt: skip
                continue
            # By the same backend: Triton's interpreter rounds twice in an fma.
            whole = fastdiff.randn((1, T, *inner), seeds[b : b + 1], int(steps[b, t]), purpose=1, backend=backend)
            own, next_input = [slot[at].clone() for slot in before], torch.empty_like(x[at])
            prev = ops.step_rows(
                x[at], c[at], table, rows[b, t : t + 1], own, uncond=u[at], guidance_scale=float(scale[b, t]),
                threshold=threshold[b, t : t + 1], variance=v[at], variance_kind=2, noise=whole[:, t],
                model_input=next_input, backend=backend,
            )  # fmt: skip
            assert_same_bits([got[at], history[0][at], history[1][at], model_input[at]], [prev, *own, next_input])


@pytest.mark.checks_backend
@pytest.mark.parametrize("backend", BACKENDS)
def test_numbers_of_samples_and_of_parts_mix(backend: str) -> None:
    device = device_of(backend)
    x, c, u = tensors(3, (5,), torch.float32, device)
    table, rows = tables(torch.float32, device), torch.tensor([[0, 1, 2], [3, -1, 1]], device=device)
    of_samples = torch.tensor([2.0, 0.5], device=device)
    steps, seeds = torch.tensor([4, 5], device=device), torch.tensor([6, 7], device=device)

    def run(expand: Any) -> tuple[Tensor, ...]:
        return ops.step(
            x, c, table, rows, uncond=u, guidance_scale=expand(of_samples), threshold=expand(of_samples), seeds=seeds,
            noise_step=expand(steps), keeps=1, backend=backend,
        )  # fmt: skip

    mixed = run(lambda values: values)
    assert_same_bits(mixed, run(lambda values: values[:, None].repeat(1, T)))
    assert not mixed[1][1, 1].any()
    # One row for all beside a scale for each part.
    scale = torch.rand(B, T, device=device)
    (one_row,) = ops.step(x, c, table, 2, uncond=u, guidance_scale=scale, backend=backend)
    (all_rows,) = ops.step(x, c, table, torch.full_like(rows, 2), uncond=u, guidance_scale=scale, backend=backend)
    assert_same_bits([one_row], [all_rows])


@pytest.mark.checks_backend
@pytest.mark.parametrize("backend", BACKENDS)
def test_any_layout_equals_row_major(backend: str) -> None:
    device = device_of(backend)
    shape = (B, T, 2, 3, 4)
    x, c, h = (torch.randn(shape, device=device) for _ in range(3))
    table, rows = tables(torch.float32, device), torch.tensor([[0, 3, -1], [2, 1, 0]], device=device)
    seeds = torch.tensor([1, 2], device=device)

    def run(layout: Any) -> list[Tensor]:
        own = [layout(tensor.clone()) for tensor in (x, c, h, h + 1, torch.zeros_like(x), torch.zeros_like(x))]
        prev = ops.step_rows(
            own[0], own[1], table, rows, own[2:4], seeds=seeds, noise_step=3, out=own[4], model_input=own[5],
            backend=backend,
        )  # fmt: skip
        assert prev is own[4]
        return own[2:]

    expected = run(lambda tensor: tensor)
    for layout in (
        lambda tensor: tensor.to(memory_format=torch.channels_last_3d),
        lambda tensor: tensor.transpose(0, 1).contiguous().transpose(0, 1),
        lambda tensor: torch.stack([tensor, tensor], -1)[..., 0],
    ):
        assert_same_bits(run(layout), expected)
    # New results have the sample's layout where that is dense.
    sample = x.to(memory_format=torch.channels_last_3d)
    (prev,) = ops.step(sample, c, table, rows, seeds=seeds, noise_step=3, history=[h, h + 1], backend=backend)
    assert prev.stride() == sample.stride()
    assert_same_bits([prev], expected[2:3])


@needs_extension
def test_step_of_parts_is_taken_by_the_extension_at_once() -> None:
    x, rows = torch.ones(B, T, 4), torch.tensor([[0, -1, 0], [-1, 0, 0]])
    found = backends.extension.step(  # type: ignore[union-attr]
        sample=x, model_output=x, table=plain_row(prev_x=3.0), row_index=rows, seeds=torch.tensor([1, 2]),
        noise_step=rows.clamp(0), out=[None],
    )  # fmt: skip
    assert_same_bits(found, [torch.where(rows < 0, 1.0, 3.0)[..., None].expand_as(x)])


@pytest.mark.parametrize("backend", [b for b in BACKENDS if isinstance(b, str)])
def test_gradients_of_parts_equal_numerical_ones(backend: str) -> None:
    x, c, u, h = (torch.randn(B, T, 2, dtype=torch.float64, requires_grad=True) for _ in range(4))
    v = torch.rand(B, T, 2, dtype=torch.float64).add(0.5).requires_grad_()
    scale = torch.randn(B, T, dtype=torch.float64, requires_grad=True)
    table, rows = torch.randn(3, 32, dtype=torch.float64), torch.tensor([[0, 1, -1], [2, 2, 0]])
    table[:, 2] = 1e9
    seeds, steps, mask = torch.tensor([5, 6]), torch.tensor([[1, 2, 3], [4, 5, 6]]), torch.rand(B, T, 2).double()

    def step(*tensors: Tensor) -> tuple[Tensor, ...]:
        x, c, u, scale, h, v = tensors
        return ops.step(
            x, c, table, rows, uncond=u, guidance_scale=scale, history=[h], seeds=seeds, noise_step=steps, variance=v,
            variance_kind=2, mask=mask, keeps=1, backend=backend,
        )  # fmt: skip

    assert torch.autograd.gradcheck(step, (x, c, u, scale, h, v), fast_mode=True)


def test_compiled_step_of_parts_equals_eager() -> None:
    table, seeds = tables(torch.float32, "cpu"), torch.tensor([1, 2])

    def step(x: Tensor, c: Tensor, rows: Tensor) -> Tensor:
        return ops.step(x, c, table, rows, seeds=seeds, noise_step=rows.clamp(0))[0] * 2

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    x, c = torch.randn(2, B, T, 5)
    rows = torch.tensor([[0, -1, 1], [3, 2, 0]])
    assert_same_bits([compiled(x, c, rows)], [step(x, c, rows)])


def test_malformed_numbers_of_parts_are_refused() -> None:
    x, table, rows = torch.randn(B, T, 4), tables(torch.float32, "cpu"), torch.zeros(B, T, dtype=torch.int64)
    for given, message in (
        (
            {"row_index": rows[:, :2]},
            r"row_index has shape \[2, 2\], expected \[2\], one a sample, \[2, 3\], one a part",
        ),
        ({"row_index": rows[None]}, r"row_index has shape \[1, 2, 3\]"),
        ({"row_index": rows + 4}, r"row_index holds 4"),
        (
            {"row_index": rows, "seeds": torch.zeros(B, T, dtype=torch.int64)},
            r"seeds has shape \[2, 3\], expected \[2\]",
        ),
        ({"row_index": rows, "seeds": rows[0], "noise_step": rows}, r"seeds has shape \[3\], expected \[2\]"),
        ({"row_index": rows, "threshold": torch.ones(B, 1)}, r"threshold has shape \[2, 1\]"),
        ({"row_index": 0, "guidance_scale": torch.ones(T, B), "uncond": x}, r"guidance_scale has shape \[3, 2\]"),
    ):
        with pytest.raises(ValueError, match="^step: " + message):
            ops.step(x, x, table, **given)  # type: ignore[arg-type]
    flat = torch.randn(6)
    with pytest.raises(ValueError, match=r"row_index has shape \[6, 1\]"):
        ops.step(flat, flat, table, torch.zeros(6, 1, dtype=torch.int64))
