# SPDX-License-Identifier: MIT
"""CUDA kernels on the host: rows per sample, noise drawn in the step, the next model input, normal numbers.

Conversions, roots and fma are the host's, see ``test_cuda_on_host.py``.
"""

from __future__ import annotations

import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastdiff import ops
from fastdiff.ops.call import StepCall
from fastdiff.ops.canonicalize import canonicalize, copy_back
from fastdiff.ops.checks import check
from fastdiff.row_layout import MODEL_INPUT_SCALE, STORE_0, STORE_1, Variance
from support.cuda_host import Kernel, Layout, needs_compiler, needs_cpu_backend, randn_on_host, run_call
from support.oracle import DTYPES, assert_same_bits, plain_row
from support.row_batches import Batch, copy_batch, random_batch, run_batch, solver_batch, with_layout, written_tensors

pytestmark = needs_compiler

#: Seeds, steps and purposes whose words differ in every place.
SEEDS = torch.tensor([0, -1, 0x0123456789ABCDEF, -(2**63)])
STEP, PURPOSE = 0xFEDCBA98, 0x89ABCDEF


def call_on_host(kernel: Kernel, call: StepCall, layout: Layout = Layout()) -> tuple[Tensor, ...]:  # noqa: B008
    """Check a call, canonicalize it and run it, as ops does for a backend; its outputs held NaN before."""
    check(call)
    canonical = canonicalize(call)
    outputs = tuple(target for target in canonical.targets if isinstance(target, Tensor))
    for output in outputs if not isinstance(call.row_index, Tensor) else outputs[:1]:
        output.fill_(math.nan)
    run_call(kernel, canonical, layout)
    copy_back(call, canonical)
    return outputs


def rows_on_host(kernel: Kernel, batch: Batch, layout: Layout) -> list[Tensor]:
    """Run a batch on the host, like `row_batches.run_batch`."""
    own = copy_batch(batch)
    rows, registers = own.pop("row_index"), own.pop("history")
    call = StepCall(row_index=rows, history=tuple(registers), write_history=True, **own)
    return [*call_on_host(kernel, call, layout), *written_tensors({**own, "history": registers})]


def some_layout(seed: int, dtype: torch.dtype) -> Layout:
    rng = random.Random(seed)
    names = ("", "", "sample", "out_0", "history_0", "history_3", "model_input", "uncond")
    return Layout(shift=rng.choice((0, 0, 0, 1, 16 // dtype.itemsize - 1)), shifted=rng.choice(names))


# --- Rows ------------------------------------------------------------------------------------------------------------


@needs_cpu_backend
@pytest.mark.parametrize("channels_last", [False, True], ids=["row-major", "channels-last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mixed_solvers_on_host_match_cpu_bitwise(kernel: Kernel, dtype: torch.dtype, channels_last: bool) -> None:
    # Samples of whole packs, of none, and of more than a block of threads.
    for seed, inner in enumerate([(4, 4, 4), (3, 5, 7), (1, 1, 1), (4, 24, 24)]):
        kernel.runtime(backwards=seed % 2 == 1)
        batch = solver_batch(seed, dtype, inner, channels_last=channels_last)
        assert_same_bits(rows_on_host(kernel, batch, Layout(shift=seed // 3)), run_batch(batch, "cpu"))


@needs_cpu_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_rows_on_host_match_cpu_bitwise(kernel: Kernel, dtype: torch.dtype) -> None:
    @settings(max_examples=80)
    @given(seed=st.integers(0, 2**32 - 1))
    def check_one(seed: int) -> None:
        kernel.runtime(backwards=seed % 2 == 1)
        batch = random_batch(seed, dtype)
        if batch["variance_kind"] == Variance.LEARNED_RANGE:
            batch["variance_kind"] = int(Variance.LEARNED)  # exp is nobody's standard
        assert_same_bits(rows_on_host(kernel, batch, some_layout(seed, dtype)), run_batch(batch, "cpu"))

    check_one()


def test_row_outside_table_leaves_sample_unchanged(kernel: Kernel) -> None:
    # The checks cannot look at rows on a GPU: one beyond the table must not be read, nor anything written for it.
    for dtype in DTYPES:
        sample = torch.randn(3, 40).to(dtype)
        register = torch.full_like(sample, math.nan)
        table = plain_row(dtype, prev_x=2.0, k0_x=4.0)
        table[0, [MODEL_INPUT_SCALE, STORE_0, STORE_1]] = torch.tensor([1.0, 1.0, -1.0], dtype=table.dtype)
        rows = torch.tensor([1, 0, 2**40])
        next_input = torch.full((6, 40), math.nan, dtype=torch.float32)
        own = StepCall(
            sample=sample,
            model_output=sample.clone(),
            table=table,
            row_index=rows,
            history=(None, register),
            model_input=next_input,
            write_history=True,
            out=(torch.full_like(sample, math.nan),),
        )
        run_call(kernel, own)
        expected = torch.stack([sample[0], 2 * sample[1], sample[2]])
        assert_same_bits(own.targets, [expected])
        assert_same_bits([next_input], [torch.cat([expected, expected]).float()])
        assert torch.equal(register[1], 4 * sample[1])
        assert bool(register[[0, 2]].isnan().all())


# --- Noise -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_noise_drawn_on_host_matches_reference_bitwise(kernel: Kernel, dtype: torch.dtype) -> None:
    table = plain_row(dtype, prev_z=1.0)
    for shape in ((4, 64), (4, 3), (4, 37), (4, 2100), (4, 3, 5, 7), (4, 8, 4, 4), (4, 16, 1, 3)):
        for channels_last in (False, True) if len(shape) == 4 else (False,):
            for step in (STEP, torch.tensor([3, 2**32 - 1, 0, STEP]), torch.tensor([STEP])):
                x = with_layout(torch.zeros(shape, dtype=dtype), channels_last)
                call = StepCall(
                    sample=x,
                    model_output=x.clone(),
                    table=table,
                    row_index=0,
                    seeds=SEEDS,
                    noise_step=step,
                    purpose=PURPOSE,
                )
                for shift in (0, 1):
                    (drawn,) = call_on_host(kernel, call, Layout(shift=shift))
                    expected = ops.randn(shape, SEEDS, step, PURPOSE, dtype=dtype, backend="reference")
                    assert_same_bits([drawn], [expected])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_randn_on_host_matches_reference_bitwise(kernel: Kernel, dtype: torch.dtype) -> None:
    # Whole packs, tails of every length, more than a block of threads; memory on 16 bytes and off.
    for size in (1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 37, 2048, 2049):
        for batch in (1, 4):
            for step in (STEP, torch.arange(batch) + 7):
                for shift in (0, 1):
                    seeds = SEEDS[-batch:].clone()
                    got = randn_on_host(kernel, (batch, size), seeds, step, PURPOSE, dtype, shift)
                    assert_same_bits(
                        [got], [ops.randn((batch, size), seeds, step, PURPOSE, dtype=dtype, backend="reference")]
                    )


def test_every_word_of_seed_step_and_purpose_changes_all_numbers(kernel: Kernel) -> None:
    base = randn_on_host(kernel, (1, 8), torch.tensor([5]), 1, 2, torch.float32)
    for seeds, step, purpose in (([5 + 2**32], 1, 2), ([6], 1, 2), ([5], 2, 2), ([5], 1, 3)):
        other = randn_on_host(kernel, (1, 8), torch.tensor(seeds), step, purpose, torch.float32)
        assert not bool((base == other).any())


def test_randn_runs_on_requested_stream_and_device(kernel: Kernel) -> None:
    kernel.runtime(device=1)
    randn_on_host(kernel, (2, 40), SEEDS[:2].clone(), 0, 0, torch.float32)
    assert kernel.state == {"device": 1, "launches": 1, "launched_on": 0, "stream": 0x5EED}
    kernel.runtime(device=1, next_launch=9)
    with pytest.raises(AssertionError, match="invalid configuration argument"):
        randn_on_host(kernel, (2, 40), SEEDS[:2].clone(), 0, 0, torch.float32)
    assert kernel.state["device"] == 1
    kernel.runtime()


# --- The next model input --------------------------------------------------------------------------------------------


@needs_cpu_backend
@pytest.mark.parametrize("other", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_model_input_on_host_matches_cpu_bitwise(kernel: Kernel, dtype: torch.dtype, other: torch.dtype) -> None:
    kernel.runtime()
    table = plain_row(dtype, prev_x=0.5, prev_m=0.3)
    table[0, MODEL_INPUT_SCALE] = 0.7316
    # Among them a single sample whose second copy does not begin on 16 bytes.
    for shape in ((2, 64), (3, 37), (1, 37), (1, 2), (2, 3, 4, 8)):
        x, m = (torch.randn(shape).to(dtype) for _ in range(2))
        for copies in (1, 2):
            for layout in (Layout(), Layout(joined=False), Layout(shifted="model_input"), Layout(shift=1)):
                targets = [torch.full((copies * shape[0], *shape[1:]), math.nan, dtype=other) for _ in range(2)]
                call = StepCall(sample=x, model_output=m, table=table, row_index=0, model_input=targets[0])
                (prev,) = call_on_host(kernel, call, layout)
                (expected,) = ops.step(x, m, table, 0, model_input=targets[1], backend="cpu")
                assert_same_bits([prev, targets[0]], [expected, targets[1]])
