# SPDX-License-Identifier: MIT
"""Launches on a real GPU: cached kernels match the JIT bitwise, on any stream and device, in any configuration."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastdiff import ops
from fastdiff.ops import backends
from fastdiff.ops.call import StepCall
from support.gpu_helpers import skip_where_missing
from support.oracle import DTYPES, INTERPRETED, assert_same_bits, plain_row

pytestmark = pytest.mark.gpu

config = pytest.importorskip("fastdiff.kernels.config", reason="needs the triton package")
launch = pytest.importorskip("fastdiff.kernels.launch")

BACKENDS = ("cuda", "triton")
CYCLES = 100_000_000
#: Smaller and larger than the default in everything: Triton's fields, and CUDA's step, draw, randn, sum, select.
TRITON = [
    {"step": (256, 2), "draw": (512, 8), "randn": (512, 1), "sum": (1, 1), "select": (1024, 4, 1)},
    {"step": (8192, 16), "draw": (4096, 16), "randn": (4096, 8), "sum": (16, 8), "select": (4096, 16, 16)},
]
CUDA = [[32, 32, 32, 32, 1], [512, 512, 512, 512, 1024]]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    skip_where_missing(name)
    return name


@pytest.fixture
def holds() -> None:
    if backends.why_missing("triton") or INTERPRETED:
        pytest.skip("Triton does not compile here")
    if launch.why_through_jit():
        pytest.skip(f"launches go through Triton's JIT: {launch.why_through_jit()}")


def work(
    backend: str, dtype: torch.dtype, inner: int = 5000, device: str = "cuda", shift: int = 0
) -> Callable[[], list[Tensor]]:
    """Run every kind of kernel on new tensors, `shift` elements off 16 bytes."""
    return work_on(backend, dtype, inner, device, shift)[1]


def work_on(
    backend: str, dtype: torch.dtype, inner: int, device: str, shift: int
) -> tuple[Tensor, Callable[[], list[Tensor]]]:
    """Run every kind of kernel on this sample, which all except that of normal numbers read."""
    count = 2 * inner
    x, m = (torch.randn(count + shift, device=device).to(dtype)[shift:].view(2, inner) for _ in range(2))
    seeds = torch.randint(-(2**62), 2**62, (2,), device=device)
    table = plain_row(dtype, prev_x=0.5, prev_m=0.25, prev_z=0.75).to(device)
    without = plain_row(dtype, prev_x=0.5, prev_m=0.25).to(device)

    def run() -> list[Tensor]:
        out = [torch.full_like(x, float("nan")) for _ in range(2)]
        ops.step(x, m, without, 0, out=(out[0],), backend=backend)
        ops.step(x, m, table, 0, seeds=seeds, noise_step=7, out=(out[1],), backend=backend)
        out.append(ops.randn((2, inner), seeds, 3, dtype=dtype, backend=backend))
        out += [ops.std(x, backend=backend), ops.dot(x, m, backend=backend), ops.norm(x, backend=backend)]
        out.append(ops.quantile(x, 0.7, backend=backend))
        return out

    return x, run


def on_host(tensors: list[Tensor]) -> list[Tensor]:
    return [tensor.cpu() for tensor in tensors]


@pytest.mark.usefixtures("holds")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cached_launches_match_jit_bitwise_on_gpu(dtype: torch.dtype) -> None:
    # In an order that returns to what is held, with other sizes and alignments in between.
    for inner, shift in ((5000, 0), (4096, 0), (1, 0), (5000, 1), (4099, 0), (5000, 0), (4096, 1)):
        run = work("triton", dtype, inner, shift=shift)
        run()
        held = on_host(run())
        with launch.through_jit():
            assert_same_bits(held, on_host(run()))


@pytest.mark.usefixtures("holds")
def test_cached_launches_are_captured_in_graph() -> None:
    run = work("triton", torch.float32)
    run()
    expected = on_host(run())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for tensor in captured:
        tensor.fill_(float("nan"))
    graph.replay()
    assert_same_bits(on_host(captured), expected)


@pytest.mark.usefixtures("holds")
@pytest.mark.skipif(backends.extension is None, reason="the C++ extension was not built")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_triton_steps_are_launched_from_c_with_bits_of_jit(dtype: torch.dtype) -> None:
    x, m, u = torch.randn(3, 2, 70_001, device="cuda").to(dtype).unbind()
    table = plain_row(dtype, prev_x=0.5, prev_m=0.25).cuda()
    call = StepCall(
        sample=x, model_output=m, table=table, row_index=0, uncond=u, guidance_scale=7.3, out=(torch.empty_like(x),)
    )
    ops.step(x, m, table, 0, uncond=u, guidance_scale=7.3, out=(torch.empty_like(x),), backend="triton")  # compiles
    offered = backends.offer(call, triton=True)
    assert isinstance(offered, tuple), f"{offered!r}: {ops.triton_launcher()}"
    with launch.through_jit():
        assert backends.offer(call, triton=True) == "device"
        (expected,) = ops.step(x, m, table, 0, uncond=u, guidance_scale=7.3, backend="triton")
    assert_same_bits(on_host([*offered]), on_host([expected]))


@pytest.mark.usefixtures("holds")
def test_host_time_of_cached_launch_on_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    step = backends.triton_module("step")
    x, m, u = torch.randn(3, 1, 4, 64, 64, device="cuda").unbind()
    table, guidance = plain_row(prev_x=0.5, prev_m=0.25).cuda(), torch.full((1,), 3.0, device="cuda")
    fields = {"sample": x, "model_output": m, "table": table, "row_index": 0, "uncond": u, "guidance_scale": guidance}
    call = StepCall(**fields, out=(torch.empty_like(x),))
    extension = StepCall(**fields, out=(torch.empty_like(x),))

    def microseconds(run: Callable[[], object]) -> float:
        rounds = []
        for _ in range(15):
            torch.cuda.synchronize()
            begin = time.perf_counter()
            # Few enough that none waits for room in the queue.
            for _ in range(200):
                run()
            rounds.append((time.perf_counter() - begin) / 200 * 1e6)
        return sorted(rounds)[len(rounds) // 2]

    step.launch(call)
    held = microseconds(lambda: step.launch(call))
    with launch.through_jit():
        jit = microseconds(lambda: step.launch(call))
    text = f"host time of a launch: held {held:.1f} us, through the JIT {jit:.1f} us"
    if not backends.why_missing("cuda"):
        text += f", C++ {microseconds(lambda: backends.offer(extension)):.1f} us"
    with capsys.disabled():
        print(f"\n{torch.cuda.get_device_name()}: {text}")
    assert held < jit


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_configurations_on_gpu_give_same_bits(backend: str, dtype: torch.dtype) -> None:
    run = work(backend, dtype, 70_001)
    expected = on_host(run())
    if backend == "triton":
        for sizes in TRITON:
            with config.override(**{kind: config.Config(*size) for kind, size in sizes.items()}):
                assert_same_bits(on_host(run()), expected)
        return
    assert backends.extension is not None
    before = backends.extension._cuda_config(0)
    try:
        for numbers in CUDA:
            backends.extension._set_cuda_config(numbers)
            assert list(backends.extension._cuda_config(0).values()) == numbers
            assert_same_bits(on_host(run()), expected)
        with pytest.raises(ValueError, match=r"^_set_cuda_config: sizes are 33, .* expected threads of step"):
            backends.extension._set_cuda_config([33, 32, 32, 32, 1])
        assert list(backends.extension._cuda_config(0).values()) == CUDA[-1]
    finally:
        backends.extension._set_cuda_config(None)
    assert backends.extension._cuda_config(0) == before


def test_every_kernel_runs_on_the_current_stream(backend: str) -> None:
    x, run = work_on(backend, torch.float32, 5000, "cuda", 0)
    expected = on_host(run())  # compiles
    values = x.clone()
    x.fill_(float("nan"))
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(CYCLES)
        x.copy_(values)
        results = run()
    # On any other stream they would have read NaN while this one slept.
    stream.synchronize()
    assert_same_bits(on_host(results), expected)


def test_current_stream_is_torchs(backend: str) -> None:
    x = torch.zeros(1, device="cuda")
    assert backends.current_stream(x) == torch.cuda.current_stream().cuda_stream
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        assert backends.current_stream(x) == stream.cuda_stream
    assert backends.current_stream(x) == torch.cuda.current_stream().cuda_stream


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second CUDA device")
def test_every_kernel_runs_on_the_device_of_its_tensors(backend: str) -> None:
    torch.manual_seed(0)
    first = work(backend, torch.float32, device="cuda:0")
    torch.manual_seed(0)
    second = work(backend, torch.float32, device="cuda:1")
    for _ in range(2):
        with torch.cuda.device(0):
            results = second()
            assert torch.cuda.current_device() == 0
        assert {str(result.device) for result in results} == {"cuda:1"}
        with torch.cuda.device(1):
            assert {str(result.device) for result in first()} == {"cuda:0"}
            assert torch.cuda.current_device() == 1
        with torch.cuda.device(1):
            assert_same_bits(on_host(results), on_host(second()))
