# SPDX-License-Identifier: MIT
"""CUDA kernel for tensors of different dtypes, on the host: the bits of the CPU, one access per element.

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
from support.cuda_host import Kernel, Layout, needs_compiler, needs_cpu_backend, run_call, run_on_host
from support.mixed_dtypes import mixed_batch, mixed_case
from support.oracle import TIE_FACTORS, Case, Shape, all_bit_patterns, assert_same_bits, plain_row
from support.row_batches import copy_batch

pytestmark = [needs_compiler, needs_cpu_backend]


def some_layout(case: Case, outs: list[torch.dtype], seed: int) -> tuple[Layout, list[torch.dtype]]:
    """Return a layout that fits a case, and the dtypes of its outputs, some of which overwrite inputs."""
    rng = random.Random(seed)
    inputs = {"sample": case.sample, "model_output": case.model_output, "uncond": case.uncond, "noise": case.noise}
    inputs |= {f"history_{j}": h for j, h in enumerate(case.history)}
    gap = rng.choice([0, 0, 8, 3])
    model = ("model_output", "uncond")
    names = [name for name, tensor in inputs.items() if tensor is not None and not (gap and name in model)]
    rng.shuffle(names)
    in_place: list[str] = []
    if rng.random() < 0.4:
        in_place = names[: rng.randint(1, case.keeps + 1)]
        outs = [inputs[name].dtype for name in in_place] + outs[len(in_place) :]  # type: ignore[union-attr]
    # What is mixed without its outputs stays in one compute dtype: the case has no float64.
    shifted = rng.choice(["", "", "", "out_0", "sample", "uncond", "history_0"])
    layout = Layout(rng.choice([0, 0, 0, 1, 4]), shifted, gap, rng.random() < 0.5, in_place)
    return layout, outs


@pytest.mark.parametrize("double", [False, True], ids=["float", "double"])
def test_mixed_kernel_on_host_matches_cpu_bitwise(kernel: Kernel, double: bool) -> None:
    rng = random.Random(double)
    for i in range(250):
        # Sizes around a pack, a block of 256 threads, and a block of 256 packs.
        sizes = (1, 2, 3, 4, 7, 8, 15, 16, 17, 64, 255, 256, 257, 1000, 2047, 2048, 2049)
        plan = Shape(
            seed=rng.randrange(2**32),
            dtype=torch.float64,
            shape=(rng.randint(1, 4), rng.choice(sizes)),
            guidance=rng.choice(("none", "scalar", "a sample")),
            registers=rng.randrange(16),
            noise=rng.random() < 0.7,
            variance_kind=rng.choice((Variance.FIXED, Variance.LEARNED)),
            threshold=rng.random() < 0.5,
            keeps=rng.randrange(3),
            clip=rng.random() < 0.5,
        )
        kernel.runtime(backwards=i % 2 == 1)
        case, outs = mixed_case(plan, double=double)
        layout, outs = some_layout(case, outs, plan.seed)
        in_use = {t.dtype for t in [case.sample, case.model_output, case.uncond, case.noise, *case.history]
                  if t is not None}  # fmt: skip
        if (torch.float64 in {*in_use, *outs}) != (case.table.dtype == torch.float64):
            continue  # the only float64 tensor was an output, and that now lies on an input
        assert_same_bits(run_on_host(kernel, case, layout, outs), case.run("cpu", out=outs))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("other", [torch.float32, torch.float64], ids=str)
def test_every_half_number_round_trips_with_other_dtypes(
    kernel: Kernel, dtype: torch.dtype, other: torch.dtype
) -> None:
    kernel.runtime()
    numbers = all_bit_patterns(dtype)[None]
    for factor in TIE_FACTORS[1::4]:
        wide = torch.zeros(numbers.shape, dtype=other)
        case = Case(numbers, wide, plain_row(other, prev_x=factor, k0_x=factor), keeps=1)
        outs = [dtype, torch.float32]
        assert_same_bits(run_on_host(kernel, case, dtypes=outs), case.run("cpu", out=outs))


def test_one_misaligned_tensor_disables_wide_accesses_of_mixed_dtypes(kernel: Kernel) -> None:
    # run_on_host fails on an access that its pointer is not aligned for.
    kernel.runtime()
    names = ["", "sample", "model_output", "uncond", "variance", "noise", *(f"history_{j}" for j in range(4))]
    names += [f"out_{o}" for o in range(3)]
    for seed in range(4):
        shape = Shape(seed, torch.float64, (2, 64), "scalar", 15, True, Variance.LEARNED, threshold=True, keeps=2)
        case, outs = mixed_case(shape, double=seed % 2 == 1)
        expected = case.run("cpu", out=outs)
        for name in names:
            assert_same_bits(run_on_host(kernel, case, Layout(shifted=name), outs), expected)


def test_mixed_rows_on_host_match_cpu_bitwise(kernel: Kernel) -> None:
    @settings(max_examples=120)
    @given(seed=st.integers(0, 2**32 - 1))
    def check_one(seed: int) -> None:
        kernel.runtime(backwards=seed % 2 == 1)
        batch, prev = mixed_batch(seed, "cuda")
        if batch["variance_kind"] == Variance.LEARNED_RANGE:
            batch["variance_kind"] = int(Variance.LEARNED)  # exp is nobody's standard
        theirs = copy_batch(batch)
        expected = ops.step_rows(**theirs, out=prev, backend="cpu")
        own = copy_batch(batch)
        rows, registers = own.pop("row_index"), own.pop("history")
        call = StepCall(row_index=rows, history=tuple(registers), write_history=True, out=(prev,), **own)
        check(call)
        canonical = canonicalize(call)
        output = canonical.targets[0]
        assert isinstance(output, Tensor)
        output.fill_(math.nan)
        rng = random.Random(seed)
        shifted = rng.choice(("", "", "sample", "out_0", "history_0", "model_input"))
        run_call(kernel, canonical, Layout(shift=rng.choice((0, 0, 1)), shifted=shifted))
        copy_back(call, canonical)
        wanted = [expected, *theirs["history"], theirs["model_input"]]
        got = [output, *registers, call.model_input]
        assert_same_bits([t for t in got if t is not None], [t for t in wanted if t is not None])

    check_one()


def test_mixed_row_outside_table_leaves_sample_unchanged(kernel: Kernel) -> None:
    sample = torch.randn(3, 40).half()
    register = torch.full((3, 40), math.nan)
    table = plain_row(prev_x=2.0, k0_x=4.0)
    table[0, [MODEL_INPUT_SCALE, STORE_0, STORE_1]] = torch.tensor([1.0, 1.0, -1.0])
    next_input = torch.full((6, 40), math.nan, dtype=torch.float64)
    own = StepCall(
        sample=sample,
        model_output=sample.clone(),
        table=table,
        row_index=torch.tensor([1, 0, 2**40]),
        history=(None, register),
        model_input=next_input,
        write_history=True,
        out=(torch.full((3, 40), math.nan, dtype=torch.bfloat16),),
    )
    run_call(kernel, own)
    expected: Tensor = torch.stack([sample[0], 2 * sample[1], sample[2]]).float().bfloat16()
    assert_same_bits(own.targets, [expected])
    assert_same_bits([next_input], [torch.cat([expected, expected]).double()])
    assert torch.equal(register[1], 4 * sample[1].float())
    assert bool(register[[0, 2]].isnan().all())


@pytest.mark.parametrize("channels_last", [False, True])
def test_noise_drawn_on_host_with_other_dtypes_matches_reference(kernel: Kernel, channels_last: bool) -> None:
    kernel.runtime()
    seeds = torch.tensor([3, -1])
    for first, second in ((torch.float16, torch.float32), (torch.bfloat16, torch.float64)):
        x = torch.randn(2, 4, 5, 6)
        x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
        table = plain_row(second, prev_x=1.0, prev_z=1.0)
        call = StepCall(
            sample=x.to(first),
            model_output=x.to(second),
            table=table,
            row_index=0,
            seeds=seeds,
            noise_step=4,
            purpose=9,
            out=(second,),
        )
        check(call)
        canonical = canonicalize(call)
        run_call(kernel, canonical)
        expected = ops.step(
            x.to(first), x.to(second), table, 0, seeds=seeds, noise_step=4, purpose=9, out=[second], backend="cpu"
        )
        assert_same_bits(canonical.targets, expected)
