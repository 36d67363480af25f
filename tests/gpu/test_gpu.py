# SPDX-License-Identifier: MIT
"""The step on a real GPU: the bits of the CPU, the caller's stream and device."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from fastdiff import ops
from fastdiff.ops import backends
from fastdiff.row_layout import MODEL_INPUT_SCALE, Variance
from support.backend_used import answered
from support.mixed import copied, laid_out, random_batch, run, solvers
from support.on_gpu import BACKENDS, kernels_of, on_host, skip_where_missing
from support.oracle import DTYPES, INTERPRETED, Case, Shape, assert_same_bits, assert_within_rounding, make, plain_row

pytestmark = [pytest.mark.gpu, pytest.mark.answers]

needs_cpu_backend = pytest.mark.skipif(backends.extension is None, reason="needs the C++ extension to compare with")

#: Enough that the host is done with a step long before the device begins it.
CYCLES = 100_000_000


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """Each backend that a GPU may have here."""
    name: str = request.param
    skip_where_missing(name)
    return name


def plans(dtype: torch.dtype, count: int) -> list[Shape]:
    """Steps of every kind. Few, for Triton compiles each kind anew."""
    rng = random.Random(repr(dtype))
    return [
        Shape(
            seed=rng.randrange(2**32),
            dtype=dtype,
            # Whole packs, tails, and more than one block of threads.
            shape=(rng.randint(1, 4), *rng.choice([(4, 16, 16), (3, 5, 7), (1,), (4099,)])),
            guidance=rng.choice(("none", "scalar", "a sample")),
            registers=rng.choice((0, 3, 15)),
            noise=rng.random() < 0.7,
            variance_kind=rng.choice(tuple(Variance)),
            threshold=rng.random() < 0.5,
            keeps=rng.randrange(3),
            clip=rng.random() < 0.5,
        )
        for _ in range(count)
    ]


# --- Which backend, and what it computes -----------------------------------------------------------------------------


def test_gpu_is_answered_by_the_first_backend_that_is_there() -> None:
    on_gpu = torch.zeros(1, device="cuda")
    expected = next((name for name in BACKENDS if not backends.why_missing(name)), "reference")
    assert ops.backend_for(on_gpu) == expected


def test_gpu_backend_that_is_forced_answers(backend: str) -> None:
    x = torch.ones(3, device="cuda")
    assert ops.backend_for(x, backend) == backend
    with answered() as record:
        (result,) = ops.step(x, x, plain_row(prev_x=2.0).cuda(), 0, backend=backend)
    assert record.computed == {backend: 1}
    assert torch.equal(result, 2 * x)


def test_kernels_on_gpu_are_those_of_the_backend(backend: str) -> None:
    # The device's own word: kernels of Triton are called as their functions are, those of C++ with their template.
    x, seeds = torch.randn(2, 5000, device="cuda"), torch.tensor([1, 2], device="cuda")
    table = plain_row(prev_x=1.0, prev_z=1.0).cuda()
    calls = {
        "step_kernel": lambda: ops.step(x, x, table, 0, seeds=seeds, backend=backend),
        "randn_kernel": lambda: ops.randn((2, 5000), seeds, backend=backend),
        "sum_kernel": lambda: ops.std(x, backend=backend),
    }
    for kernel, call in calls.items():
        call()
        on_device = kernels_of(call)
        ours = [name for name in on_device if kernel in name]
        assert len(ours) == 1, on_device
        assert (ours[0] == f"_{kernel}") == (backend == "triton"), ours


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_step_on_gpu_is_the_formula_to_rounding(backend: str, dtype: torch.dtype) -> None:
    for plan in plans(dtype, 12):
        case = make(plan).to("cuda")
        out = case.poisoned_out()
        case.run(backend, out=out)
        assert_within_rounding(case, out, backend)


@needs_cpu_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_step_on_gpu_gives_the_bits_of_the_cpu(backend: str, dtype: torch.dtype) -> None:
    for plan in plans(dtype, 12):
        case = make(plan)
        if case.noise is not None and case.variance_kind == Variance.LEARNED_RANGE:
            continue  # exp is nobody's standard
        assert_same_bits(on_host(case.to("cuda").run(backend)), case.run("cpu"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_step_on_gpu_may_write_on_its_inputs(backend: str, dtype: torch.dtype) -> None:
    case = make(Shape(1, dtype, (2, 4099), "a sample", 15, noise=True, keeps=2)).to("cuda")
    expected = case.run(backend)
    copies = case.with_tensors(lambda _, tensor: tensor.clone())
    out = (copies.sample, copies.model_output, copies.history[2])
    copies.run(backend, out=out)  # type: ignore[arg-type]
    assert_same_bits(on_host(out), on_host(expected))  # type: ignore[arg-type]


def test_step_on_gpu_takes_tensors_off_16_bytes(backend: str) -> None:
    for dtype in DTYPES:
        case = make(Shape(2, dtype, (2, 640), "scalar", 1, noise=True, keeps=1)).to("cuda")
        expected = case.run(backend)

        def shifted(name: str, tensor: Tensor) -> Tensor:
            if name in ("table", "guidance"):
                return tensor
            return torch.cat([tensor.new_zeros(1), tensor.reshape(-1)])[1:].view(tensor.shape)

        assert_same_bits(on_host(case.with_tensors(shifted).run(backend)), on_host(expected))


# --- Noise, rows of a sample's own, the next model input -------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_randn_on_gpu_gives_the_bits_of_the_cpu(backend: str, dtype: torch.dtype) -> None:
    seeds = torch.tensor([0, -1, 0x0123456789ABCDEF])
    for shape in ((3, 1), (3, 37), (3, 4, 16, 16), (3, 100_003)):
        for step in (0, 2**32 - 1, torch.tensor([2**31]), torch.tensor([1, 2, 2**32 - 1])):
            on_gpu = step.cuda() if isinstance(step, Tensor) else step
            drawn = ops.randn(shape, seeds.cuda(), on_gpu, 2**31, dtype=dtype, backend=backend)
            assert_same_bits([drawn.cpu()], [ops.randn(shape, seeds, step, 2**31, dtype=dtype)])


def test_every_word_becomes_the_same_numbers_on_gpu(backend: str) -> None:
    # A million transforms: enough to meet every exponent of ln u that is likelier than one in 2²⁰, and all octants.
    seeds = torch.tensor([20240229])
    drawn = ops.randn((1, 2**21), seeds.cuda(), 3, 4, backend=backend)
    assert_same_bits([drawn.cpu()], [ops.randn((1, 2**21), seeds, 3, 4)])


@needs_cpu_backend
@pytest.mark.parametrize("channels_last", [False, True], ids=["row-major", "channels-last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_noise_drawn_in_a_step_on_gpu_gives_the_bits_of_the_cpu(
    backend: str, dtype: torch.dtype, channels_last: bool
) -> None:
    table = plain_row(dtype, prev_x=0.5, prev_m=0.25, prev_z=0.75)
    for shape in ((2, 4, 16, 16), (2, 3, 5, 7), (1, 16, 33, 1)):
        x, m = (laid_out(torch.randn(shape).to(dtype), channels_last) for _ in range(2))
        seeds = torch.randint(-(2**62), 2**62, (shape[0],))
        rest = {"noise_step": 2**32 - 1, "purpose": 7}
        expected = ops.step(x, m, table, 0, seeds=seeds, backend="cpu", **rest)  # type: ignore[arg-type]
        results = ops.step(x.cuda(), m.cuda(), table.cuda(), 0, seeds=seeds.cuda(), backend=backend, **rest)  # type: ignore[arg-type]
        assert_same_bits(on_host(results), expected)


@needs_cpu_backend
@pytest.mark.parametrize("channels_last", [False, True], ids=["row-major", "channels-last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mixed_solvers_on_gpu_give_the_bits_of_the_cpu(backend: str, dtype: torch.dtype, channels_last: bool) -> None:
    for seed, inner in enumerate([(4, 16, 16), (3, 5, 7), (4, 64, 64)]):
        batch = solvers(seed, dtype, inner, channels_last=channels_last)
        assert_same_bits(on_host(tuple(run(copied(batch, "cuda"), backend))), run(batch, "cpu"))


@needs_cpu_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_rows_on_gpu_give_the_bits_of_the_cpu(backend: str, dtype: torch.dtype) -> None:
    # Few for Triton, which compiles each kind anew.
    for seed in range(12 if backend == "triton" else 60):
        batch = random_batch(seed, dtype)
        if batch["variance_kind"] == Variance.LEARNED_RANGE:
            batch["variance_kind"] = int(Variance.LEARNED)  # exp is nobody's standard
        assert_same_bits(on_host(tuple(run(copied(batch, "cuda"), backend))), run(batch, "cpu"))


def test_row_beyond_the_table_on_gpu_leaves_its_sample_as_it_is(backend: str) -> None:
    # Looking would be a sync, so the kernel has to.
    x = torch.randn(4, 1000, device="cuda")
    rows = torch.tensor([0, 1, -1, 2**40], device="cuda")
    result = ops.step_rows(x, x, plain_row(prev_x=2.0).cuda(), rows, backend=backend)
    assert_same_bits([result.cpu()], [torch.cat([2 * x[:1], x[1:]]).cpu()])


@needs_cpu_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_model_input_on_gpu_gives_the_bits_of_the_cpu(backend: str, dtype: torch.dtype) -> None:
    table = plain_row(dtype, prev_x=0.5, prev_m=0.3)
    table[0, MODEL_INPUT_SCALE] = 0.7316
    for shape in ((2, 4, 16, 16), (3, 37), (1, 37)):
        x, m = (torch.randn(shape).to(dtype) for _ in range(2))
        for other in DTYPES:
            for copies in (1, 2):
                expected = torch.full((copies * shape[0], *shape[1:]), float("nan"), dtype=other)
                target = expected.cuda()
                ops.step(x, m, table, 0, model_input=expected, backend="cpu")
                ops.step(x.cuda(), m.cuda(), table.cuda(), 0, model_input=target, backend=backend)
                assert_same_bits([target.cpu()], [expected])


def test_triton_compiles_one_kernel_for_all_steps_and_rows() -> None:
    if backends.why_missing("triton") or INTERPRETED:
        pytest.skip("Triton does not compile here")
    kernel = backends.triton_module("step")._step_kernel
    if not hasattr(kernel, "device_caches"):
        pytest.skip("this version of triton keeps what it has compiled elsewhere")
    x, seeds = torch.randn(2, 4096, device="cuda"), torch.tensor([1, 2], device="cuda")
    tables = [plain_row(prev_x=1.0, prev_z=1.0).cuda().repeat(count, 1) for count in (1, 16, 33)]

    def compiled() -> int:
        return sum(len(cache[0]) for cache in kernel.device_caches.values())

    ops.step(x, x, tables[0], 0, seeds=seeds, backend="triton")
    before = compiled()
    for table in tables:
        for row in {0, 1, 16, len(table) - 1} & set(range(len(table))):
            for step in (0, 1, 16, 2**31 - 1, 2**31, 2**32 - 1):
                ops.step(x, x, table, row, seeds=seeds, noise_step=step, purpose=step, backend="triton")
    assert compiled() == before


def test_captured_rows_and_steps_are_those_in_memory_when_it_is_replayed(backend: str) -> None:
    x = torch.randn(2, 3000, device="cuda")
    table = torch.cat([plain_row(prev_x=2.0, prev_z=1.0), plain_row(prev_x=-3.0, prev_z=0.5)]).cuda()
    rows, steps = torch.tensor([0, 1], device="cuda"), torch.tensor([4, 5], device="cuda")
    seeds = torch.tensor([7, 8], device="cuda")
    out = torch.full_like(x, float("nan"))

    def step() -> None:
        ops.step_rows(x, x, table, rows, seeds=seeds, noise_step=steps, out=out, backend=backend)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    rows.copy_(torch.tensor([1, -1]))
    steps.copy_(torch.tensor([6, 9]))
    seeds.copy_(torch.tensor([8, 7]))
    graph.replay()
    replayed = out.clone()
    step()
    assert_same_bits([replayed.cpu()], [out.cpu()])
    assert torch.equal(replayed[1], x[1])


# --- The caller's stream and device ----------------------------------------------------------------------------------


def test_step_runs_on_the_current_stream(backend: str) -> None:
    case = make(Shape(3, torch.float32, (2, 5000), "scalar")).to("cuda")
    expected = on_host(case.run(backend))  # compiles, too: below, nothing may take time but the device
    values = case.sample.clone()
    case.sample.fill_(float("nan"))
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(CYCLES)
        case.sample.copy_(values)
        outputs = case.run(backend)
    # On any other stream the step would have read NaN while this one slept.
    stream.synchronize()
    assert_same_bits(on_host(outputs), expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second CUDA device")
def test_step_runs_on_the_device_of_its_tensors(backend: str) -> None:
    case = make(Shape(4, torch.float32, (2, 5000), "scalar"))
    with torch.cuda.device(0):
        outputs = case.to("cuda:1").run(backend)
        assert torch.cuda.current_device() == 0
    assert [str(output.device) for output in outputs] == ["cuda:1"]
    assert_same_bits(on_host(outputs), on_host(case.to("cuda:0").run(backend)))


def test_captured_step_reads_the_table_that_is_there_when_it_is_replayed(backend: str) -> None:
    sample, output = torch.randn(2, 3, 64, device="cuda").unbind()
    table = plain_row(prev_x=1.0).cuda()
    case = Case(sample, output, table)
    out = case.poisoned_out()
    case.run(backend, out=out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        case.run(backend, out=out)
    table.copy_(plain_row(prev_x=-2.0))
    graph.replay()
    assert_same_bits(on_host(out), [-2.0 * sample.cpu()])
