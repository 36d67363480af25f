# SPDX-License-Identifier: MIT
"""Steps with nontemporal stores give the bits of ordinary ones, and write nothing else."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastdiff import ops
from fastdiff.ops import backends
from support.child_environment import child_environment
from support.fork_server import run_program
from support.oracle import Shape, assert_same_bits, cases, make, plain_row

if backends.extension is None:
    pytest.skip(backends.extension_error, allow_module_level=True)
extension = backends.extension

#: Those of which steps do; half types and drawn noise keep the sums busy instead.
DTYPES = (torch.float32, torch.float64)
#: Around the tiles of 1024 and 512 bytes, and around a cache line, in elements of every size.
SIZES = st.one_of(st.integers(1, 70), st.sampled_from([127, 128, 129, 255, 256, 257, 511, 512, 513, 1031, 2050]))
SHAPES = st.tuples(st.integers(1, 3), SIZES)


@contextmanager
def streaming(above: int = 0) -> Iterator[None]:
    """Use nontemporal stores for steps of more than so many bytes."""
    before = extension._nontemporal_above(above)
    try:
        yield
    finally:
        extension._nontemporal_above(before)


def test_default_threshold_is_half_of_last_level_cache() -> None:
    default = extension._nontemporal_above(0)
    extension._nontemporal_above(default)
    assert (1 << 18) <= default <= (1 << 31)


@settings(max_examples=300)
@given(plan=cases(DTYPES, shapes=SHAPES))
def test_new_outputs_have_the_same_bits(plan: Shape) -> None:
    case = make(plan)
    expected = case.run("cpu")
    with streaming():
        assert_same_bits(case.run("cpu"), expected)


@settings(max_examples=200)
@given(plan=cases(DTYPES, shapes=SHAPES), offsets=st.tuples(*[st.sampled_from([0, 16, 17, 31])] * 3))
def test_only_given_outputs_are_written(plan: Shape, offsets: tuple[int, ...]) -> None:
    case = make(plan)
    expected = case.run("cpu")
    count = case.sample.numel()
    # torch's memory begins with a cache line; an offset of 16 elements or more is another place in one, or not.
    buffers = [torch.full((count + 64,), 7.0, dtype=plan.dtype) for _ in expected]
    out = [b[at : at + count].view(plan.shape).fill_(float("nan")) for b, at in zip(buffers, offsets, strict=False)]
    with streaming():
        case.run("cpu", out=out)
    assert_same_bits(out, expected)
    for buffer, at in zip(buffers, offsets, strict=False):
        assert (buffer[:at] == 7.0).all()
        assert (buffer[at + count :] == 7.0).all()


@settings(max_examples=200)
@given(
    plan=cases(DTYPES, shapes=SHAPES),
    places=st.permutations(["sample", "model_output", "noise", "history", "new", "new"]),
)
def test_outputs_may_be_inputs(plan: Shape, places: list[str]) -> None:
    case = make(plan)
    expected = case.run("cpu")
    by_name = {
        "sample": case.sample,
        "model_output": case.model_output,
        "noise": case.noise,
        "history": next((h for h in case.history if h is not None), None),
    }
    out = [by_name.get(place) for place in places[: case.keeps + 1]]
    out = [torch.full_like(case.sample, float("nan")) if tensor is None else tensor for tensor in out]
    with streaming():
        case.run("cpu", out=out)
    assert_same_bits(out, expected)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_step_is_parallel(threads: int, dtype: torch.dtype) -> None:
    plan = Shape(random.randrange(2**32), dtype, (3, 70001), "a sample", 7, True, keeps=2)
    case = make(plan)
    case.table[0, 8:] = torch.randn(24)
    expected = case.run("cpu")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with streaming():
            assert_same_bits(case.run("cpu"), expected)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("size", [8, 13, 40])
def test_step_rows_registers_and_drawn_noise(size: int, channels_last: bool) -> None:
    def taken() -> list[Tensor]:
        generator = torch.Generator().manual_seed(5)
        x, m, *history = (torch.randn(4, 3, size, size, generator=generator) for _ in range(6))
        if channels_last:
            x, m, *history = (t.contiguous(memory_format=torch.channels_last) for t in (x, m, *history))
        row = plain_row(prev_x=1.5, prev_h1=0.5, prev_z=1.0, k0_x=1.0, k0_m=2.0, k1_h0=1.0)
        table = torch.cat([row, row])
        table[:, 6:8] = torch.tensor([[0.0, 2.0], [3.0, -1.0]])
        rows = torch.tensor([1, -1, 0, 1])
        out = ops.step_rows(x, m, table, rows, history, seeds=torch.arange(4), noise_step=3, backend="cpu")
        return [out, *history]

    expected = taken()
    with streaming():
        assert_same_bits(taken(), expected)


def test_model_input_is_made_from_written_values() -> None:
    plan = Shape(3, torch.float32, (2, 1031), "scalar", 3, keeps=1)
    case = make(plan)
    made = [torch.full((4, 1031), float("nan"), dtype=torch.bfloat16) for _ in range(2)]
    arguments = {"uncond": case.uncond, "guidance_scale": case.guidance, "history": case.history, "keeps": 1}
    expected = ops.step(case.sample, case.model_output, case.table, 0, **arguments, model_input=made[0])
    with streaming():
        got = ops.step(case.sample, case.model_output, case.table, 0, **arguments, model_input=made[1])
    assert_same_bits([*got, made[1]], [*expected, made[0]])


_BUILD = """
import torch
from fastdiff.ops.backends import extension
from support.oracle import assert_same_bits, build_cases
assert extension.cpu_build == build
for case in build_cases(seed):
    extension._nontemporal_above(1 << 60)
    expected = case.run()
    extension._nontemporal_above(0)
    assert_same_bits(case.run(out=case.poisoned_out()), expected)
print("same")
"""


@pytest.mark.parametrize("build", ["generic", "avx2", "avx512"])
def test_every_cpu_build_gives_same_bits(build: str) -> None:
    seed = random.randrange(2**32)
    environment = child_environment(FASTDIFF_CPU=build, FASTDIFF_BACKEND="")
    done = run_program(f"build, seed = {build!r}, {seed}\n{_BUILD}", env=environment)
    if f"FASTDIFF_CPU is '{build}'" in done.stderr:
        pytest.skip(f"this processor lacks {build}")
    assert done.stdout == "same\n", f"seed {seed}: {done.stderr}"
