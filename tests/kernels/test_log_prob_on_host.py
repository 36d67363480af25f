# SPDX-License-Identifier: MIT
"""Logic of the CUDA kernels of the Gram matrix and the log-probability without a GPU, as in test_reductions_on_host.py:
their bits are those of the CPU's loops, and they write nothing else.
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
    SPREADS,
    STREAM,
    Buffer,
    _launch,
    _placed,
    load,
    numbers,
    runtime,
)
from torch import Tensor

from fastdiff import ops
from fastdiff.ops import backends
from fastdiff.row_layout import (
    CLIP,
    COLUMNS,
    KEEP_0,
    PREDICTION_OUTPUT,
    PREDICTION_SAMPLE,
    PREV_SAMPLE,
    blank_row,
    compute_dtype,
)
from support.oracle import DTYPES, assert_same_bits

pytestmark = [
    pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler: neither c++ nor g++ is on PATH"),
    pytest.mark.skipif(backends.extension is None, reason="needs the C++ extension to compare with"),
]
SIZES = st.sampled_from([1, 31, 33, 64, 700, 1024, 1025, 5000])
NOISE = PREV_SAMPLE + COLUMNS.index("noise")


@pytest.fixture(scope="module")
def gram_library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return load(tmp_path_factory.mktemp("gram_on_host"), "log_prob_on_host", definitions=("-DGRAM_ON_HOST",))


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return load(tmp_path_factory.mktemp("log_prob_on_host"), "log_prob_on_host")


def run_gram(library: ctypes.CDLL, xs: list[Tensor], sums: bool, shift: int) -> Tensor:
    batch, inner = xs[0].shape
    count, dtype = len(xs), xs[0].dtype
    parts = count * (count + 1) // 2 + (count if sums else 0)
    partials = Buffer(batch * math.ceil(inner / 1024) * parts, compute_dtype(dtype))
    out = Buffer(batch * count * (count + sums), compute_dtype(dtype))
    buffers = [partials, out, *(_placed(x, shift) for x in xs)]
    _launch(library, "gram_on_host", [DTYPES.index(dtype), batch, inner, count, int(sums), 0], buffers, 0.0)
    return out.values.clone().reshape(batch, count, count + sums)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gram_on_host_matches_cpu_bitwise(gram_library: ctypes.CDLL, dtype: torch.dtype) -> None:
    @settings(max_examples=15)
    @given(
        seed=SEEDS, batch=st.integers(1, 3), inner=SIZES, shift=SHIFTS, spread=SPREADS, count=st.integers(2, 6),
        sums=st.booleans(),
    )  # fmt: skip
    def check(seed: int, batch: int, inner: int, shift: int, spread: str, count: int, sums: bool) -> None:
        xs = [numbers(seed + i, batch, inner, dtype, spread) for i in range(count)]
        gram_library.set_runtime(0, seed % 2, 0)
        got = run_gram(gram_library, xs, sums, shift)
        expected = ops.gram(xs, sums=sums, backend="cpu")
        if sums:
            expected = torch.cat([expected[0], expected[1][:, :, None]], 2)
        assert_same_bits([got], [expected])

    check()


def run_log_prob(
    library: ctypes.CDLL, tensors: dict[str, Tensor | None], table: Tensor, rows: int | Tensor, *, replay: bool,
    mean: bool, shift: int = 0, channels: int = 1,
) -> list[Tensor]:  # fmt: skip
    x, c = tensors["sample"], tensors["model_output"]
    assert x is not None
    assert c is not None
    batch, inner = x.shape
    partials, out = Buffer(batch * math.ceil(inner / 1024), table.dtype), Buffer(batch, table.dtype)
    outputs = [None, None] if replay else [Buffer(batch * inner, x.dtype, shift) for _ in range(2)]
    index = _placed(rows, 0) if isinstance(rows, Tensor) else None
    sizes = [
        DTYPES.index(x.dtype), batch, inner, len(table), rows if isinstance(rows, int) else 0,
        int(isinstance(rows, Tensor)), 0 if replay else 2, int(replay), int(mean), channels, 0,
        int(c.dtype != x.dtype), DTYPES.index(c.dtype),
    ]  # fmt: skip
    names = ("sample", "model_output", "uncond", "noise", "history")
    given_tensors = [None if (t := tensors.get(name)) is None else _placed(t, shift) for name in names]
    scalars = [_placed(table, 0), None, index]
    seeds = tensors.get("seeds")
    buffers = [partials, out, *given_tensors, *scalars, None if seeds is None else _placed(seeds, 0), *outputs]
    _launch(library, "log_prob_on_host", sizes, buffers, 3.0)
    return [out.values.clone(), *(b.values.clone().reshape(batch, inner) for b in outputs if b is not None)]


def table_for(dtype: torch.dtype) -> Tensor:
    table = torch.tensor([blank_row()] * 3, dtype=torch.float64)
    table[:, PREDICTION_SAMPLE], table[:, PREDICTION_OUTPUT], table[:, CLIP] = 1.1, -0.4, 1.5
    table[:, PREV_SAMPLE : PREV_SAMPLE + 4] = torch.tensor([0.3, 0.2, 0.5, -0.15], dtype=torch.float64)
    table[:, KEEP_0 + COLUMNS.index("prediction")] = 1.0
    table[0, NOISE], table[1, NOISE] = 0.37, -0.021  # row 2 adds no noise
    return table.to(compute_dtype(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_log_prob_on_host_matches_cpu_bitwise(library: ctypes.CDLL, dtype: torch.dtype) -> None:
    @settings(max_examples=20)
    @given(
        seed=SEEDS, batch=st.integers(1, 3), inner=SIZES, shift=SHIFTS, drawn=st.booleans(), per_sample=st.booleans(),
        mean=st.booleans(), mixed=st.booleans(),
    )  # fmt: skip
    def check(
        seed: int, batch: int, inner: int, shift: int, drawn: bool, per_sample: bool, mean: bool, mixed: bool
    ) -> None:
        x, c, u, h, z = (numbers(seed + i, batch, inner, dtype, "normal") for i in range(5))
        if mixed and dtype != torch.float64:
            c = c.to(torch.bfloat16 if dtype != torch.bfloat16 else torch.float16)
        table = table_for(dtype)
        rows: int | Tensor = torch.tensor([0, -1, 2])[torch.arange(batch)] if per_sample else seed % 2
        seeds = torch.arange(batch) + seed
        library.set_runtime(0, seed % 2, 0)
        tensors = {"sample": x, "model_output": c, "uncond": u, "history": h}
        noise = {"seeds": seeds} if drawn else {"noise": z}
        got = run_log_prob(library, {**tensors, **noise}, table, rows, replay=False, mean=mean, shift=shift)
        arguments = {
            "sample": x, "model_output": c, "table": table, "row_index": rows, "uncond": u, "guidance_scale": 3.0,
            "history": (h,), "reduction": "mean" if mean else "sum", "backend": "cpu",
        }  # fmt: skip
        noise |= {"noise_step": 3} if drawn else {}
        expected = ops.step_log_prob(**arguments, **noise, keeps=1)  # type: ignore[arg-type]
        taken = torch.ones(batch, dtype=torch.bool) if isinstance(rows, int) else rows >= 0
        assert_same_bits(got[:2], expected[:2])
        assert_same_bits([got[2][taken]], [expected[2][taken]])  # the kept output of a skipped sample is not written
        again = run_log_prob(library, {**tensors, "noise": got[1]}, table, rows, replay=True, mean=mean, shift=shift)
        assert_same_bits(again, got[:1])

    check()


def test_channels_last_noise_finds_its_places(library: ctypes.CDLL) -> None:
    x = torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    seeds, table = torch.tensor([3, 4]), table_for(torch.float32)
    flat = x.permute(0, 2, 3, 1).reshape(2, -1)
    library.set_runtime(0, 0, 0)
    tensors = {"sample": flat, "model_output": flat, "seeds": seeds}
    got = run_log_prob(library, tensors, table, 0, replay=False, mean=False, channels=3)
    expected = ops.step_log_prob(x, x, table, 0, seeds=seeds, noise_step=3, backend="cpu")
    assert_same_bits([got[0], got[1]], [expected[0], expected[1].permute(0, 2, 3, 1).reshape(2, -1)])


def test_launches_are_on_requested_stream_and_fail_with_a_reason(
    library: ctypes.CDLL, gram_library: ctypes.CDLL
) -> None:
    x = numbers(0, 2, 3000, torch.float32, "normal")
    tensors: dict[str, Tensor | None] = {"sample": x, "model_output": x, "noise": x}
    for loaded, run in (
        (gram_library, lambda: run_gram(gram_library, [x, x], True, 0)),
        (library, lambda: run_log_prob(library, tensors, table_for(x.dtype), 0, replay=True, mean=False)),
    ):
        loaded.set_runtime(1, 0, 0)
        run()
        state = runtime(loaded)
        assert (state["device"], state["launched_on"], state["stream"], state["launches"]) == (1, 0, STREAM, 2)
        loaded.set_runtime(1, 0, INVALID_CONFIGURATION)
        with pytest.raises(AssertionError, match="invalid configuration argument"):
            run()
