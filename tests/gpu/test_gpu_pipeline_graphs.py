# SPDX-License-Identifier: MIT
"""`patch(pipe, cuda_graph=True)` on a real GPU: the pictures of the loop without, and one launch for the model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers", reason="diffusers has its text-to-image pipelines only beside transformers")

import fastdiff  # noqa: E402
from support.pipeline_cases import CASES  # noqa: E402

pytestmark = pytest.mark.gpu

STEPS = 4
CHOSEN = (
    "DDPM", "DDIM eta 0.7", "StableDiffusion PNDM", "StableDiffusion DPM++ 2M", "StableDiffusionXL Euler-a",
    "StableDiffusion3", "Flux", "Wan",
)  # fmt: skip
#: Both ways run the same kernels; convolutions and attention may choose other algorithms on another stream.
CLOSE = {"rtol": 1e-3, "atol": 1e-3}


def make(case: str) -> tuple[Any, dict[str, Any]]:
    """Return the pipeline of a case on the GPU, and its arguments there."""
    build, scheduler, arguments = CASES[case]
    torch.manual_seed(0)
    pipe = build(scheduler()).to("cuda")
    pipe.set_progress_bar_config(disable=True)
    moved = {name: value.cuda() if isinstance(value, Tensor) else value for name, value in arguments.items()}
    return pipe, {**moved, "num_inference_steps": STEPS}


def pictures(pipe: Any, arguments: dict[str, Any], **more: Any) -> Tensor:
    output = pipe(output_type="np", generator=torch.Generator().manual_seed(0), **{**arguments, **more})
    return torch.as_tensor(output.frames if hasattr(output, "frames") else output.images)


def model_of(pipe: Any) -> Any:
    return pipe.unet if hasattr(pipe, "unet") else pipe.transformer


@pytest.mark.parametrize("case", CHOSEN)
def test_one_graph_gives_the_same_pictures(case: str) -> None:
    pipe, arguments = make(case)
    fastdiff.patch(pipe)
    expected = pictures(pipe, arguments)
    assert fastdiff.patch(pipe, cuda_graph=True).captured
    for _ in range(2):
        torch.testing.assert_close(pictures(pipe, arguments), expected, **CLOSE)
    assert len(vars(model_of(pipe))["forward"]) == 1
    fastdiff.unpatch(pipe)
    assert "forward" not in vars(model_of(pipe))


def test_each_step_launches_one_graph() -> None:
    pipe, arguments = make("StableDiffusion DPM++ 2M")
    fastdiff.patch(pipe, cuda_graph=True)
    pictures(pipe, arguments)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        pictures(pipe, arguments)
        torch.cuda.synchronize()
    launches = [event.name for event in profiler.events() or [] if "GraphLaunch" in event.name]
    if not launches:
        pytest.skip("the profiler is not allowed to see the driver's calls here")
    assert len(launches) == STEPS


def test_changes_are_seen() -> None:
    pipe, arguments = make("StableDiffusion DPM++ 2M")
    plain = make("StableDiffusion DPM++ 2M")[0]
    fastdiff.patch(plain)
    fastdiff.patch(pipe, cuda_graph=True)

    def end_guidance(pipe: Any, index: int, _t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if index == 1:
            pipe._guidance_scale = 0.0
            return {"prompt_embeds": tensors["prompt_embeds"].chunk(2)[-1], "latents": tensors["latents"] * 1.5}
        return {}

    inputs = ["prompt_embeds", "latents"]
    callback = {"callback_on_step_end": end_guidance, "callback_on_step_end_tensor_inputs": inputs}
    first = pictures(pipe, arguments)
    for more in ({"guidance_scale": 2.0}, callback, {"num_images_per_prompt": 2}, {}):
        torch.testing.assert_close(pictures(pipe, arguments, **more), pictures(plain, arguments, **more), **CLOSE)
    with torch.no_grad():
        for each in (pipe, plain):
            each.unet.conv_out.weight.mul_(0.25)
    assert not torch.equal(pictures(pipe, arguments), first)
    torch.testing.assert_close(pictures(pipe, arguments), pictures(plain, arguments), **CLOSE)
    for each in (pipe, plain):
        each.to("cpu").to("cuda")
    torch.testing.assert_close(pictures(pipe, arguments), pictures(plain, arguments), **CLOSE)


def test_model_that_waits_is_refused() -> None:
    class Waiting(torch.nn.Module):
        def forward(self, sample: Tensor) -> Tensor:
            return sample * float(sample.mean())

    from fastdiff.graphs import CapturedForward

    model = Waiting()
    with torch.no_grad(), pytest.raises(RuntimeError, match="Waiting cannot be captured as a CUDA graph"):
        CapturedForward(model)(torch.ones(4, device="cuda"))
    assert torch.ones(4, device="cuda").sum().item() == 4.0  # the device is as before
