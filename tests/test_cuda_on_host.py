# SPDX-License-Identifier: MIT
"""The CUDA kernel's logic, where there is no GPU: csrc/cuda/step.cu compiled as C++ and run on the CPU.

The headers of ``tests/cuda_on_host`` stand in for CUDA's, and a launch runs every thread of every block in turn.  What
the threads compute, and each byte that they read and write, is then what a device's would: indices, tails, strides,
the choice of wide accesses, in-place outputs.  This proves nothing about speed, about how a device rounds, divides or
takes exp, or about what nvcc makes of the source; ``test_cuda_compile.py`` and ``test_gpu.py`` look at those.
"""

from __future__ import annotations

import ctypes
import math
import os
import random
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from fastdiff.ops import backends
from fastdiff.table import Variance
from oracle import (
    DTYPES,
    TIE_FACTORS,
    Case,
    Shape,
    all_bit_patterns,
    assert_same_bits,
    assert_within_rounding,
    bits,
    cases,
    make,
    plain_row,
)

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ROOT / "tests" / "cuda_on_host"
COMPILER = shutil.which(os.environ.get("CXX") or "c++") or shutil.which("g++")

pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler: neither c++ nor g++ is on PATH")

#: As setup.py compiles the CPU's loops. -O1 keeps a pack one object, so that its copy counts as one access.
FLAGS = ["-O1", "-g0", "-ffp-contract=off", "-std=c++17", "-fPIC", "-fvisibility=hidden"]
#: Without it fma is a call of the C library: slower, and the same bits.
if torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512"):
    FLAGS += ["-mfma"]

#: Elements around each tensor that belong to nobody.
GUARD = 32
INVALID_CONFIGURATION = 9

needs_cpu_backend = pytest.mark.skipif(backends.extension is None, reason="needs the C++ extension to compare with")


class Span(ctypes.Structure):
    """See tests/cuda_on_host/accesses.h; the pointer as an integer."""

    _fields_ = [(name, ctypes.c_int64) for name in ("begin", "bytes", "writable", "read", "written")]


class Kernel:
    """The compiled library."""

    def __init__(self, path: Path) -> None:
        self.library = ctypes.CDLL(str(path))
        self.library.step_on_host.restype = ctypes.c_char_p
        self.library.runtime_spans.restype = ctypes.c_int64
        self.runtime()

    def runtime(self, *, device: int = 0, backwards: bool = False, next_launch: int = 0) -> None:
        """Reset the stand-in for CUDA's runtime."""
        self.library.set_runtime(device, int(backwards), next_launch)

    @property
    def state(self) -> dict[str, int]:
        values = (ctypes.c_int64 * 4)()
        self.library.get_runtime(values)
        return dict(zip(("device", "launches", "launched_on", "stream"), values, strict=True))


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Kernel:
    folder = tmp_path_factory.mktemp("cuda_on_host")

    def run(*command: object) -> None:
        done = subprocess.run([COMPILER, *map(str, command)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr

    include = ["-I", SOURCES, "-I", ROOT / "csrc"]
    # The sanitizers' calls are answered by accesses.cpp, so their own libraries must not be linked.
    watched = ["-fsanitize=thread,alignment", "-fno-tree-sra"]
    run(*FLAGS, *watched, *include, "-c", SOURCES / "step_on_host.cpp", "-o", folder / "step.o")
    run(*FLAGS, *include, "-c", SOURCES / "accesses.cpp", "-o", folder / "accesses.o")
    run("-shared", folder / "step.o", folder / "accesses.o", "-o", folder / "step.so")
    return Kernel(folder / "step.so")


@dataclass
class Placed:
    """A tensor's values in a buffer of their own, between guards, `gap` elements between its samples."""

    buffer: Tensor
    before: Tensor
    blocks: Tensor  # [samples, elements], a view of the buffer

    @classmethod
    def of(cls, values: Tensor, samples: int, *, shift: int = 0, gap: int = 0) -> Placed:
        inner = values.numel() // samples
        buffer = torch.empty(2 * GUARD + shift + samples * (inner + gap), dtype=values.dtype)
        bits(buffer).fill_(0x7BAD)
        start = GUARD + shift
        # torch aligns its memory to 64 bytes and the guard is a multiple of 16: `shift` alone decides.
        blocks = buffer[start:].as_strided((samples, inner), (inner + gap, 1), start)
        blocks.copy_(values.reshape(samples, inner))
        return cls(buffer, buffer.clone(), blocks)

    def guards_are_intact(self) -> bool:
        """Nothing but the elements themselves has changed."""
        self.before.as_strided(self.blocks.shape, self.blocks.stride(), self.blocks.storage_offset()).copy_(self.blocks)
        return torch.equal(bits(self.buffer), bits(self.before))

    def spans(self, writable: bool) -> list[Span]:
        size = self.blocks.element_size()
        samples, inner = self.blocks.shape
        first, stride = self.blocks.data_ptr(), self.blocks.stride(0) * size
        return [Span(first + i * stride, inner * size, int(writable), 0, 0) for i in range(samples)]


@dataclass
class Layout:
    """How a case lies in memory, and which of its inputs the outputs overwrite."""

    shift: int = 0  # elements off a multiple of 16 bytes, of every tensor
    shifted: str = ""  # or of this one alone
    gap: int = 0  # elements between the samples of the model's tensors
    joined: bool = True  # one run of elements where nothing differs from sample to sample, as csrc/bindings.cpp does
    in_place: Sequence[str] = field(default=())


def run_on_host(kernel: Kernel, case: Case, layout: Layout = Layout()) -> tuple[Tensor, ...]:  # noqa: B008
    """Run a step; check what it touched; return its outputs."""
    shape, dtype = case.sample.shape, case.sample.dtype
    a_sample = case.threshold is not None or (case.guidance is not None and case.guidance.numel() > 1)
    batch = 1 if layout.joined and not a_sample and layout.gap == 0 else shape[0]
    inner = case.sample.numel() // batch

    def place(name: str, values: Tensor | None, gap: int = 0) -> Placed | None:
        if values is None:
            return None
        shift = layout.shift or int(layout.shifted == name)
        return Placed.of(values, batch, shift=shift, gap=gap)

    history = [*case.history, None, None, None, None][:4]
    inputs = {
        "sample": place("sample", case.sample),
        "model_output": place("model_output", case.model_output, layout.gap),
        "uncond": place("uncond", case.uncond, layout.gap),
        "variance": place("variance", case.variance, layout.gap),
        "noise": place("noise", case.noise),
        **{f"history_{j}": place(f"history_{j}", h) for j, h in enumerate(history)},
    }
    outputs: list[Placed] = []
    overwritten = list(layout.in_place)
    for o in range(case.keeps + 1):
        target = inputs[overwritten.pop(0)] if overwritten else None
        outputs.append(target or place(f"out_{o}", torch.full_like(case.sample, math.nan)))  # type: ignore[arg-type]
    scalars = [case.table[0].contiguous(), case.guidance, case.threshold]

    spans: list[Span] = []
    placed = {id(p): p for p in (*inputs.values(), *outputs) if p is not None}
    owners = []
    for one in placed.values():
        found = one.spans(writable=any(one is output for output in outputs))
        owners += [one] * len(found)
        spans += found
    spans += [Span(s.data_ptr(), s.numel() * s.element_size(), 0, 0, 0) for s in scalars if s is not None]
    array = (Span * (len(spans) + 16))(*spans)
    count = len(spans) + kernel.library.runtime_spans(ctypes.byref(array, len(spans) * ctypes.sizeof(Span)))

    def pointers(tensors: Sequence[Tensor | None]) -> ctypes.Array[ctypes.c_void_p]:
        return (ctypes.c_void_p * len(tensors))(*(None if t is None else t.data_ptr() for t in tensors))

    stride = 1 if case.guidance is not None and case.guidance.numel() > 1 else 0
    numbers = [batch, inner, inner + layout.gap, stride, len(outputs), case.variance_kind, DTYPES.index(dtype), 0]
    error = kernel.library.step_on_host(
        (ctypes.c_int64 * 8)(*numbers),
        pointers([*(None if p is None else p.blocks for p in inputs.values()), *scalars]),
        pointers([o.blocks for o in outputs]),
        ctypes.c_void_p(0x5EED),
        array,
        ctypes.c_int64(count),
    )
    assert error is None, error.decode()
    # One pass over memory: every element that is there is read once, every output is written once.
    unread = [] if case.noise is not None else [inputs["variance"]]
    for owner, span in zip(owners, array, strict=False):
        read = any(owner is p for p in inputs.values()) and not any(owner is p for p in unread)
        assert span.read == (span.bytes if read else 0)
        assert span.written == (span.bytes if span.writable else 0)
    assert all(p.guards_are_intact() for p in placed.values())
    return tuple(o.blocks.reshape(shape).clone() for o in outputs)


def learned_range(case: Case) -> bool:
    """Whether exp, which no standard rounds correctly, is in the result."""
    return case.noise is not None and case.variance_kind == Variance.LEARNED_RANGE


def some_layout(case: Case, seed: int) -> Layout:
    """A layout that fits a case."""
    rng = random.Random(seed)
    elements = 16 // case.sample.element_size()
    inputs = ["sample", "model_output"]
    inputs += [name for name in ("uncond", "noise") if getattr(case, name) is not None]
    inputs += [f"history_{j}" for j, h in enumerate(case.history) if h is not None]
    rng.shuffle(inputs)
    gap = rng.choice([0, 0, elements, 3])
    if gap:
        inputs = [name for name in inputs if name not in ("model_output", "uncond")]
    return Layout(
        shift=rng.choice([0, 0, 0, 1, elements - 1]),
        shifted=rng.choice(["", "", "", "out_0", *inputs]),
        gap=gap,
        joined=rng.random() < 0.5,
        in_place=rng.choice([(), (), inputs[: case.keeps + 1]]),
    )


# --- The formula -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_step_on_host_is_the_formula_to_rounding(kernel: Kernel, dtype: torch.dtype) -> None:
    @settings(max_examples=150)
    @given(plan=cases([dtype]))
    def check(plan: Shape) -> None:
        case = make(plan)
        kernel.runtime(backwards=plan.seed % 2 == 1)
        assert_within_rounding(case, run_on_host(kernel, case, some_layout(case, plan.seed)), "cuda")

    check()


@needs_cpu_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kernel_on_host_gives_the_bits_of_the_cpu_backend(kernel: Kernel, dtype: torch.dtype) -> None:
    rng = random.Random(repr(dtype))
    kernel.runtime()
    for _ in range(120):
        # Sizes around a pack, a block of 256 threads, and a block of 256 packs.
        sizes = (1, 7, 8, 15, 16, 17, 64, 255, 256, 257, 1000, 2047, 2048, 2049)
        plan = Shape(
            seed=rng.randrange(2**32),
            dtype=dtype,
            shape=(rng.randint(1, 4), rng.choice(sizes)),
            guidance=rng.choice(("none", "scalar", "a sample")),
            registers=rng.randrange(16),
            noise=rng.random() < 0.7,
            variance_kind=rng.choice((Variance.FIXED, Variance.LEARNED)),
            threshold=rng.random() < 0.5,
            keeps=rng.randrange(3),
            clip=rng.random() < 0.5,
        )
        case = make(plan)
        assert not learned_range(case)
        assert_same_bits(run_on_host(kernel, case, some_layout(case, plan.seed)), case.run("cpu"))


@needs_cpu_backend
def test_halves_of_doubled_channels_are_read_where_they_lie(kernel: Kernel) -> None:
    kernel.runtime()
    for dtype in DTYPES:
        case = make(Shape(5, dtype, (3, 4, 5, 8), "a sample", noise=True, variance_kind=Variance.LEARNED))
        both = torch.cat([case.model_output, case.variance], dim=1)
        case.model_output, case.variance = both.chunk(2, dim=1)
        assert case.model_output.stride(0) == 2 * case.sample.stride(0)
        assert_same_bits(run_on_host(kernel, case, Layout(gap=4 * 5 * 8)), case.run("cpu"))


def test_a_term_without_a_coefficient_is_not_added(kernel: Kernel) -> None:
    kernel.runtime()
    for seed, dtype in enumerate(DTYPES):
        case = make(Shape(seed, dtype, (2, 24), "scalar", 15, noise=True, keeps=2))
        expected = run_on_host(kernel, case)

        def poisoned(name: str, tensor: Tensor, unused: tuple[str, ...] = case.unused) -> Tensor:
            return torch.full_like(tensor, math.nan) if name in unused else tensor

        assert_same_bits(run_on_host(kernel, case.with_tensors(poisoned)), expected)


def test_nan_stays_nan_through_clip_and_threshold(kernel: Kernel) -> None:
    kernel.runtime()
    row = plain_row(p=1.0, clip=0.5, prev_d=1.0)
    sample = torch.tensor([[math.nan, 9.0, -9.0, 0.25, math.inf]])
    (clipped,) = run_on_host(kernel, Case(sample, torch.zeros_like(sample), row))
    assert_same_bits([clipped], [torch.tensor([[math.nan, 0.5, -0.5, 0.25, 0.5]])])
    (scaled,) = run_on_host(kernel, Case(sample, torch.zeros_like(sample), row, threshold=torch.tensor([0.4])))
    assert_same_bits([scaled], [torch.tensor([[math.nan, 1.0, -1.0, 0.625, 1.0]])])


@needs_cpu_backend
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_number_of_a_half_type_comes_and_goes_as_on_the_cpu(kernel: Kernel, dtype: torch.dtype) -> None:
    # Of the conversions only their use is the kernel's; that the stand-ins are right is what the other tests rest on.
    kernel.runtime()
    numbers = all_bit_patterns(dtype)[None]
    for factor in TIE_FACTORS:
        case = Case(numbers, numbers, plain_row(prev_x=factor))
        assert_same_bits(run_on_host(kernel, case), case.run("cpu"))


# --- What threads touch ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backwards", [False, True], ids=["forwards", "backwards"])
@pytest.mark.parametrize("target", ["sample", "model_output", "uncond", "noise", "history_0", "history_3"])
def test_output_on_an_input_is_what_it_is_elsewhere(kernel: Kernel, target: str, backwards: bool) -> None:
    # In either order of threads: none reads what another has written.
    kernel.runtime(backwards=backwards)
    for dtype in DTYPES:
        case = make(Shape(11, dtype, (2, 600), "a sample", 15, noise=True, threshold=True, keeps=1))
        others = [name for name in ("sample", "history_1") if name != target]
        expected = run_on_host(kernel, case)
        assert_same_bits(run_on_host(kernel, case, Layout(in_place=[target, others[0]])), expected)


def test_each_misplaced_tensor_alone_forbids_wide_accesses(kernel: Kernel) -> None:
    # run_on_host fails on an access that its pointer is not aligned for.
    kernel.runtime()
    names = ["sample", "model_output", "uncond", "variance", "noise", *(f"history_{j}" for j in range(4))]
    names += [f"out_{o}" for o in range(3)]
    for dtype in DTYPES:
        case = make(Shape(3, dtype, (2, 64), "scalar", 15, True, Variance.LEARNED, threshold=True, keeps=2))
        expected = run_on_host(kernel, case)
        for name in names:
            assert_same_bits(run_on_host(kernel, case, Layout(shifted=name)), expected)


@pytest.mark.parametrize("gap", [1, 3, 8])
def test_samples_that_start_off_a_pack_forbid_wide_accesses(kernel: Kernel, gap: int) -> None:
    kernel.runtime()
    for dtype in DTYPES:
        for inner in (31, 32):
            case = make(Shape(4, dtype, (3, inner), "a sample"))
            assert_within_rounding(case, run_on_host(kernel, case, Layout(gap=gap)), "cuda")


# --- The launch ------------------------------------------------------------------------------------------------------


def test_launch_is_one_on_the_stream_and_device_asked_for(kernel: Kernel) -> None:
    case = make(Shape(0, torch.float32, (2, 40)))
    kernel.runtime(device=1)
    run_on_host(kernel, case)
    # The current device is the caller's again.
    assert kernel.state == {"device": 1, "launches": 1, "launched_on": 0, "stream": 0x5EED}


def test_launch_that_fails_says_why_and_restores_the_device(kernel: Kernel) -> None:
    case = make(Shape(0, torch.float32, (2, 40)))
    kernel.runtime(device=1, next_launch=INVALID_CONFIGURATION)
    with pytest.raises(AssertionError, match="invalid configuration argument"):
        run_on_host(kernel, case)
    assert kernel.state["device"] == 1
    assert kernel.state["launches"] == 0
    run_on_host(kernel, case)  # the error has been taken: the next launch is not blamed for it
