# SPDX-License-Identifier: MIT
"""Kernels of the step's forms on the host: every listed form has the CPU's bits, and a call takes the kernel expected.

See ``test_cuda_on_host.py`` for what the host proves and what it does not.
"""

from __future__ import annotations

import ctypes
import math
import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdiff import ops
from fastdiff.ops.call import StepCall
from fastdiff.ops.canonicalize import canonicalize
from fastdiff.ops.checks import check
from fastdiff.row_layout import (
    CLIP,
    KEEP_0,
    MODEL_INPUT_SCALE,
    PREV_SAMPLE,
    ROW_WIDTH,
    STORE_0,
    STORE_1,
    Variance,
    compute_dtype,
)
from support.cuda_host import Kernel, Layout, Span, needs_compiler, needs_cpu_backend, run_call
from support.oracle import DTYPES as ALL_DTYPES
from support.oracle import assert_same_bits, plain_row
from support.step_forms import LIST, StepForm, listed

pytestmark = [needs_compiler, needs_cpu_backend]

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
FORMS = list(listed(LIST.read_text(encoding="utf-8")))
#: Columns of history slot 0 and of the noise in each map.
HISTORY, NOISE = 3, 7


def some_table(rng: random.Random, form: StepForm, slots: list[int], dtype: torch.dtype) -> Tensor:
    """Return a table of three random rows; half of their coefficients are 0, and absent columns are too."""
    gen = torch.Generator().manual_seed(rng.randrange(2**32))
    table = torch.randn(3, ROW_WIDTH, generator=gen, dtype=torch.float64)
    table = torch.where(torch.rand(table.shape, generator=gen) < 0.5, 0.0, table)
    table[:, CLIP] = torch.tensor([math.inf, 0.7, 0.3])
    table[:, MODEL_INPUT_SCALE] = 0.7316
    for row in table:
        kept = rng.sample(slots, min(2, len(slots))) if form.row == "kByIndex" else []
        row[STORE_0], row[STORE_1] = rng.sample([-1, -1, *kept], 2) if kept else (-1, -1)
        for first, store in ((PREV_SAMPLE, 0), (KEEP_0, row[STORE_0]), (KEEP_0 + 8, row[STORE_1])):
            weights = row[first : first + 8]
            if form.row == "kByIndex" and store < 0:
                weights.zero_()
            weights[[HISTORY + j for j in range(4) if j not in slots]] = 0.0
            if form.noise == "kNone":
                weights[NOISE] = 0.0
    return table.to(compute_dtype(dtype))


def some_call(
    seed: int, form: StepForm, dtype: torch.dtype, shape: tuple[int, ...], *, poison: bool = True
) -> StepCall:
    """Return a call of a form: random history slots, NaN in tensors that no row reads, mostly a model input."""
    rng = random.Random(seed)
    gen = torch.Generator().manual_seed(seed)
    batch = shape[0]
    slots = sorted(rng.sample(range(4), form.histories))
    table = some_table(rng, form, slots, dtype)
    row: int | Tensor = rng.randrange(3)
    if form.row == "kByIndex":
        row = torch.tensor([rng.randint(-2, 2) for _ in range(rng.choice((1, batch)))])
    reads = table[:, PREV_SAMPLE:].reshape(3, 3, 8)[row if isinstance(row, int) else slice(None)].reshape(-1, 8).any(0)

    def tensor(column: int | None = None) -> Tensor:
        values = torch.randn(shape, generator=gen).to(dtype)
        return torch.full_like(values, math.nan) if poison and column is not None and not reads[column] else values

    scales = torch.rand(rng.choice((1, batch)), generator=gen).mul(8).to(table.dtype)
    copies = rng.randrange(3)
    drawn = form.noise == "kDrawn"
    return StepCall(
        sample=tensor(),
        model_output=tensor(),
        table=table,
        row_index=row,
        uncond=tensor() if form.guided else None,
        guidance_scale=scales if form.guided else None,
        history=tuple(tensor(HISTORY + j) if j in slots else None for j in range(4)),
        noise=tensor(NOISE) if form.noise == "kGiven" else None,
        seeds=torch.randint(-(2**63), 2**63 - 1, (batch,), generator=gen) if drawn else None,
        noise_step=rng.choice((rng.randrange(2**32), torch.randint(0, 2**32, (batch,), generator=gen))) if drawn else 0,
        purpose=rng.randrange(2**32),
        keeps=form.outputs - 1 if form.row == "kByValue" else 0,
        model_input=torch.full((copies * batch, *shape[1:]), math.nan, dtype=dtype) if copies else None,
        write_history=form.row == "kByIndex",
    )


def copied(call: StepCall) -> StepCall:
    """Return the call with history and model input of its own."""
    history = tuple(None if h is None else h.clone() for h in call.history)
    return replace(call, history=history, model_input=None if call.model_input is None else call.model_input.clone())


def on_cpu(call: StepCall) -> list[Tensor]:
    """Return what the CPU backend writes: the outputs, history that is written, the model input."""
    own = copied(call)
    given: dict[str, Any] = {name: getattr(own, name) for name in own.__dataclass_fields__}
    given.pop("out")
    assert given.pop("parts") == 1  # canonicalization sets it, callers do not
    if given.pop("write_history"):
        given.pop("keeps")
        outputs = (ops.step_rows(**given, backend="cpu"),)
    else:
        outputs = ops.step(**given, backend="cpu")
    return [*outputs, *written(own)]


def written(call: StepCall) -> list[Tensor]:
    history = call.history if call.write_history else ()
    return [tensor for tensor in (*history, call.model_input) if tensor is not None]


def on_host(
    kernel: Kernel,
    call: StepCall,
    layout: Layout = Layout(),  # noqa: B008
    in_place: bool = False,
) -> list[Tensor]:
    """Run a call on the host as ops does for a backend; its new outputs hold NaN before."""
    own = copied(call)
    if in_place:
        own = replace(own, out=(own.sample, *[h for h in own.history if h is not None][: own.keeps]))
    check(own)
    canonical = canonicalize(own)
    outputs = [target for target in canonical.targets if isinstance(target, Tensor)]
    if not in_place:
        for output in outputs[:1] if own.write_history else outputs:
            output.fill_(math.nan)
    run_call(kernel, canonical, layout)
    return [*outputs, *written(canonical)]


def with_number(call: StepCall) -> StepCall:
    """Return the call with its guidance scale as a number, where it is one for all samples."""
    scale = call.guidance_scale
    return replace(call, guidance_scale=float(scale)) if isinstance(scale, Tensor) and scale.numel() == 1 else call


def in_place_of(call: StepCall) -> StepCall | None:
    """Return the call with a sample of its own to be written over; None where too few histories take the kept."""
    histories = sum(h is not None for h in call.history)
    return replace(copied(call), sample=call.sample.clone()) if histories >= call.keeps else None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS, ids=lambda form: str(form).replace(", ", "-"))
def test_every_form_on_host_matches_cpu_bitwise(kernel: Kernel, form: StepForm, dtype: torch.dtype) -> None:
    vec = 16 // dtype.itemsize
    # One vector; a block with threads to spare; whole blocks and a part of one.
    for seed, shape in enumerate([(1, vec), (3, 5 * vec), (2, 300 * vec)]):
        kernel.runtime(backwards=seed % 2 == 1)
        call = some_call(seed * 1000 + form.key, form, dtype, shape)
        expected = on_cpu(call)
        for given, layout in ((call, Layout()), (with_number(call), Layout(joined=False))):
            assert_same_bits(on_host(kernel, given, layout), expected)
            assert kernel.form == form
        own = in_place_of(call)
        if own is not None:
            assert_same_bits(on_host(kernel, own, in_place=True), expected)
            assert kernel.form == form


def test_forms_read_model_tensors_with_gaps_between_samples(kernel: Kernel) -> None:
    kernel.runtime()
    for form in FORMS[::5]:
        call = some_call(form.key, form, torch.bfloat16, (3, 64))
        assert_same_bits(on_host(kernel, call, Layout(gap=64)), on_cpu(call))
        assert kernel.form == form


def launched(kernel: Kernel) -> list[int]:
    """Return the last launch's threads of a block and its grid."""
    values = (ctypes.c_int64 * 6)()
    kernel.library.get_launch(values)
    return [values[0], *values[3:]]


GUIDED = StepForm("kByValue", "kNone", True, 0, 1)
NOISY = StepForm("kByValue", "kDrawn", True, 1, 2)
BY_INDEX = StepForm("kByIndex", "kNone", True, 1, 3)


def general_calls() -> dict[str, tuple[StepCall, Layout]]:
    """Calls that no form has a kernel for, by what keeps them from it."""
    base = some_call(1, GUIDED, torch.float16, (2, 64))
    base = replace(base, model_input=None)
    noisy = replace(some_call(2, NOISY, torch.float16, (2, 4, 4, 8), poison=False), model_input=None)
    rows = replace(some_call(3, BY_INDEX, torch.float16, (2, 64), poison=False), model_input=None)
    last = {"memory_format": torch.channels_last}
    channels_last = replace(
        noisy,
        sample=noisy.sample.contiguous(**last),
        model_output=noisy.model_output.contiguous(**last),
        uncond=noisy.uncond.contiguous(**last),  # type: ignore[union-attr]
        history=tuple(None if h is None else h.contiguous(**last) for h in noisy.history),
    )
    given = replace(base, noise=torch.randn(2, 64).half())
    plain = Layout()
    return {
        "a tensor off 16 bytes": (base, Layout(shifted="uncond")),
        "outputs off 16 bytes": (base, Layout(shifted="out_0")),
        "a part of a vector": (replace(some_call(1, GUIDED, torch.float16, (1, 63)), model_input=None), plain),
        "samples of no whole vectors": (some_call(6, GUIDED, torch.float16, (4, 12)), Layout(joined=False)),
        "threshold": (replace(base, threshold=torch.tensor([0.5, 2.0])), plain),
        "learned variance": (
            replace(given, variance=torch.rand(2, 64).half(), variance_kind=Variance.LEARNED),
            plain,
        ),
        "mixed dtypes": (replace(base, uncond=base.uncond.float()), plain),  # type: ignore[union-attr]
        "model input of another dtype": (replace(base, model_input=torch.zeros(2, 64)), plain),
        "noise in channels-last memory": (channels_last, plain),
        "kept outputs beside rows by index": (
            replace(rows, write_history=False, keeps=2, row_index=torch.tensor([2, 0])),
            plain,
        ),
        "float64": (
            some_call(4, GUIDED, torch.float64, (2, 64)),
            plain,
        ),
        "more than eight tensors": (
            some_call(5, StepForm("kByValue", "kGiven", True, 4, 3), torch.float16, (2, 64)),
            plain,
        ),
    }


@pytest.mark.parametrize("why", general_calls())
def test_other_calls_take_general_kernel(kernel: Kernel, why: str) -> None:
    kernel.runtime()
    call, layout = general_calls()[why]
    one_scale = replace(call, guidance_scale=torch.full((1,), 3.7, dtype=call.table.dtype))
    for given in (call, with_number(one_scale)):
        assert_same_bits(on_host(kernel, given, layout), on_cpu(given))
        assert kernel.form is None


def test_table_off_16_bytes_takes_general_kernel(kernel: Kernel) -> None:
    kernel.runtime()
    call = replace(some_call(1, GUIDED, torch.float16, (2, 64)), model_input=None)
    shifted = torch.empty(call.table.numel() + 1)[1:].view_as(call.table).copy_(call.table)
    assert_same_bits(on_host(kernel, replace(call, table=shifted)), on_cpu(call))
    assert kernel.form is None


def test_grid_is_blocks_within_a_sample_by_samples(kernel: Kernel) -> None:
    def grid(call: StepCall, layout: Layout = Layout(joined=False)) -> list[int]:  # noqa: B008
        assert_same_bits(on_host(kernel, call, layout), on_cpu(call))
        assert kernel.form is not None
        return launched(kernel)

    kernel.runtime()
    threads = 256
    base = replace(some_call(1, GUIDED, torch.float16, (3, 8 * threads)), model_input=None)
    assert grid(base) == [threads, 1, 3, 1]
    one_scale = replace(base, guidance_scale=base.guidance_scale[:1])  # type: ignore[index]
    assert grid(one_scale, Layout()) == [threads, 3, 1, 1]
    assert grid(some_call(1, GUIDED, torch.float16, (2, 8 * threads + 8))) == [threads, 2, 2, 1]
    # A sample of five vectors: the smallest block.
    assert grid(some_call(1, GUIDED, torch.float16, (3, 40))) == [32, 1, 3, 1]


def test_more_samples_than_rows_of_a_grid_are_taken(kernel: Kernel) -> None:
    # run_call would look through a span for each sample at every access.
    kernel.runtime()
    batch, dtype = 65535 + 4, torch.float16
    sample, output, uncond = (torch.randn(batch, 8).to(dtype) for _ in range(3))
    scales, out = torch.rand(batch), torch.full((batch, 8), math.nan, dtype=dtype)
    table = plain_row(prev_x=0.5, prev_m=0.25)
    sizes = [batch, 8, 8, 1, 1, 0, ALL_DTYPES.index(dtype), 1, *[0] * 8, 1, *[0] * 15, 1, 0]
    pointers = [sample, output, uncond, *[None] * 6, table, scales, *[None] * 6]
    spans = [Span(t.data_ptr(), t.numel() * t.element_size(), int(t is out), 0, 0)
             for t in (sample, output, uncond, scales, table, out)]  # fmt: skip
    kernel.run("step_on_host", spans, sizes, pointers, [out])
    expected = ops.step(sample, output, table, 0, uncond=uncond, guidance_scale=scales, backend="cpu")
    assert_same_bits([out], expected)
    assert kernel.form == GUIDED
    assert launched(kernel) == [32, 1, 65535, 2]


def test_largest_configuration_fits_kernels_of_forms(kernel: Kernel) -> None:
    # They are compiled for blocks of at most 256 threads.
    kernel.runtime()
    call = some_call(1, GUIDED, torch.float16, (1, 8 * 1024))
    assert kernel.library.set_config((ctypes.c_int * 5)(512, 512, 512, 512, 1))
    try:
        assert_same_bits(on_host(kernel, call), on_cpu(call))
        assert kernel.form == GUIDED
        assert launched(kernel) == [256, 4, 1, 1]
    finally:
        assert kernel.library.set_config(None)
