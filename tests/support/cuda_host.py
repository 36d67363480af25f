# SPDX-License-Identifier: MIT
"""csrc/cuda compiled as C++ and run on the CPU, for tests of the CUDA kernels' logic without a GPU.

The headers of ``tests/support/cuda_on_host`` stand in for CUDA's, and a launch runs every thread of every block in
turn.  What the threads compute, and each byte that they read and write, is then what a device's would: indices, tails,
strides, the choice of wide accesses, in-place outputs.
"""

from __future__ import annotations

import ctypes
import math
import os
import shutil
import struct
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastdiff.ops import backends
from fastdiff.ops.call import StepCall
from fastdiff.row_layout import KEEP_0, KEEP_1, PREV_SAMPLE
from support.oracle import DTYPES, Case, bits
from support.step_forms import NOISES, ROWS, StepForm

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "tests" / "support" / "cuda_on_host"
COMPILER = shutil.which(os.environ.get("CXX") or "c++") or shutil.which("g++")

needs_compiler = pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler: neither c++ nor g++ is on PATH")

#: As setup.py compiles the CPU's loops. -O1 keeps a pack one object, so that its copy counts as one access.
FLAGS = ["-O1", "-g0", "-ffp-contract=off", "-std=c++17", "-fPIC", "-fvisibility=hidden"]
#: Without it fma is a call of the C library: slower, and the same bits.
if torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512"):
    FLAGS += ["-mfma"]

#: Guard elements around each tensor.
GUARD = 32
INVALID_CONFIGURATION = 9

needs_cpu_backend = pytest.mark.skipif(backends.extension is None, reason="needs the C++ extension to compare with")


class Span(ctypes.Structure):
    """See tests/support/cuda_on_host/accesses.h; the pointer as an integer."""

    _fields_ = [(name, ctypes.c_int64) for name in ("begin", "bytes", "writable", "read", "written")]


class Kernel:
    """The compiled library."""

    def __init__(self, path: Path) -> None:
        self.library = ctypes.CDLL(str(path))
        self.library.step_on_host.restype = ctypes.c_char_p
        self.library.randn_on_host.restype = ctypes.c_char_p
        self.library.runtime_spans.restype = ctypes.c_int64
        self.runtime()

    def runtime(self, *, device: int = 0, backwards: bool = False, next_launch: int = 0) -> None:
        """Reset the mock of CUDA's runtime."""
        self.library.set_runtime(device, int(backwards), next_launch)

    def run(
        self, function: str, spans: Sequence[Span], sizes: Sequence[int], *pointers: Sequence[Tensor | None]
    ) -> ctypes.Array[Span]:
        """Launch; the spans with what was read and written of each. Fails where the kernel touches anything else."""
        array = (Span * (len(spans) + 16))(*spans)
        count = len(spans) + self.library.runtime_spans(ctypes.byref(array, len(spans) * ctypes.sizeof(Span)))
        addresses = [
            (ctypes.c_void_p * len(tensors))(*(None if t is None else t.data_ptr() for t in tensors))
            for tensors in pointers
        ]
        error = getattr(self.library, function)(
            (ctypes.c_int64 * len(sizes))(*map(int, sizes)), *addresses, 0, ctypes.c_void_p(0x5EED), array,
            ctypes.c_int64(count),
        )  # fmt: skip
        assert error is None, error.decode()
        return array

    @property
    def form(self) -> StepForm | None:
        """The form whose kernel was launched last; None for the general kernels."""
        key = self.library.get_form()
        if key < 0:
            return None
        values = (ctypes.c_int * 5)()
        self.library.describe_form(key, values)
        row, noise, guided, histories, outputs = values
        return StepForm(ROWS[row], NOISES[noise], bool(guided), histories, outputs)

    @property
    def state(self) -> dict[str, int]:
        values = (ctypes.c_int64 * 4)()
        self.library.get_runtime(values)
        return dict(zip(("device", "launches", "launched_on", "stream"), values, strict=True))


def build(folder: Path) -> Kernel:
    """Compile the kernels."""

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
    """A tensor's values in a separate buffer between guards, with `gap` elements between samples."""

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
        """Return True if nothing but the elements has changed."""
        self.before.as_strided(self.blocks.shape, self.blocks.stride(), self.blocks.storage_offset()).copy_(self.blocks)
        return torch.equal(bits(self.buffer), bits(self.before))

    def spans(self, writable: bool) -> list[Span]:
        size = self.blocks.element_size()
        samples, inner = self.blocks.shape
        first, stride = self.blocks.data_ptr(), self.blocks.stride(0) * size
        return [Span(first + i * stride, inner * size, int(writable), 0, 0) for i in range(samples)]


@dataclass
class Layout:
    """Memory layout of a case, and the inputs that the outputs overwrite."""

    shift: int = 0  # elements off a multiple of 16 bytes, of every tensor
    shifted: str = ""  # or of this one alone
    gap: int = 0  # elements between the samples of the model's tensors
    joined: bool = True  # one run of elements where nothing differs from sample to sample, as csrc/bindings.cpp does
    in_place: Sequence[str] = field(default=())


def _flat(tensor: Tensor) -> Tensor:
    """Return the elements of a dense tensor in memory order."""
    return tensor.as_strided((tensor.numel(),), (1,))


def _draws(call: StepCall) -> bool:
    """Return True if a canonical call with an int row adds noise."""
    noisy = call.table[call.row_index, [first + 7 for first in (PREV_SAMPLE, KEEP_0, KEEP_1)[: call.keeps + 1]]].any()
    return call.noise is not None or (call.seeds is not None and bool(noisy))


def run_call(kernel: Kernel, call: StepCall, layout: Layout = Layout()) -> None:  # noqa: B008
    """Run a canonical call in guarded copies of its dense tensors; check what it touched; copy back what it wrote."""
    sample = call.sample
    batch = 1 if layout.joined and layout.gap == 0 and not call.differs_per_sample else sample.shape[0]
    inner = sample.numel() // batch
    placed: dict[int, Placed] = {}  # by the tensor's address: outputs may be inputs
    tensors: dict[int, Tensor] = {}

    def place(name: str, tensor: Tensor | None, gap: int = 0, copies: int = 1) -> Placed | None:
        if tensor is None:
            return None
        at = tensor.data_ptr()
        if at not in placed:
            shift = layout.shift or int(layout.shifted == name)
            placed[at] = Placed.of(_flat(tensor), batch * copies, shift=shift, gap=gap)
            tensors[at] = tensor
        return placed[at]

    history = [*call.history, None, None, None, None][:4]
    inputs = {
        "sample": place("sample", sample),
        "model_output": place("model_output", call.model_output, layout.gap),
        "uncond": place("uncond", call.uncond, layout.gap),
        "variance": place("variance", call.variance, layout.gap),
        "noise": place("noise", call.noise),
        **{f"history_{j}": place(f"history_{j}", h) for j, h in enumerate(history)},
    }
    mask = place("mask", call.mask)
    outputs = [place(f"out_{o}", output) for o, output in enumerate(call.targets) if isinstance(output, Tensor)]
    copies = 0 if call.model_input is None else call.model_input.numel() // sample.numel()
    model_input = place("model_input", call.model_input, copies=copies)
    scale = call.guidance_scale if isinstance(call.guidance_scale, Tensor) else None
    scale_value = 0.0 if scale is not None or call.guidance_scale is None else float(call.guidance_scale)
    counters = dict(call.counters())
    scalars = [
        call.table,
        scale,
        call.threshold,
        *(counters.get(n) for n in ("row_index", "seeds", "noise_step")),
    ]

    always = [p for p in (*outputs, model_input) if p is not None]
    registers = [p for j in range(4) if (p := inputs[f"history_{j}"]) is not None] if call.write_history else []
    spans: list[Span] = []
    owners = []
    for one in placed.values():
        found = one.spans(writable=any(one is p for p in (*always, *registers)))
        owners += [one] * len(found)
        spans += found
    spans += [Span(s.data_ptr(), s.numel() * s.element_size(), 0, 0, 0) for s in scalars if s is not None]

    def stride(name: str) -> int:
        return int(name in counters and counters[name].numel() > 1)

    def number(name: str) -> int:
        value = getattr(call, name)
        return 0 if isinstance(value, Tensor) else value

    sizes = [
        *(batch, inner, inner + layout.gap, int(scale is not None and scale.numel() > 1)),
        *(len(outputs), call.variance_kind, DTYPES.index(sample.dtype)),
        *(len(call.table), number("row_index"), stride("row_index"), int(call.write_history), copies),
        0 if call.model_input is None else DTYPES.index(call.model_input.dtype),
        *(stride("noise_step"), number("noise_step"), call.purpose, call.channels()),
    ]
    named = [None if p is None else p.buffer.dtype for p in (*inputs.values(), *(*outputs, None, None)[:3])]
    seen = {dtype for dtype in (*named, None if call.mask is None else call.mask.dtype) if dtype is not None}
    sizes += [len(seen) > 1, torch.float64 in seen, *(0 if d is None else DTYPES.index(d) for d in named)]
    sizes += struct.unpack("q", struct.pack("d", scale_value))
    mask_type = 0 if mask is None else DTYPES.index(mask.buffer.dtype)
    sizes += [call.parts, mask_type]
    blocks = [None if p is None else p.blocks for p in inputs.values()]
    pointers = [*blocks, *scalars, *(None if p is None else p.blocks for p in (model_input, mask))]
    array = kernel.run("step_on_host", spans, sizes, pointers, [p.blocks for p in outputs if p is not None])

    # One pass over memory: every element that is there is read once, every output is written once. Where rows are a
    # sample's own, samples stay as they are and registers are not read or written, but never in parts.
    exact = not call.write_history and "row_index" not in counters
    for owner, span in zip(owners, array, strict=False):
        read = any(owner is p for p in (*inputs.values(), mask)) and (
            owner is not inputs["variance"] or not exact or _draws(call)
        )
        assert span.read in ((span.bytes if read else 0), span.bytes if exact and read else 0)
        wanted = [span.bytes] if any(owner is p for p in always) else [0, span.bytes] if span.writable else [0]
        if not exact and owner is inputs["sample"]:
            wanted.append(0)  # a sample that stays where it is
        assert span.written in wanted
    assert all(p.guards_are_intact() for p in placed.values())
    for at, one in placed.items():
        if any(one is p for p in (*always, *registers)):
            _flat(tensors[at]).copy_(one.blocks.reshape(-1))


def run_on_host(
    kernel: Kernel,
    case: Case,
    layout: Layout = Layout(),  # noqa: B008
    dtypes: Sequence[torch.dtype] | None = None,
) -> tuple[Tensor, ...]:
    """Run the step of a case; check its accesses; return its outputs, new ones in these dtypes."""
    own = case.with_tensors(lambda _, tensor: tensor.clone(memory_format=torch.contiguous_format))
    named = {f"history_{j}": h for j, h in enumerate(own.history)}
    overwritten = [named[name] if name in named else getattr(own, name) for name in layout.in_place]
    dtypes = dtypes or [own.sample.dtype] * (case.keeps + 1)
    new = [torch.full_like(own.sample, math.nan, dtype=dtype) for dtype in dtypes]
    outputs = (*overwritten, *new[len(overwritten) :])
    call = StepCall(
        sample=own.sample,
        model_output=own.model_output,
        table=own.table,
        row_index=0,
        uncond=own.uncond,
        guidance_scale=own.guidance,
        history=tuple(own.history),
        noise=own.noise,
        variance=own.variance,
        threshold=own.threshold,
        variance_kind=own.variance_kind,
        keeps=own.keeps,
        out=outputs,
    )
    run_call(kernel, call, layout)
    return outputs


def randn_on_host(
    kernel: Kernel,
    shape: Sequence[int],
    seeds: Tensor,
    step: int | Tensor,
    purpose: int,
    dtype: torch.dtype,
    shift: int = 0,
) -> Tensor:
    """Draw normal numbers into guarded memory, `shift` elements after a multiple of 16 bytes; check the accesses."""
    out = torch.full(tuple(shape), math.nan, dtype=dtype)
    placed = Placed.of(out, shape[0], shift=shift)
    steps = step if isinstance(step, Tensor) else None
    sizes = [shape[0], out[0].numel(), DTYPES.index(dtype)]
    sizes += [int(steps is not None and steps.numel() > 1), 0 if isinstance(step, Tensor) else step, purpose, 1]
    spans = placed.spans(writable=True)
    samples = len(spans)
    spans += [Span(s.data_ptr(), s.numel() * s.element_size(), 0, 0, 0) for s in (seeds, steps) if s is not None]
    array = kernel.run("randn_on_host", spans, sizes, [placed.blocks, seeds, steps])
    assert all((span.read, span.written) == (0, span.bytes) for span in array[:samples])
    assert placed.guards_are_intact()
    return placed.blocks.reshape(out.shape).clone()
