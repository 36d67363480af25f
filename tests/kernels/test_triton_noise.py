# SPDX-License-Identifier: MIT
"""Triton's noise under its interpreter: the words of Philox bitwise, and with a fused fma the numbers too.

The interpreter rounds the product of an fma before it adds; compiled kernels do not (``test_triton_compile.py`` counts
their instructions).  With an fma that rounds once in its place the kernels have to give the bits of the CPU.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastdiff import ops, philox
from fastdiff.ops import backends
from support.oracle import DTYPES, INTERPRETED, assert_same_bits
from support.row_batches import random_batch, run_batch, solver_batch

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
device_philox = pytest.importorskip("fastdiff.kernels.philox").philox
pytestmark = pytest.mark.skipif(not INTERPRETED, reason="TRITON_INTERPRET is not 1: test_gpu.py runs what is compiled")

needs_cpu_backend = pytest.mark.skipif(backends.extension is None, reason="needs the C++ extension to compare with")

#: Of Random123's known answers: counter, key, words.
KNOWN = (
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
)

#: How far rounding a product before its sum can move a number z = r·cos θ with r ≤ √(2·33·ln 2) < 6.8. On the way to r
#: and to cos θ lie at most 12 such sums each; each moves its result by at most the rounding of a product that is no
#: larger, 2⁻²⁴ relatively.  A wrong word, octant or sign moves most numbers by 0.1 and more.
UNFUSED = 24 * 2.0**-24 * 6.8


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the interpreter's float32 fma by one that rounds once."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    unfused = InterpreterBuilder.create_fma

    def create_fma(self: Any, x: Any, y: Any, z: Any) -> Any:
        if z.data.dtype != "float32":
            return unfused(self, x, y, z)
        a, b, c = (torch.from_numpy(value.data.copy()) for value in (x, y, z))
        # Infinities and NaN would be NaN there in more cases than here.
        exact = torch.where(torch.isfinite(a * b + c), philox._fma(a, b, c), a * b + c)
        return TensorHandle(exact.numpy(), z.dtype.scalar)

    monkeypatch.setattr(InterpreterBuilder, "create_fma", create_fma)


@triton.jit
def words_kernel(counter_ptr, key_ptr, out_ptr):
    one = tl.arange(0, 1)
    w0, w1, w2, w3 = device_philox(
        tl.load(counter_ptr + one).to(tl.uint32),
        tl.load(counter_ptr + 1 + one).to(tl.uint32),
        tl.load(counter_ptr + 2 + one).to(tl.uint32),
        tl.load(counter_ptr + 3 + one).to(tl.uint32),
        tl.load(key_ptr).to(tl.uint32),
        tl.load(key_ptr + 1).to(tl.uint32),
    )
    tl.store(out_ptr + one, w0.to(tl.int64))
    tl.store(out_ptr + 1 + one, w1.to(tl.int64))
    tl.store(out_ptr + 2 + one, w2.to(tl.int64))
    tl.store(out_ptr + 3 + one, w3.to(tl.int64))


def test_triton_philox_gives_known_answers() -> None:
    for counter, key, expected in KNOWN:
        out = torch.zeros(4, dtype=torch.int64)
        words_kernel[(1,)](torch.tensor(counter), torch.tensor(key), out)
        assert tuple(out.tolist()) == expected


@pytest.mark.parametrize("step", [0, 2**31 - 1, 2**31, 2**32 - 1, torch.tensor([7]), torch.tensor([3, 2**32 - 1])])
def test_triton_randn_matches_reference_except_interpreters_fma(step: int | torch.Tensor) -> None:
    seeds = torch.tensor([-(2**63), 0x0123456789ABCDEF])
    for shape in ((2, 1), (2, 5, 7), (2, 1030)):
        drawn = ops.randn(shape, seeds, step, 2**32 - 1, backend="triton")
        expected = ops.randn(shape, seeds, step, 2**32 - 1, backend="reference")
        assert float((drawn - expected).abs().max()) <= UNFUSED


@pytest.mark.parametrize("dtype", [d for d in DTYPES if d != torch.bfloat16], ids=str)
def test_triton_randn_with_fused_fma_matches_reference_bitwise(fused: None, dtype: torch.dtype) -> None:
    seeds = torch.tensor([-1, 0x0123456789ABCDEF])
    for shape in ((2, 1), (2, 3), (2, 2049)):
        drawn = ops.randn(shape, seeds, 5, 6, dtype=dtype, backend="triton")
        assert_same_bits([drawn], [ops.randn(shape, seeds, 5, 6, dtype=dtype, backend="reference")])


@needs_cpu_backend
@pytest.mark.parametrize("channels_last", [False, True], ids=["row-major", "channels-last"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_triton_rows_with_fused_fma_match_cpu_bitwise(fused: None, dtype: torch.dtype, channels_last: bool) -> None:
    batch = solver_batch(5, dtype, (3, 19, 21), channels_last=channels_last)
    assert_same_bits(run_batch(batch, "triton"), run_batch(batch, "cpu"))
    for seed in range(12):
        batch = random_batch(seed, dtype, (torch.float16, torch.float32, torch.float64))
        if batch["variance_kind"] == 1:
            batch["variance_kind"] = 2  # exp is nobody's standard
        assert_same_bits(run_batch(batch, "triton"), run_batch(batch, "cpu"))
