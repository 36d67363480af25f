# SPDX-License-Identifier: MIT
"""The step on a real GPU: the bits of the CPU, the caller's stream and device, one kernel a step, no wait for it."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

import fastdiff
from fastdiff import ops
from fastdiff.ops import backends
from fastdiff.table import Variance
from oracle import DTYPES, INTERPRETED, Case, Shape, assert_same_bits, assert_within_rounding, make, plain_row

pytestmark = pytest.mark.gpu

BACKENDS = ("cuda", "triton")
#: Enough that the host is done with a step long before the device begins it.
CYCLES = 100_000_000


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """Each backend that a GPU may have here."""
    name: str = request.param
    reason = backends.why_missing(name)
    if not reason and name == "triton" and INTERPRETED:
        reason = "TRITON_INTERPRET is 1: Triton's kernels run on the CPU"
    if reason:
        pytest.skip(f"backend {name!r} is missing: {reason}")
    return name


@pytest.fixture
def syncs_refused() -> Iterator[None]:
    """Put torch's mode back, whatever a test has set."""
    before = torch.cuda.get_sync_debug_mode()
    yield
    torch.cuda.set_sync_debug_mode(before)


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


def on_host(outputs: tuple[Tensor, ...]) -> list[Tensor]:
    return [output.cpu() for output in outputs]


# --- Which backend, and what it computes -----------------------------------------------------------------------------


def test_gpu_is_answered_by_the_first_backend_that_is_there() -> None:
    on_gpu = torch.zeros(1, device="cuda")
    expected = next((name for name in BACKENDS if not backends.why_missing(name)), "reference")
    assert ops.backend_for(on_gpu) == expected


def test_gpu_backend_that_is_forced_answers(backend: str) -> None:
    assert ops.backend_for(torch.zeros(1, device="cuda"), backend) == backend


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_step_on_gpu_is_the_formula_to_rounding(backend: str, dtype: torch.dtype) -> None:
    for plan in plans(dtype, 12):
        case = make(plan).to("cuda")
        out = case.poisoned_out()
        case.run(backend, out=out)
        assert_within_rounding(case, out, backend)


@pytest.mark.skipif(backends.extension is None, reason="needs the C++ extension to compare with")
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


# --- What a loop costs -----------------------------------------------------------------------------------------------


def _sampler(method: str, steps: int) -> fastdiff.BaseSampler:
    return fastdiff.create_sampler("linear", method, num_inference_steps=steps)


@pytest.mark.parametrize("method", ["ddim", "dpm_solver"])
def test_step_on_gpu_is_one_kernel(backend: str, method: str) -> None:
    steps = 6
    sample, output, uncond = torch.randn(3, 2, 4, 32, 32, device="cuda").unbind()
    # What the device chooses by itself is taken as users take it, not forced.
    stepper = _sampler(method, steps).stepper(None if ops.backend_for(sample) == backend else backend)

    def step() -> None:
        stepper.step(sample, output, uncond=uncond, guidance=3.0, out=sample)

    # The first steps bring the table to the device, and compile.
    for _ in range(3):
        step()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        for _ in range(3, steps):
            step()
        torch.cuda.synchronize()
    on_device = [event.name for event in profiler.events() or [] if event.device_type == DeviceType.CUDA]
    if not on_device:
        pytest.skip("the profiler is not allowed to see kernels here")
    assert len(on_device) == steps - 3, on_device
    assert all("step_kernel" in name for name in on_device)


@pytest.mark.parametrize("method", ["ddim", "dpm_solver"])
def test_loop_on_gpu_never_waits_for_the_device(backend: str, method: str, syncs_refused: None) -> None:
    steps = 12

    def model(x: Tensor, t: Tensor, embeds: Tensor) -> Tensor:
        return x * 0.5 + embeds[:, :, None, None] * t[:, None, None, None] * 1e-4

    def after(info: fastdiff.StepInfo) -> None:
        # The first step brings the table to the device; after the last one the samples are looked at.
        torch.cuda.set_sync_debug_mode("error" if info.index < steps - 1 else "default")

    latents = torch.randn(2, 4, 16, 16, device="cuda")
    embeds, negative = torch.randn(2, 2, 4, device="cuda").unbind()
    result = _sampler(method, steps).sample(
        model,
        latents,
        embeds,
        negative,
        guidance_scale=3.0,
        callback=after,
        progress=False,
        check_finite=False,
        backend=backend,
    )
    assert result.steps == steps
    assert bool(torch.isfinite(result.samples).all())


@pytest.mark.parametrize("method", ["ddim", "dpm_solver"])
def test_loop_on_gpu_ends_where_the_loop_on_the_cpu_does(backend: str, method: str) -> None:
    if backends.extension is None:
        pytest.skip("needs the C++ extension to compare with")
    outputs = torch.randn(8, 2, 4, 16, 16)
    start = torch.randn(2, 4, 16, 16)

    def walk(device: str, name: str) -> Tensor:
        stepper = _sampler(method, len(outputs)).stepper(name)
        x = start.to(device)
        for output in outputs:
            x = stepper.step(x, output.to(device))
        return x.cpu()

    assert_same_bits([walk("cuda", backend)], [walk("cpu", "cpu")])
