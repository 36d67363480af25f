# SPDX-License-Identifier: MIT
"""Logic of the reductions' CUDA kernels without a GPU: compiled as C++ and run on the CPU.

``tests/support/cuda_on_host/blocks.h`` runs the threads of a block in turns, from one barrier or shuffle to the next,
forwards or backwards; shared memory and atomics are plain memory.  What is shown is that the kernels add in the order
of ``csrc/reduce_math.h`` and find the same elements as the CPU's loops, on any alignment, and write nothing else.  What
is not: memory ordering between blocks that really run at once, and speed.
"""

from __future__ import annotations

import ctypes
import math
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastdiff import ops
from fastdiff.ops import backends
from fastdiff.ops.reductions_reference import rank
from fastdiff.row_layout import compute_dtype
from support.oracle import DTYPES, assert_same_bits, bits

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "tests" / "support" / "cuda_on_host"
COMPILER = shutil.which(os.environ.get("CXX") or "c++") or shutil.which("g++")
FLAGS = ["-O1", "-g0", "-ffp-contract=off", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-fsanitize=alignment"]
#: Without it fma is a call of the C library: slower, and the same bits.
if torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512"):
    FLAGS += ["-mfma"]

KINDS = ("mean", "std", "norm", "dot")
STREAM = 0x5EED
INVALID_CONFIGURATION = 9
#: Bytes around each buffer that belong to nobody, and what they hold: NaN as a half, a float and a double.
GUARD = 64
FOREIGN = 0xFF

pytestmark = [
    pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler: neither c++ nor g++ is on PATH"),
    pytest.mark.skipif(backends.extension is None, reason="needs the C++ extension to compare with"),
]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    loaded = load(tmp_path_factory.mktemp("reductions_on_host"), "sum_on_host", "select_on_host")
    loaded.scratch_on_host.restype = ctypes.c_int64
    return loaded


def load(folder: Path, *names: str, definitions: tuple[str, ...] = ()) -> ctypes.CDLL:
    """Compile sources of tests/support/cuda_on_host, and load them as one library."""
    objects = []
    for name in names:
        objects.append(folder / f"{name}.o")
        _run(*FLAGS, *definitions, "-I", SOURCES, "-I", ROOT / "csrc", "-c", SOURCES / f"{name}.cpp", "-o", objects[-1])
    # runtime.h answers the sanitizer's call, so its own library must not be linked.
    _run("-shared", *objects, "-o", folder / "library.so")
    return ctypes.CDLL(str(folder / "library.so"))


def _run(*command: object) -> None:
    done = subprocess.run([COMPILER, *map(str, command)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


class Buffer:
    """Memory of a tensor between guards, `shift` elements after a multiple of 64 bytes."""

    def __init__(self, size: int, dtype: torch.dtype, shift: int = 0) -> None:
        width = torch.empty((), dtype=dtype).element_size()
        self.bytes = torch.full((2 * GUARD + (size + shift) * width + 64,), FOREIGN, dtype=torch.uint8)
        start = GUARD + -self.bytes.data_ptr() % 64 + shift * width
        self.inside = slice(start, start + size * width)
        self.values = self.bytes[self.inside].view(dtype)

    def guards_are_intact(self) -> bool:
        outside = self.bytes.clone()
        outside[self.inside] = FOREIGN
        return bool((outside == FOREIGN).all())


def _launch(library: ctypes.CDLL, name: str, sizes: list[int], buffers: list[Buffer | None], number: float) -> None:
    pointers = (ctypes.c_void_p * len(buffers))(*(None if b is None else b.values.data_ptr() for b in buffers))
    function = getattr(library, name)
    function.restype = ctypes.c_char_p
    error = function((ctypes.c_int64 * len(sizes))(*sizes), pointers, ctypes.c_double(number), ctypes.c_void_p(STREAM))
    state = runtime(library)
    assert not state["diverged"], "threads of a block wait at different places"
    assert not state["misaligned"], "an access that is not aligned as a device wants it"
    assert all(b is None or b.guards_are_intact() for b in buffers)
    assert error is None, error.decode()


def runtime(library: ctypes.CDLL) -> dict[str, int]:
    values = (ctypes.c_int64 * 6)()
    library.get_runtime(values)
    names = ("device", "launches", "launched_on", "stream", "diverged", "misaligned")
    return dict(zip(names, values, strict=True))


def _placed(values: Tensor, shift: int) -> Buffer:
    buffer = Buffer(values.numel(), values.dtype, shift)
    buffer.values.copy_(values.reshape(-1))
    return buffer


def run_sum(library: ctypes.CDLL, kind: str, x: Tensor, y: Tensor | None, correction: float, shift: int) -> Tensor:
    batch, inner = x.shape
    compute = compute_dtype(x.dtype)
    partials = Buffer(batch * math.ceil(inner / 1024) * (3 if kind == "std" else 1), compute)
    out = Buffer(batch, compute)
    buffers = [_placed(x, shift), None if y is None else _placed(y, shift), partials, out]
    _launch(library, "sum_on_host", [KINDS.index(kind), DTYPES.index(x.dtype), batch, inner, 0], buffers, correction)
    return out.values.clone()


def run_quantile(library: ctypes.CDLL, x: Tensor, q: float, absolute: bool, shift: int) -> Tensor:
    batch, inner = x.shape
    compute = compute_dtype(x.dtype)
    low, weight = rank(q, inner, compute)
    sizes = [DTYPES.index(x.dtype), batch, inner, low, int(absolute), 0]
    scratch = Buffer(library.scratch_on_host((ctypes.c_int64 * 6)(*sizes)), torch.uint8)
    out = Buffer(batch, compute)
    _launch(library, "select_on_host", sizes, [_placed(x, shift), scratch, out], weight)
    return out.values.clone()


SIZES = st.one_of(st.integers(1, 70), st.sampled_from([1023, 1024, 1025, 2048, 5000, 8192, 8200, 66000]))
SHIFTS = st.sampled_from([0, 0, 1, 2])


def numbers(seed: int, batch: int, inner: int, dtype: torch.dtype, spread: str) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, inner, generator=generator, dtype=torch.float64)
    if spread == "few":
        x = (2 * x).round()
    elif spread == "narrow":  # alike in the first digits
        x = 1 + 1e-4 * x
    elif spread == "wide":
        x = x * torch.exp2(torch.randint(-12, 12, x.shape, generator=generator))
    return x.to(dtype)


SPREADS = st.sampled_from(["normal", "few", "narrow", "wide"])
SEEDS = st.integers(0, 2**32 - 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_sums_on_host_match_cpu_bitwise(library: ctypes.CDLL, kind: str, dtype: torch.dtype) -> None:
    @settings(max_examples=20)
    @given(seed=SEEDS, batch=st.integers(1, 3), inner=SIZES, shift=SHIFTS, spread=SPREADS)
    def check(seed: int, batch: int, inner: int, shift: int, spread: str) -> None:
        x, y = (numbers(seed + i, batch, inner, dtype, spread) for i in range(2))
        library.set_runtime(0, seed % 2, 0)
        arguments = {"mean": (), "std": (0.5,), "norm": (), "dot": (y,)}[kind]
        got = run_sum(library, kind, x, y if kind == "dot" else None, 0.5, shift)
        assert_same_bits([got], [getattr(ops, kind)(x, *arguments, backend="cpu")])

    check()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_quantiles_on_host_match_cpu_bitwise(library: ctypes.CDLL, dtype: torch.dtype) -> None:
    @settings(max_examples=60)
    @given(
        seed=SEEDS,
        batch=st.integers(1, 3),
        inner=SIZES,
        shift=SHIFTS,
        spread=SPREADS,
        q=st.one_of(st.sampled_from([0.0, 0.5, 0.995, 1.0]), st.floats(0, 1)),
        absolute=st.booleans(),
        bad=st.sampled_from([None, None, None, math.nan, -math.nan, math.inf, -math.inf]),
    )
    def check(
        seed: int, batch: int, inner: int, shift: int, spread: str, q: float, absolute: bool, bad: float | None
    ) -> None:
        x = numbers(seed, batch, inner, dtype, spread)
        if bad is not None:
            x[seed % batch, seed % inner] = bad
        library.set_runtime(0, seed % 2, 0)
        got = run_quantile(library, x, q, absolute, shift)
        assert_same_bits([got], [ops.quantile(x, q, absolute, backend="cpu")])

    check()


@pytest.mark.parametrize("backwards", [0, 1], ids=["forwards", "backwards"])
def test_threads_synchronize_in_either_order(library: ctypes.CDLL, backwards: int) -> None:
    # More blocks than lanes, and other numbers in every call: what a thread finds too early is of the call before.
    for seed in range(3):
        library.set_runtime(0, backwards, 0)
        x, y = (numbers(seed + i, 2, 70_000, torch.float32, "wide") for i in range(2))
        for kind, arguments in (("mean", ()), ("std", (0.5,)), ("norm", ()), ("dot", (y,))):
            got = run_sum(library, kind, x, y if kind == "dot" else None, 0.5, 0)
            assert_same_bits([got], [getattr(ops, kind)(x, *arguments, backend="cpu")])
        for q in (0.1, 0.9):
            assert_same_bits([run_quantile(library, x, q, False, 0)], [ops.quantile(x, q, backend="cpu")])


def test_second_call_is_independent_of_first(library: ctypes.CDLL) -> None:
    # Scratch memory may hold anything: here it is full of ones, then of what another call has left.
    for seed in range(3):
        library.set_runtime(0, 0, 0)
        x = numbers(seed, 2, 3000, torch.float32, "narrow")
        assert_same_bits([run_quantile(library, x, 0.3, False, 0)], [ops.quantile(x, 0.3, backend="cpu")])


def test_launches_are_on_requested_stream_and_device(library: ctypes.CDLL) -> None:
    x = numbers(0, 2, 3000, torch.float32, "normal")
    for run, launches in (
        (lambda: run_sum(library, "mean", x, None, 0.0, 0), 2),
        # The state is cleared, and a float has three digits.
        (lambda: run_quantile(library, x, 0.3, False, 0), 4),
    ):
        library.set_runtime(1, 0, 0)
        run()
        state = runtime(library)
        # The current device is the caller's again.
        assert (state["device"], state["launched_on"], state["stream"], state["launches"]) == (1, 0, STREAM, launches)


def test_failing_launch_has_reason_and_is_last(library: ctypes.CDLL) -> None:
    x = numbers(0, 2, 3000, torch.float32, "normal")
    for run in (
        lambda: run_sum(library, "mean", x, None, 0.0, 0),
        lambda: run_quantile(library, x, 0.3, False, 0),
    ):
        library.set_runtime(1, 0, INVALID_CONFIGURATION)
        with pytest.raises(AssertionError, match="invalid configuration argument"):
            run()
        state = runtime(library)
        assert (state["device"], state["launches"]) == (1, 0)
        run()  # the error has been taken


@pytest.mark.parametrize("config", [(256, 256, 256, 32, 1), (256, 256, 256, 512, 1024)], ids=["small", "large"])
def test_reductions_on_host_do_not_depend_on_the_configuration(library: ctypes.CDLL, config: tuple[int, ...]) -> None:
    library.set_runtime(0, 0, 0)
    assert library.set_config((ctypes.c_int * 5)(*config))
    try:
        for dtype in DTYPES:
            x, y = (numbers(i, 2, 9000, dtype, "normal") for i in range(2))
            for kind, arguments in (("mean", ()), ("std", (0.5,)), ("norm", ()), ("dot", (y,))):
                got = run_sum(library, kind, x, y if kind == "dot" else None, 0.5, 0)
                assert_same_bits([got], [getattr(ops, kind)(x, *arguments, backend="cpu")])
            assert_same_bits([run_quantile(library, x, 0.3, False, 0)], [ops.quantile(x, 0.3, backend="cpu")])
    finally:
        assert library.set_config(None)


def test_guards_detect_foreign_write() -> None:
    buffer = Buffer(5, torch.float32, 1)
    assert buffer.guards_are_intact()
    buffer.values.fill_(1.0)
    assert buffer.guards_are_intact()
    assert bits(buffer.values).numel() == 5
    buffer.bytes[buffer.inside.stop] = 0
    assert not buffer.guards_are_intact()
