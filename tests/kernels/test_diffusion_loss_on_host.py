# SPDX-License-Identifier: MIT
"""Logic of the CUDA kernels of the training loss without a GPU, as in test_reductions_on_host.py: their bits are those
of the CPU's loops, and they write nothing else.
"""

from __future__ import annotations

import ctypes
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_reductions_on_host import (
    COMPILER,
    INVALID_CONFIGURATION,
    SEEDS,
    SHIFTS,
    STREAM,
    Buffer,
    _launch,
    _placed,
    load,
    numbers,
    runtime,
)
from torch import Tensor

import fastdiff
from fastdiff.ops import backends
from fastdiff.ops.forward_rows import TARGETS, forward_rows
from fastdiff.row_layout import compute_dtype
from support.oracle import DTYPES, assert_same_bits

pytestmark = [
    pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler: neither c++ nor g++ is on PATH"),
    pytest.mark.skipif(backends.extension is None, reason="needs the C++ extension to compare with"),
]
SIZES = st.sampled_from([1, 3, 64, 68, 700, 1024, 1025, 5000])
LINEAR = fastdiff.create_noise_scheduler("linear")


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return load(tmp_path_factory.mktemp("diffusion_loss_on_host"), "diffusion_loss_on_host")


def run(
    library: ctypes.CDLL, x0: Tensor, output: Tensor, noise: Tensor | None, seeds: Tensor | None, table: Tensor,
    rows: Tensor, loss: int, *, factor: Tensor | None = None, shift: int = 0, channels: int = 1,
    stride: int | None = None,
) -> list[Tensor]:  # fmt: skip
    """Return the losses, or the gradients; samples of the output are `stride` elements apart."""
    batch, inner = x0.shape
    stride = inner if stride is None else stride
    wide = torch.full((batch, stride), math.nan, dtype=output.dtype)
    wide[:, :inner] = output
    partials, out = Buffer(batch * math.ceil(inner / 1024), table.dtype), Buffer(batch, table.dtype)
    gradients = [None] * 3
    if factor is not None:
        gradients = [Buffer(batch * stride, output.dtype, shift), Buffer(batch * inner, x0.dtype, shift), None]
        gradients[0].values.zero_()
        if noise is not None:
            gradients[2] = Buffer(batch * inner, noise.dtype, shift)
    sizes = [
        *(DTYPES.index(t.dtype) for t in (x0, output, x0 if noise is None else noise)), batch, inner, stride,
        len(table), 0, 1, channels, loss, 0,
    ]  # fmt: skip
    given_tensors = [None if t is None else _placed(t, shift) for t in (x0, wide, noise)]
    numbers_of = [None if t is None else _placed(t, 0) for t in (table, rows, seeds, factor)]
    _launch(library, "diffusion_loss_on_host", sizes, [partials, out, *given_tensors, *numbers_of, *gradients], 0.1)
    if factor is None:
        return [out.values.clone()]
    assert not gradients[0].values.reshape(batch, stride)[:, inner:].any()
    found = [gradients[0].values.reshape(batch, stride)[:, :inner]]
    found += [buffer.values.reshape(batch, inner) for buffer in gradients[1:] if buffer is not None]
    return [value.clone() for value in found]


def expected(
    x0: Tensor, output: Tensor, noise: Tensor | None, seeds: Tensor | None, table: Tensor, rows: Tensor, loss: int,
    factor: Tensor | None = None,
) -> list[Tensor]:  # fmt: skip
    """The same by the CPU's loops."""
    assert backends.extension is not None
    out = None if factor is None else (output.dtype, x0.dtype, None if noise is None else noise.dtype)
    done = backends.extension.diffusion_loss(
        loss, 0.1, factor, sample=x0, model_output=output, table=table, row_index=rows, noise=noise, seeds=seeds,
        noise_step=3, purpose=3, out=out,
    )  # fmt: skip
    assert isinstance(done, tuple), done
    return list(done)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_loss_and_gradients_on_host_match_cpu_bitwise(library: ctypes.CDLL, dtype: torch.dtype) -> None:
    @settings(max_examples=20)
    @given(
        seed=SEEDS, batch=st.integers(1, 3), inner=SIZES, shift=SHIFTS, drawn=st.booleans(), mixed=st.booleans(),
        kind=st.sampled_from(TARGETS), loss=st.integers(0, 2), gap=st.sampled_from([0, 3, 8]),
    )  # fmt: skip
    def check(
        seed: int, batch: int, inner: int, shift: int, drawn: bool, mixed: bool, kind: str, loss: int, gap: int
    ) -> None:
        x0, output, z = (numbers(seed + i, batch, inner, dtype, "normal") for i in range(3))
        if mixed and dtype != torch.float64:
            output = output.to(torch.bfloat16 if dtype != torch.bfloat16 else torch.float16)
        compute = compute_dtype(dtype)
        table, _ = forward_rows("test", x0, 0, LINEAR, kind, compute)
        rows = torch.tensor([3, -1, 999])[torch.arange(batch)]
        seeds, noise = (torch.arange(batch) + seed, None) if drawn else (None, z)
        arguments = (x0, output, noise, seeds, table, rows, loss)
        library.set_runtime(0, seed % 2, 0)
        assert_same_bits(run(library, *arguments, shift=shift, stride=inner + gap), expected(*arguments))
        factor = torch.linspace(0.5, -2.0, batch).to(compute)
        got = run(library, *arguments, factor=factor, shift=shift, stride=inner + gap)
        assert_same_bits(got, expected(*arguments, factor))

    check()


def test_channels_last_noise_finds_its_places(library: ctypes.CDLL) -> None:
    x0 = torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    output, seeds, rows = torch.randn_like(x0), torch.tensor([3, 4]), torch.tensor([5, 700])
    table, _ = forward_rows("test", x0, 0, LINEAR, "v_prediction", torch.float32)
    flat, flat_output = (tensor.permute(0, 2, 3, 1).reshape(2, -1) for tensor in (x0, output))
    library.set_runtime(0, 0, 0)
    got = run(library, flat, flat_output, None, seeds, table, rows, 0, channels=3)
    assert_same_bits(got, expected(x0, output, None, seeds, table, rows, 0))


def test_launches_are_on_requested_stream_and_fail_with_a_reason(library: ctypes.CDLL) -> None:
    x0 = numbers(0, 2, 3000, torch.float32, "normal")
    table, _ = forward_rows("test", x0, 0, LINEAR, "epsilon", torch.float32)
    rows = torch.tensor([1, 2])
    for factor, launches in ((None, 2), (torch.ones(2), 1)):
        library.set_runtime(1, 0, 0)
        run(library, x0, x0, x0, None, table, rows, 0, factor=factor)
        state = runtime(library)
        assert (state["device"], state["launched_on"], state["stream"], state["launches"]) == (1, 0, STREAM, launches)
        library.set_runtime(1, 0, INVALID_CONFIGURATION)
        with pytest.raises(AssertionError, match="invalid configuration argument"):
            run(library, x0, x0, x0, None, table, rows, 0, factor=factor)
