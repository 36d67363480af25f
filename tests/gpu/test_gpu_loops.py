# SPDX-License-Identifier: MIT
"""Loops on a real GPU: one kernel a step, no wait for the device, and the bits of the CPU at the end."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import fastdiff
from fastdiff import ops
from fastdiff.ops import backends
from support.on_gpu import BACKENDS, kernels_of, skip_where_missing
from support.oracle import assert_same_bits

pytestmark = [pytest.mark.gpu, pytest.mark.answers]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """Each backend that a GPU may have here."""
    name: str = request.param
    skip_where_missing(name)
    return name


@pytest.fixture
def syncs_refused() -> Iterator[None]:
    """Put torch's mode back, whatever a test has set."""
    before = torch.cuda.get_sync_debug_mode()
    yield
    torch.cuda.set_sync_debug_mode(before)


def _sampler(method: str, steps: int) -> fastdiff.BaseSampler:
    return fastdiff.create_sampler("linear", method, num_inference_steps=steps)


@pytest.mark.parametrize("method", ["ddim", "dpm_solver"])
def test_step_on_gpu_is_one_kernel(backend: str, method: str) -> None:
    steps = 6
    sample, output, uncond = torch.randn(3, 2, 4, 32, 32, device="cuda").unbind()
    # What the device chooses by itself is taken as users take it, not forced.
    stepper = _sampler(method, steps).stepper(None if ops.backend_for(sample) == backend else backend)

    def step() -> None:
        stepper.step(sample, output, uncond=uncond, guidance_scale=3.0, out=sample)

    # The first steps bring the table to the device, and compile.
    for _ in range(3):
        step()

    def rest() -> None:
        for _ in range(3, steps):
            step()

    on_device = kernels_of(rest)
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
