# SPDX-License-Identifier: MIT
"""CUDA kernels on the host: the blend of a mask and noise of the parts of samples, with the CPU backend's bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_cuda_on_host_rows import call_on_host, some_layout
from torch import Tensor

from fastdiff import ops
from fastdiff.ops.call import StepCall
from fastdiff.ops.checks import check
from fastdiff.ops.parts import run_parts
from fastdiff.row_layout import MODEL_INPUT_SCALE, STORE_0, STORE_1
from support.cuda_host import Kernel, Layout, needs_compiler, needs_cpu_backend
from support.oracle import DTYPES, assert_same_bits

pytestmark = [needs_compiler, needs_cpu_backend]


def arguments(seed: int, dtype: torch.dtype, shape: tuple[int, ...], per_part: bool) -> dict[str, Any]:
    """Return a call of `ops.step_rows` with a mask, drawn noise and a model input; numbers a part or a sample."""
    gen = torch.Generator().manual_seed(seed)
    compute = torch.float64 if dtype == torch.float64 else torch.float32

    def like_sample() -> Tensor:
        return torch.randn(shape, generator=gen, dtype=torch.float64).to(dtype)

    table = torch.randn(3, 32, generator=gen, dtype=torch.float64)
    table = torch.where(torch.rand(table.shape, generator=gen) < 0.4, 0.0, table)
    table[:, 2], table[:, MODEL_INPUT_SCALE] = 0.8, 0.37
    table[:, STORE_0], table[:, STORE_1] = torch.tensor([0.0, -1.0, 1.0]), -1.0
    numbers = shape[:2] if per_part else shape[:1]
    return {
        "sample": like_sample(),
        "model_output": like_sample(),
        "table": table.to(compute),
        "row_index": torch.randint(-1, 3, numbers, generator=gen),
        "history": [like_sample() for _ in range(4)],
        "uncond": like_sample(),
        "guidance_scale": torch.rand(numbers, generator=gen, dtype=torch.float64).mul(5).to(compute),
        "mask": torch.rand(shape, generator=gen, dtype=torch.float64).mul(3).sub(1).clamp(0, 1).to(dtype),
        "seeds": torch.randint(-(2**62), 2**62, shape[:1], generator=gen),
        "noise_step": torch.randint(0, 2**32, numbers, generator=gen),
        "model_input": torch.zeros(2 * shape[0], *shape[1:], dtype=dtype),
    }


def written(given: dict[str, Any], prev_sample: Tensor) -> list[Tensor]:
    return [prev_sample, *given["history"], given["model_input"]]


def copied(given: dict[str, Any]) -> dict[str, Any]:
    own = {name: value.clone() if isinstance(value, Tensor) else value for name, value in given.items()}
    return {**own, "history": [slot.clone() for slot in given["history"]]}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mixed", [False, True], ids=["one dtype", "mixed"])
def test_masks_and_parts_on_host_match_cpu_bitwise(kernel: Kernel, dtype: torch.dtype, mixed: bool) -> None:
    @settings(max_examples=20)
    @given(
        seed=st.integers(0, 2**32 - 1),
        shape=st.tuples(st.integers(1, 3), st.integers(1, 3), st.sampled_from([1, 5, 8, 16, 33])),
        per_part=st.booleans(),
        drawn=st.booleans(),
        masked=st.booleans(),
    )
    def compare(seed: int, shape: tuple[int, int, int], per_part: bool, drawn: bool, masked: bool) -> None:
        kernel.runtime(backwards=seed % 2 == 1)
        call = arguments(seed, dtype, shape, per_part)
        if mixed:
            other = torch.float32 if dtype != torch.float32 else torch.float16
            call["model_output"], call["mask"] = call["model_output"].to(other), call["mask"].to(other)
        if not drawn:
            del call["seeds"], call["noise_step"]
        if not masked:
            del call["mask"]
        on_cpu, own = copied(call), copied(call)
        expected = written(on_cpu, ops.step_rows(**on_cpu))
        step_call = StepCall(**{**own, "history": tuple(own["history"])}, write_history=True)
        check(step_call)
        layout = some_layout(seed, dtype)

        def run(batch: StepCall) -> tuple[Tensor, ...]:
            return call_on_host(kernel, batch, layout)

        (prev_sample, *_) = run_parts(step_call, run) if step_call.has_parts else run(step_call)
        assert_same_bits(written(own, prev_sample.reshape(shape)), expected)

    compare()


def test_masked_step_of_one_row_reads_each_tensor_once(kernel: Kernel) -> None:
    for size in (8, 33, 4096):
        x, c, known, mask = torch.randn(3, 2, size).unbind(0) + (torch.rand(2, size).round(decimals=0),)
        table = torch.randn(1, 32)
        (expected,) = ops.step(x, c, table, 0, history=[None, None, known], mask=mask)
        call = StepCall(sample=x, model_output=c, table=table, row_index=0, history=(None, None, known), mask=mask)
        (got, *_) = call_on_host(kernel, call, Layout())  # counts what is read and written
        assert kernel.form is None
        assert_same_bits([got], [expected])
