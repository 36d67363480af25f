# SPDX-License-Identifier: MIT
"""Logic of the CUDA kernel without a GPU: csrc/cuda/step.cu compiled as C++ and run on the CPU.

See ``cuda_host.py`` for how, and ``test_cuda_on_host_rows.py`` for noise, rows and model inputs.  This proves nothing
about speed, about how a device rounds, divides or takes exp, or about what nvcc makes of the source;
``test_cuda_compile.py`` and ``test_gpu.py`` look at those.
"""

from __future__ import annotations

import ctypes
import math
import random

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from fastdiff.row_layout import Variance
from support.cuda_host import (
    INVALID_CONFIGURATION,
    Kernel,
    Layout,
    needs_compiler,
    needs_cpu_backend,
    randn_on_host,
    run_on_host,
)
from support.oracle import (
    DTYPES,
    TIE_FACTORS,
    Case,
    Shape,
    all_bit_patterns,
    assert_same_bits,
    assert_within_rounding,
    cases,
    make,
    plain_row,
)

pytestmark = needs_compiler


def learned_range(case: Case) -> bool:
    """Return True if the result contains exp, which no standard rounds correctly."""
    return case.noise is not None and case.variance_kind == Variance.LEARNED_RANGE


def some_layout(case: Case, seed: int) -> Layout:
    """Return a layout that fits a case."""
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
def test_any_step_on_host_equals_formula_within_rounding(kernel: Kernel, dtype: torch.dtype) -> None:
    @settings(max_examples=150)
    @given(plan=cases([dtype]))
    def check(plan: Shape) -> None:
        case = make(plan)
        kernel.runtime(backwards=plan.seed % 2 == 1)
        assert_within_rounding(case, run_on_host(kernel, case, some_layout(case, plan.seed)), "cuda")

    check()


@needs_cpu_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kernel_on_host_matches_cpu_bitwise(kernel: Kernel, dtype: torch.dtype) -> None:
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
def test_halves_of_doubled_channels_are_read_without_copy(kernel: Kernel) -> None:
    kernel.runtime()
    for dtype in DTYPES:
        case = make(Shape(5, dtype, (3, 4, 5, 8), "a sample", noise=True, variance_kind=Variance.LEARNED))
        both = torch.cat([case.model_output, case.variance], dim=1)
        case.model_output, case.variance = both.chunk(2, dim=1)
        assert case.model_output.stride(0) == 2 * case.sample.stride(0)
        assert_same_bits(run_on_host(kernel, case, Layout(gap=4 * 5 * 8)), case.run("cpu"))


def test_term_with_zero_coefficient_is_not_added(kernel: Kernel) -> None:
    kernel.runtime()
    for seed, dtype in enumerate(DTYPES):
        case = make(Shape(seed, dtype, (2, 24), "scalar", 15, noise=True, keeps=2))
        expected = run_on_host(kernel, case)

        def poisoned(name: str, tensor: Tensor, unused: tuple[str, ...] = case.unused) -> Tensor:
            return torch.full_like(tensor, math.nan) if name in unused else tensor

        assert_same_bits(run_on_host(kernel, case.with_tensors(poisoned)), expected)


def test_nan_passes_clip_and_threshold(kernel: Kernel) -> None:
    kernel.runtime()
    row = plain_row(p=1.0, clip=0.5, prev_d=1.0)
    sample = torch.tensor([[math.nan, 9.0, -9.0, 0.25, math.inf]])
    (clipped,) = run_on_host(kernel, Case(sample, torch.zeros_like(sample), row))
    assert_same_bits([clipped], [torch.tensor([[math.nan, 0.5, -0.5, 0.25, 0.5]])])
    (scaled,) = run_on_host(kernel, Case(sample, torch.zeros_like(sample), row, threshold=torch.tensor([0.4])))
    assert_same_bits([scaled], [torch.tensor([[math.nan, 1.0, -1.0, 0.625, 1.0]])])


@needs_cpu_backend
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_half_number_converts_like_cpu(kernel: Kernel, dtype: torch.dtype) -> None:
    # Of the conversions only their use is the kernel's; that the stand-ins are right is what the other tests rest on.
    kernel.runtime()
    numbers = all_bit_patterns(dtype)[None]
    for factor in TIE_FACTORS:
        case = Case(numbers, numbers, plain_row(prev_x=factor))
        assert_same_bits(run_on_host(kernel, case), case.run("cpu"))


# --- What threads touch ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backwards", [False, True], ids=["forwards", "backwards"])
@pytest.mark.parametrize("target", ["sample", "model_output", "uncond", "noise", "history_0", "history_3"])
def test_output_over_input_equals_separate_output(kernel: Kernel, target: str, backwards: bool) -> None:
    # In either order of threads: none reads what another has written.
    kernel.runtime(backwards=backwards)
    for dtype in DTYPES:
        case = make(Shape(11, dtype, (2, 600), "a sample", 15, noise=True, threshold=True, keeps=1))
        others = [name for name in ("sample", "history_1") if name != target]
        expected = run_on_host(kernel, case)
        assert_same_bits(run_on_host(kernel, case, Layout(in_place=[target, others[0]])), expected)


def test_one_misaligned_tensor_disables_wide_accesses(kernel: Kernel) -> None:
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
def test_misaligned_samples_disable_wide_accesses(kernel: Kernel, gap: int) -> None:
    kernel.runtime()
    for dtype in DTYPES:
        for inner in (31, 32):
            case = make(Shape(4, dtype, (3, inner), "a sample"))
            assert_within_rounding(case, run_on_host(kernel, case, Layout(gap=gap)), "cuda")


# --- The launch ------------------------------------------------------------------------------------------------------


def test_step_is_one_launch_on_requested_stream_and_device(kernel: Kernel) -> None:
    case = make(Shape(0, torch.float32, (2, 40)))
    kernel.runtime(device=1)
    run_on_host(kernel, case)
    # The current device is the caller's again.
    assert kernel.state == {"device": 1, "launches": 1, "launched_on": 0, "stream": 0x5EED}


def test_failing_launch_has_reason_and_restores_device(kernel: Kernel) -> None:
    case = make(Shape(0, torch.float32, (2, 40)))
    kernel.runtime(device=1, next_launch=INVALID_CONFIGURATION)
    with pytest.raises(AssertionError, match="invalid configuration argument"):
        run_on_host(kernel, case)
    assert kernel.state["device"] == 1
    assert kernel.state["launches"] == 0
    run_on_host(kernel, case)  # the error has been taken: the next launch is not blamed for it


# --- Configurations --------------------------------------------------------------------------------------------------

#: step, draw, randn, sum, select, as in csrc/cuda/config.h: the smallest, the largest, and each another.
CONFIGS = [(32, 32, 32, 32, 1), (512, 512, 512, 512, 1024), (64, 128, 32, 256, 4)]


def taken(kernel: Kernel, config: tuple[int, ...] | None) -> bool:
    return bool(kernel.library.set_config(None if config is None else (ctypes.c_int * 5)(*config)))


def last_launch(kernel: Kernel) -> list[int]:
    """Return threads per block, blocks, and the number of capability queries."""
    values = (ctypes.c_int64 * 6)()
    kernel.library.get_launch(values)
    return list(values)[:3]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_results_on_host_do_not_depend_on_the_configuration(kernel: Kernel, dtype: torch.dtype) -> None:
    kernel.runtime()
    case = make(Shape(21, dtype, (3, 1003), "a sample", 5, noise=True, keeps=1))
    seeds = torch.tensor([1, -2, 3])

    def results() -> tuple[Tensor, ...]:
        return (
            *run_on_host(kernel, case),
            *run_on_host(kernel, case, Layout(shift=1)),
            randn_on_host(kernel, (3, 1003), seeds, 4, 5, dtype),
        )

    expected = results()
    try:
        for config in CONFIGS:
            assert taken(kernel, config)
            assert_same_bits(results(), expected)
            assert last_launch(kernel)[0] == config[2]
            run_on_host(kernel, case)
            assert last_launch(kernel)[:2] == [config[0], -(-3 * 1003 // config[0])]
    finally:
        assert taken(kernel, None)


def test_capability_is_read_once_per_device_and_default_applies_without_entry(kernel: Kernel) -> None:
    values = (ctypes.c_int * 5)()
    for device in (0, 1):
        kernel.library.get_config(device, values)
        assert list(values) == [256, 256, 256, 128, 16]
    kernel.runtime()
    for device in (0, 1, 0, 1):
        kernel.library.get_config(device, values)
    assert last_launch(kernel)[2] == 0
    # One that is not there cannot be asked: its launch says so itself.
    kernel.library.get_config(7, values)
    assert list(values) == [256, 256, 256, 128, 16]


@pytest.mark.parametrize(
    "config", [(16, 256, 256, 128, 16), (256, 1024, 256, 128, 16), (256, 256, 96, 128, 16), (256, 256, 256, 128, 0)]
)
def test_invalid_configurations_are_refused(kernel: Kernel, config: tuple[int, ...]) -> None:
    assert taken(kernel, (64, 64, 64, 64, 4))
    try:
        assert not taken(kernel, config)
        values = (ctypes.c_int * 5)()
        kernel.library.get_config(0, values)
        assert list(values) == [64, 64, 64, 64, 4]
    finally:
        assert taken(kernel, None)


def test_too_many_blocks_for_grid_are_refused(kernel: Kernel) -> None:
    # 2³² + 1 blocks: in 32 bits that would be one. Nothing is read, so the memory need not be there.
    kernel.runtime()
    sizes = [1, 256 * 2**32 + 1, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 1, *[0] * 15]
    sizes[2], sizes[4], sizes[6] = sizes[1], 1, DTYPES.index(torch.float64)
    off = torch.zeros(3, dtype=torch.float64)[1:]  # one element a thread
    pointers = [off, off, *[None] * 7, off, *[None] * 6]
    with pytest.raises(AssertionError, match="invalid configuration argument"):
        kernel.run("step_on_host", [], sizes, pointers, [off])
    assert kernel.state["launches"] == 0
