# SPDX-License-Identifier: MIT
"""Rows of a sample's own, noise drawn in the step, and the next model input: the same on every backend."""

from __future__ import annotations

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastdiff import ops
from fastdiff.row_layout import MODEL_INPUT_SCALE, ROW_WIDTH, compute_dtype
from support.mixed import alone, copied, of_sample, random_batch, run, solvers
from support.oracle import DTYPES, INTERPRETED, assert_same_bits, backends_at_hand, device_of, plain_row

pytestmark = pytest.mark.answers
BACKENDS = backends_at_hand()
HALVES = (torch.float16, torch.bfloat16)


def interpreted(backend: str) -> bool:
    return backend == "triton" and INTERPRETED


def examples(backend: str, count: int) -> settings:
    """A call of Triton's interpreter takes 20 ms and more: few examples, and no search for the smallest failure."""
    if interpreted(backend):
        return settings(max_examples=4, phases=[Phase.explicit, Phase.reuse, Phase.generate])
    # Compiled, most examples are several more kernels to compile, a second each.
    return settings(max_examples=min(count, 10) if backend == "triton" else count)


def model_input_dtypes(backend: str) -> tuple[torch.dtype, ...]:
    # Triton's interpreter cuts float32 off to bfloat16, and what it makes of it is no next model input to compare.
    return tuple(d for d in DTYPES if d != torch.bfloat16) if interpreted(backend) else DTYPES


# --- Other solvers in one launch -------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels_last", [False, True], ids=["row-major", "channels-last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_mixed_solvers_in_one_launch_equal_each_sample_alone(
    backend: str, dtype: torch.dtype, channels_last: bool
) -> None:
    batch = copied(solvers(3, dtype, (3, 5, 7), channels_last=channels_last), device_of(backend))
    together = run(batch, backend)
    size = len(batch["sample"])
    assert int((batch["row_index"] < 0).sum()) == 1
    for i in range(size):
        assert_same_bits(of_sample(together, i, size), alone(batch, i, backend))
    # What a solver has not written yet was NaN; nothing else is, and noise has reached those who draw it.
    assert not together[0].isnan().any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_any_rows_in_one_launch_equal_each_sample_alone(backend: str, dtype: torch.dtype) -> None:
    @examples(backend, 40)
    @given(seed=st.integers(0, 2**32 - 1))
    def check(seed: int) -> None:
        batch = copied(random_batch(seed, dtype, model_input_dtypes(backend)), device_of(backend))
        together = run(batch, backend)
        for i in range(len(batch["sample"])):
            assert_same_bits(of_sample(together, i, len(batch["sample"])), alone(batch, i, backend))

    check()


@pytest.mark.parametrize("backend", BACKENDS)
def test_step_in_place_equals_step_elsewhere(backend: str) -> None:
    batch = copied(solvers(4, torch.float32, (6, 11)), device_of(backend))
    expected = run(batch, backend)
    own = copied(batch, device_of(backend))
    with torch.no_grad():
        result = ops.step_rows(**own, out=own["sample"], backend=backend)
    assert result is own["sample"]
    assert_same_bits([result, *own["history"], own["model_input"]], expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sample_that_stays_keeps_its_bits(backend: str) -> None:
    device = device_of(backend)
    sample = torch.tensor([[float("nan"), -0.0, 1.5], [3.0, float("inf"), 2.0]], device=device)
    register = torch.full_like(sample, 7.0)
    table = plain_row(prev_x=2.0, k0_x=3.0).to(device)
    table[0, 6:8] = torch.tensor([0.0, -1.0])
    rows = torch.tensor([-1, 0], device=device)
    next_input = torch.zeros(4, 3, device=device)
    result = ops.step_rows(sample, sample, table, rows, [register], model_input=next_input, backend=backend)
    stays = result[0]
    assert_same_bits([stays, register[0], next_input[0], next_input[2]], [sample[0], register[0] * 0 + 7, stays, stays])
    assert_same_bits([result[1], register[1]], [2 * sample[1], 3 * sample[1]])


@pytest.mark.parametrize("one_for_all", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
def test_row_in_a_tensor_is_the_row_as_a_number(backend: str, one_for_all: bool) -> None:
    device = device_of(backend)
    gen = torch.Generator().manual_seed(0)
    x, m, z = (torch.randn(3, 70, generator=gen).to(device) for _ in range(3))
    table = torch.randn(4, ROW_WIDTH, generator=gen).to(device)
    table[:, 2] = float("inf")
    row = torch.tensor([2] if one_for_all else [2, 2, 2], device=device)
    expected = ops.step(x, m, table, 2, noise=z, keeps=2, backend=backend)
    out = tuple(torch.full_like(x, float("nan")) for _ in range(3))
    assert_same_bits(ops.step(x, m, table, row, noise=z, keeps=2, out=out, backend=backend), expected)
    assert_same_bits(ops.step(x, m, table, row, noise=z, keeps=2, backend=backend), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_kept_tensors_of_a_sample_that_stays_are_as_they_were_or_zero(backend: str) -> None:
    device = device_of(backend)
    x = torch.arange(6.0, device=device).reshape(2, 3) + 1
    table = plain_row(prev_x=2.0, k0_x=3.0).to(device)
    rows = torch.tensor([0, -5], device=device)
    _, kept = ops.step(x, x, table, rows, keeps=1, backend=backend)
    assert_same_bits([kept], [torch.stack([3 * x[0], torch.zeros_like(x[1])])])
    held = torch.full_like(x, 9.0)
    ops.step(x, x, table, rows, keeps=1, out=(None, held), backend=backend)
    assert_same_bits([held], [torch.stack([3 * x[0], torch.full_like(x[1], 9.0)])])


# --- Noise -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels_last", [False, True], ids=["row-major", "channels-last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_drawn_noise_is_that_of_randn(backend: str, dtype: torch.dtype, channels_last: bool) -> None:
    device = device_of(backend)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    table = plain_row(dtype, prev_x=0.5, prev_m=0.25, prev_z=0.75).to(device)
    for shape in ((2, 3, 5, 7), (1, 4, 16, 16), (3, 1, 1, 2)):
        x, m = (torch.randn(shape).to(device, dtype).to(memory_format=memory_format) for _ in range(2))
        seeds = torch.randint(-(2**62), 2**62, (shape[0],), device=device)
        (drawn,) = ops.step(x, m, table, 0, seeds=seeds, noise_step=2**32 - 1, purpose=2**31, backend=backend)
        # In the dtype of the computation: a half type's noise is not rounded before it is added.
        wide = compute_dtype(dtype)
        z = ops.randn(shape, seeds, 2**32 - 1, 2**31, dtype=wide, backend=backend).to(memory_format=memory_format)
        (given,) = ops.step(x.to(wide), m.to(wide), table, 0, noise=z, backend=backend)
        if interpreted(backend) and dtype == torch.bfloat16:
            given = (given.view(torch.int32) & ~0xFFFF).view(torch.float32)  # it cuts off instead of rounding
        assert_same_bits([drawn], [given.to(dtype)])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_without_noise_adds_none(backend: str) -> None:
    x = torch.randn(2, 9, device=device_of(backend))
    table = plain_row(prev_x=2.0).to(x.device)
    seeds = torch.tensor([1, 2], device=x.device)
    assert_same_bits(ops.step(x, x, table, 0, seeds=seeds, backend=backend), [2 * x])


# --- The next model input --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("copies", [1, 2], ids=["once", "twice"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_model_input_is_the_scaled_sample_rounded(backend: str, dtype: torch.dtype, copies: int) -> None:
    device = device_of(backend)
    table = plain_row(dtype, prev_x=1.0, prev_m=0.3).to(device)
    table[0, MODEL_INPUT_SCALE] = 0.7316
    for shape in ((2, 3, 4, 8), (3, 37), (1, 1)):
        x, m = (torch.randn(shape).to(device, dtype) for _ in range(2))
        for other in model_input_dtypes(backend):
            target = torch.full((copies * shape[0], *shape[1:]), float("nan"), dtype=other, device=device)
            (prev,) = ops.step(x, m, table, 0, model_input=target, backend=backend)
            scaled = table[0, MODEL_INPUT_SCALE] * prev.to(compute_dtype(dtype))
            once = (scaled.float() if other in HALVES else scaled).to(other)
            assert_same_bits([target], [torch.cat([once] * copies)])


def test_model_input_of_every_backend_is_the_references() -> None:
    x = torch.randn(2, 70, dtype=torch.float64)
    table = plain_row(torch.float64, prev_x=1.0)
    table[0, MODEL_INPUT_SCALE] = 1 / 3

    def made(backend: str) -> Tensor:
        target = torch.full((4, 70), float("nan"), dtype=torch.float16)
        ops.step(x, x, table, 0, model_input=target, backend=backend)
        return target

    names = [name for name in BACKENDS if isinstance(name, str)]
    for name in names:
        assert_same_bits([made(name)], [made("reference")])
