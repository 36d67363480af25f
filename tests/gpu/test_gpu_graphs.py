# SPDX-License-Identifier: MIT
"""Whole loops on a real GPU: no wait for it from the first step to the last, and the same bits as a CUDA graph."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from fastdiff import BaseSampler, SamplingResult, StepInfo, ops
from support.graph_cases import GUIDANCE, METHODS, SHAPE, STOCHASTIC, Inputs, Model, model_of, sampler_of
from support.on_gpu import skip_where_missing
from support.oracle import assert_same_bits

pytestmark = pytest.mark.gpu

MODES = ("loop", "step")
#: Enough that the host is done with a loop long before the device begins it.
CYCLES = 1_000_000_000


@pytest.fixture(params=("cuda", "triton", "reference"))
def backend(request: pytest.FixtureRequest) -> str:
    """Each backend that a GPU may have here."""
    name: str = request.param
    skip_where_missing(name)
    return name


@contextlib.contextmanager
def syncs_refused() -> Iterator[None]:
    """Let torch raise where the host would wait for the device."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def on_gpu(inputs: Inputs) -> Inputs:
    inputs.latents, inputs.seeds = inputs.latents.cuda(), inputs.seeds.cuda()
    inputs.conditions = [condition.cuda() for condition in inputs.conditions]
    return inputs


def run(sampler: BaseSampler, model: Any, inputs: Inputs, **options: Any) -> SamplingResult:
    return sampler.sample(
        model,
        inputs.latents,
        *inputs.conditions,
        **{"progress": False, "check_finite": False, **inputs.keywords(), **options},
    )


def draws(noise: str) -> dict[str, Any]:
    """Options of `sample` for a source of noise, the same numbers each time."""
    return {
        "seeds": {},
        "listed seeds": {"seeds": [5, 6, 2**63 + 7]},
        "device": {"seeds": None, "generator": torch.Generator("cuda").manual_seed(3)},
        "host": {"seeds": None, "generator": torch.Generator().manual_seed(3)},
        "a sample": {"seeds": None, "generator": [torch.Generator().manual_seed(i) for i in range(SHAPE[0])]},
    }[noise]


# --- The eager loop --------------------------------------------------------------------------------------------------


def test_what_waits_for_the_device_is_seen() -> None:
    x = torch.ones(3, device="cuda")
    with syncs_refused():
        for look in (lambda: x.sum().item(), lambda: torch.ones(3).to("cuda"), lambda: torch.tensor([1.0]).cuda()):
            with pytest.raises(RuntimeError, match="synchroniz"):
                look()


@pytest.mark.parametrize("thresholding", [True, False], ids=["thresholding", "plain"])
@pytest.mark.parametrize("guidance", GUIDANCE)
@pytest.mark.parametrize("noise", ["seeds", "listed seeds", "device", "host", "a sample"])
def test_eager_loop_never_waits_from_the_first_step_to_the_last(
    backend: str, noise: str, guidance: str, thresholding: bool
) -> None:
    # The reference draws by a long way of small operations, and Triton compiles each kind of step: a few methods each.
    names = METHODS if backend == "cuda" else ("ddpm-learned_range", "heun-churn", "multistep-sde-dpmsolver++-2")
    inputs = on_gpu(Inputs(1, guidance))
    for name in names:
        model = model_of(name).cuda()
        sampler = sampler_of(name, guidance, thresholding=thresholding)
        expected = run(sampler, model, inputs, backend=backend, **draws(noise))
        fresh = sampler_of(name, guidance, thresholding=thresholding)  # its table is not on the device yet
        options = draws(noise)
        with syncs_refused():
            result = run(fresh, model, inputs, backend=backend, **options)
        assert_same_bits([result.samples.cpu()], [expected.samples.cpu()])
        assert not result.samples.isnan().any()


def test_loop_returns_while_the_device_is_at_work_and_its_times_wait() -> None:
    sampler, model, inputs = sampler_of("ddim-0.0"), Model().cuda(), on_gpu(Inputs(1))
    run(sampler, model, inputs)
    torch.cuda.synchronize()
    for graph in (False, "loop", "step"):
        if graph:
            run(sampler, model, inputs, cuda_graph=graph)  # captured here
            torch.cuda.synchronize()
        torch.cuda._sleep(CYCLES)
        before = torch.cuda.Event()
        before.record()
        result = run(sampler, model, inputs, cuda_graph=graph)
        assert not before.query(), "the loop has waited for the device"
        # Reading the time waits: then the samples are there.
        assert result.processing_time > 0
        assert before.query()
        assert (result.model_time > 0) == (not graph)


# --- The captured loop -----------------------------------------------------------------------------------------------


def check(
    name: str, guidance: str, mode: str, backend: str, dtype: torch.dtype = torch.float32, **options: Any
) -> None:
    fields = options.pop("fields", {})
    sampler, model = sampler_of(name, guidance, **fields), model_of(name).cuda()
    first = on_gpu(Inputs(0, guidance, dtype))
    given = {**options, "backend": backend}
    loop = sampler.capture(
        model, first.latents, *first.conditions, guidance_scale=first.scale, mode=mode, **given
    )  # fmt: skip
    for seed in (1, 2):
        inputs = on_gpu(Inputs(seed, guidance, dtype))
        expected = run(sampler, model, inputs, **given).samples
        for _ in range(2):
            for buffer in (loop._x, loop._prepared, *loop._history):
                if buffer is not None:
                    buffer.fill_(float("nan"))
            with syncs_refused():
                samples = loop.replay(inputs.latents, *inputs.conditions, **inputs.keywords())
            assert_same_bits([samples.cpu()], [expected.cpu()])
    del loop
    gc.collect()


@pytest.mark.parametrize("name", METHODS)
def test_captured_loop_gives_the_bits_of_the_eager_loop(name: str, backend: str) -> None:
    i = list(METHODS).index(name)
    if backend != "cuda" and i % 4:
        pytest.skip("a quarter of the methods is enough for a backend that takes the same rows")
    check(name, GUIDANCE[i % 4], MODES[i // 4 % 2], backend)
    check(name, GUIDANCE[(i + 1) % 4], MODES[(i // 4 + 1) % 2], backend)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("guidance", GUIDANCE)
@pytest.mark.parametrize("name", ["ddpm-learned_range", "heun-churn"])
def test_captured_loop_thresholds_as_the_eager_loop(name: str, guidance: str, mode: str, backend: str) -> None:
    check(name, guidance, mode, backend, fields={"thresholding": True, "sample_max_value": 1.5})


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("dtype", "model_dtype"),
    [(torch.float16, None), (torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16), (torch.float64, None)],
    ids=str,
)
def test_captured_loop_converts_as_the_eager_loop(
    dtype: torch.dtype, model_dtype: torch.dtype | None, mode: str, backend: str
) -> None:
    check("multistep-sde-dpmsolver++-2", "batched", mode, backend, dtype, model_dtype=model_dtype)


@pytest.mark.parametrize("name", STOCHASTIC)
def test_kept_loop_is_captured_once_and_serves_without_waiting(name: str) -> None:
    sampler, model = sampler_of(name, "batched"), Model().cuda()
    run(sampler, model, on_gpu(Inputs(0, "batched")), cuda_graph=True)
    for seed in (1, 2, 3):
        inputs = on_gpu(Inputs(seed, "batched"))
        with syncs_refused():
            result = run(sampler, model, inputs, cuda_graph=True)
        assert len(sampler._graphs) == 1
        assert_same_bits([result.samples.cpu()], [run(sampler, model, inputs).samples.cpu()])


def test_loop_is_one_launch_and_steps_are_one_each() -> None:
    sampler, model, inputs = sampler_of("ddim-0.0"), Model().cuda(), on_gpu(Inputs(0))
    for mode, launches in (("loop", 1), ("step", len(sampler.table))):
        run(sampler, model, inputs, cuda_graph=mode)
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
            run(sampler, model, inputs, cuda_graph=mode)
            torch.cuda.synchronize()
        called = [event.name for event in profiler.events() or [] if "GraphLaunch" in event.name]
        if not called:
            pytest.skip("the profiler is not allowed to see launches here")
        assert len(called) == launches


def test_replays_on_other_streams_take_turns() -> None:
    sampler, model = sampler_of("ancestral-1.0"), Model().cuda()
    loop = sampler.capture(model, Inputs(0).latents.cuda())
    inputs = [on_gpu(Inputs(seed)) for seed in (1, 2, 3)]
    expected = [run(sampler, model, one).samples.cpu() for one in inputs]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in inputs]
    results: list[Tensor] = []
    for stream, one in zip(streams, inputs, strict=True):
        with torch.cuda.stream(stream):
            # The first sleeps longest: without turns the others would overwrite its inputs.
            torch.cuda._sleep(CYCLES // 10 if not results else 1)
            results.append(loop.replay(one.latents, seeds=one.seeds))
    torch.cuda.synchronize()
    assert_same_bits([result.cpu() for result in results], expected)


def test_table_that_one_stream_has_brought_is_there_for_another() -> None:
    sampler, model, inputs = sampler_of("ddim-0.0"), Model().cuda(), on_gpu(Inputs(1))
    expected = run(sampler_of("ddim-0.0"), model, inputs).samples.cpu()
    torch.cuda.synchronize()
    first, second = torch.cuda.Stream(), torch.cuda.Stream()
    with torch.cuda.stream(first):
        torch.cuda._sleep(CYCLES)
        run(sampler, model, inputs)
    with torch.cuda.stream(second):
        result = run(sampler, model, inputs)
    torch.cuda.synchronize()
    assert_same_bits([result.samples.cpu()], [expected])


def test_callback_between_captured_steps_is_told_what_the_eager_loop_tells() -> None:
    sampler, model, inputs = sampler_of("heun", "batched"), Model().cuda(), on_gpu(Inputs(1, "batched"))
    told: dict[str, list[StepInfo]] = {"eager": [], "step": []}
    run(sampler, model, inputs, callback=told["eager"].append)
    run(sampler, model, inputs, callback=told["step"].append, cuda_graph="step")
    for a, b in zip(told["step"], told["eager"], strict=True):
        assert (a.index, a.timestep) == (b.index, b.timestep)
        assert_same_bits([a.sample.cpu(), a.model_output.cpu()], [b.sample.cpu(), b.model_output.cpu()])


def test_model_that_waits_is_refused_and_the_device_lives_on() -> None:
    sampler, inputs = sampler_of("ddim-0.0"), on_gpu(Inputs(1))
    with pytest.raises(
        RuntimeError, match=r"(?s)sample: model cannot be captured as a CUDA graph \(.*; take host syncs"
    ):
        run(sampler, lambda x, t: x * x.max().item(), inputs, cuda_graph=True)
    assert len(sampler._graphs) == 0
    model = Model().cuda()
    expected = run(sampler, model, inputs).samples
    assert_same_bits([run(sampler, model, inputs, cuda_graph=True).samples.cpu()], [expected.cpu()])


class _Mixed(nn.Module):
    """A product under autocast, whose half weights autocast would keep until its block ends."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(SHAPE[-1], SHAPE[-1])

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return torch.tanh(self.mix(x)) * 0.5


def test_loop_captured_under_autocast_does_not_read_weights_that_autocast_has_dropped() -> None:
    sampler, model, inputs = sampler_of("ddim-0.0"), _Mixed().cuda(), on_gpu(Inputs(1))
    with torch.autocast("cuda", torch.bfloat16):
        expected = run(sampler, model, inputs).samples
        run(sampler, model, inputs, cuda_graph=True)
    junk = [torch.full((64, 64), float("nan"), device="cuda") for _ in range(64)]  # where the weights would have been
    with torch.autocast("cuda", torch.bfloat16):
        result = run(sampler, model, inputs, cuda_graph=True)
    assert len(sampler._graphs) == 1
    assert len(junk) == 64
    # The same products of the same numbers; cuBLAS may order their sums otherwise, within bfloat16's 2⁻⁸.
    torch.testing.assert_close(result.samples, expected, rtol=2**-6, atol=2**-6)


def test_captured_digits_are_those_of_the_eager_loop() -> None:
    pytest.importorskip("safetensors")
    from fastdiff.digits import IMAGE_SHAPE, NULL_CLASS, load_digit_unet

    model, sampler = load_digit_unet(device="cuda"), sampler_of("multistep-dpmsolver++-2", "batched", steps=12)
    for classes in ([3, 7], [0, 9]):
        latents, labels = torch.randn(2, *IMAGE_SHAPE, device="cuda"), torch.tensor(classes, device="cuda")
        given = model, latents, labels, torch.full_like(labels, NULL_CLASS)
        expected = sampler.sample(*given, guidance_scale=3.0, progress=False).samples
        got = sampler.sample(*given, guidance_scale=3.0, cuda_graph=True).samples
        # cuDNN and cuBLAS may choose other algorithms, and on an H200 multiply convolutions in TF32, of 2⁻¹¹ a product;
        # twelve steps with guidance 3 pass that on.
        torch.testing.assert_close(got, expected, rtol=0, atol=0.05)


def test_dropped_loops_give_their_memory_back() -> None:
    sampler, inputs, model = sampler_of("ddim-0.0"), on_gpu(Inputs(0)), Model().cuda()
    inputs.latents = torch.randn(128, *SHAPE[1:-1], 512, device="cuda")  # 2 MiB
    inputs.seeds = torch.arange(128, device="cuda")

    def held() -> int:
        gc.collect()
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()

    run(sampler, model, inputs)
    before = held()
    run(sampler, model, inputs, cuda_graph="step")
    kept = held() - before
    assert kept > 2**20
    sampler.clear_graphs()
    # torch may keep a few numbers of its own for graphs, blocks of 512 bytes.
    assert held() - before < 2**13


def test_backend_that_is_chosen_by_itself_is_captured() -> None:
    sampler, model, inputs = sampler_of("ancestral-1.0"), Model().cuda(), on_gpu(Inputs(0))
    name = ops.backend_for(inputs.latents)
    forced = run(sampler, model, inputs, backend=name).samples
    assert_same_bits([run(sampler, model, inputs, cuda_graph=True).samples.cpu()], [forced.cpu()])
