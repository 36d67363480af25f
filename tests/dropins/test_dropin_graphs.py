# SPDX-License-Identifier: MIT
"""`patch(pipe, cuda_graph=True)` on the emulation of CUDA graphs: one graph a loop, and the same pictures."""

from __future__ import annotations

import copy
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers", reason="diffusers has its text-to-image pipelines only beside transformers")

import fastdiff.diffusers  # noqa: E402
from fastdiff.graphs import CapturedForward, recorder  # noqa: E402
from support.graph_emulator import EmulatedGraph  # noqa: E402
from support.pipeline_cases import CASES, stable_diffusion, unconditional, unet, vae  # noqa: E402

STEPS = 4


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[EmulatedGraph]:
    """Enable emulated capture on the CPU; return the list of graphs."""
    monkeypatch.setitem(recorder.RECORDERS, "cpu", EmulatedGraph)
    monkeypatch.setattr(EmulatedGraph, "made", [])
    return EmulatedGraph.made


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make(case: str) -> tuple[Any, dict[str, Any]]:
    """Return the pipeline of a case and its arguments."""
    build, scheduler, arguments = CASES[case]
    torch.manual_seed(0)
    pipe = build(scheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe, {"num_inference_steps": STEPS, **arguments}


def pictures(pipe: Any, arguments: dict[str, Any], **more: Any) -> np.ndarray:
    output = pipe(output_type="np", generator=torch.Generator().manual_seed(0), **{**arguments, **more})
    return np.asarray(output.frames if hasattr(output, "frames") else output.images)


def pair(case: str = "StableDiffusion DPM++ 2M") -> tuple[Any, Any, dict[str, Any]]:
    """Return a patched pipeline without graphs, one with a graph of the same weights, and the arguments."""
    pipe, arguments = make(case)
    other = make(case)[0]
    fastdiff.patch(pipe)
    fastdiff.patch(other, cuda_graph=True)
    return pipe, other, arguments


def same(plain: Any, graphed: Any, arguments: dict[str, Any], **more: Any) -> np.ndarray:
    """Compare the pictures of both pipelines, bit for bit."""
    expected = pictures(plain, arguments, **more)
    assert np.isfinite(expected).all()
    assert np.array_equal(pictures(graphed, arguments, **more), expected)
    return expected


# --- One graph a loop ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_one_graph_serves_all_steps(graphs: list[EmulatedGraph], case: str) -> None:
    plain, graphed, arguments = pair(case)
    for _ in range(2):
        assert same(plain, graphed, arguments).std() > 1e-3
    assert len(graphs) == 1
    calls = graphs[0].replays
    assert calls % 2 == 0
    assert calls // 2 >= 3  # an image to image pipeline leaves out the first step


_WITHOUT_LAUNCH = "aten::detach", "aten::_unsafe_view", "aten::empty", "aten::empty_like"


class _Launches(TorchDispatchMode):
    """Counts operators that launch something on a GPU, and the replays of a graph as one each."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view and func.name().split(".")[0] not in _WITHOUT_LAUNCH
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("case", "launches"),
    [
        # A copy in for the latents and the timestep, the replay, a copy out, the step.
        ("DDIM", 2 + 1 + 1 + 1),
        # Before it doubling the latents and their scale; three copies more for conditions; three for the guidance.
        ("StableDiffusionXL Euler", 1 + 1 + 5 + 1 + 1 + 3 + 1),
    ],
)
def test_launches_a_step(
    graphs: list[EmulatedGraph], case: str, launches: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    replay = EmulatedGraph.replay

    def counted(graph: EmulatedGraph) -> None:
        with _disable_current_modes():
            replay(graph)
        counter.count += 1

    monkeypatch.setattr(EmulatedGraph, "replay", counted)
    pipe, arguments = make(case)
    fastdiff.patch(pipe, cuda_graph=True)
    found = []
    for steps in (6, 10, 6, 10):  # the first loops make plans
        counter = _Launches()
        with counter:
            pictures(pipe, arguments, num_inference_steps=steps)
        found.append(counter.count)
    assert found[3] - found[2] == 4 * launches


def test_dit_with_a_schedule_on_the_cpu(graphs: list[EmulatedGraph]) -> None:
    def build() -> Any:
        torch.manual_seed(0)
        transformer = diffusers.DiTTransformer2DModel(
            num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=1, sample_size=8,
            patch_size=2, num_embeds_ada_norm=1000,
        )  # fmt: skip
        pipe = diffusers.DiTPipeline(transformer=transformer.eval(), vae=vae(), scheduler=diffusers.DDIMScheduler())
        pipe.set_progress_bar_config(disable=True)
        return pipe

    plain, graphed = build(), build()
    fastdiff.patch(plain)
    fastdiff.patch(graphed, cuda_graph=True)
    for scale in (4.0, 1.5):
        same(plain, graphed, {"class_labels": [1, 3], "guidance_scale": scale, "num_inference_steps": STEPS})
    assert len(graphs) == 1


def test_guidance_scale_and_prompts_are_read_anew(graphs: list[EmulatedGraph]) -> None:
    plain, graphed, arguments = pair()
    first = same(plain, graphed, arguments)
    other = same(plain, graphed, arguments, guidance_scale=2.0)
    assert not np.array_equal(first, other)
    prompt = torch.randn(1, 7, 32, generator=torch.Generator().manual_seed(8))
    assert not np.array_equal(same(plain, graphed, arguments, prompt_embeds=prompt), first)
    assert len(graphs) == 1


def test_another_number_of_steps_keeps_the_graph_and_another_batch_gets_one(graphs: list[EmulatedGraph]) -> None:
    plain, graphed, arguments = pair()
    same(plain, graphed, arguments)
    same(plain, graphed, arguments, num_inference_steps=6)
    assert len(graphs) == 1
    same(plain, graphed, arguments, num_images_per_prompt=2)
    assert len(graphs) == 2
    same(plain, graphed, arguments)
    assert len(graphs) == 2


def test_callback_may_change_latents(graphs: list[EmulatedGraph]) -> None:
    plain, graphed, arguments = pair()

    def double(_pipe: Any, index: int, _t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        return {"latents": tensors["latents"] * 1.5} if index == 1 else tensors

    def in_place(_pipe: Any, index: int, _t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        tensors["latents"].mul_(1.5 if index == 1 else 1.0)
        return {}

    without = same(plain, graphed, arguments)
    for callback in (double, in_place):
        assert not np.array_equal(same(plain, graphed, arguments, callback_on_step_end=callback), without)
    assert len(graphs) == 1


def test_callback_may_end_guidance(graphs: list[EmulatedGraph]) -> None:
    plain, graphed, arguments = pair()

    def stop(pipe: Any, index: int, _t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if index == 1:
            pipe._guidance_scale = 0.0
            return {"prompt_embeds": tensors["prompt_embeds"].chunk(2)[-1]}
        return {}

    options = {"callback_on_step_end": stop, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    for _ in range(2):
        same(plain, graphed, arguments, **options)
    assert len(graphs) == 2  # with the doubled batch, and without


def test_weights_changed_in_place_are_seen(graphs: list[EmulatedGraph]) -> None:
    plain, graphed, arguments = pair()
    first = same(plain, graphed, arguments)
    with torch.no_grad():
        for pipe in (plain, graphed):
            pipe.unet.conv_out.weight.mul_(0.5)
    assert not np.array_equal(same(plain, graphed, arguments), first)
    assert len(graphs) == 1


def test_moved_pipeline_gets_another_graph(graphs: list[EmulatedGraph]) -> None:
    plain, graphed, arguments = pair()
    same(plain, graphed, arguments)
    for pipe in (plain, graphed):
        pipe.to(torch.float64)
    wide = {key: value.double() if isinstance(value, torch.Tensor) else value for key, value in arguments.items()}
    same(plain, graphed, wide)
    assert len(graphs) == 2
    assert len(vars(graphed.unet)["forward"]) == 1


def test_lora_and_its_scale_are_seen(graphs: list[EmulatedGraph]) -> None:
    peft = pytest.importorskip("peft", reason="adapters of diffusers' models are peft's")
    plain, graphed, arguments = pair()
    first = same(plain, graphed, arguments)
    for pipe in (plain, graphed):
        torch.manual_seed(1)
        config = peft.LoraConfig(r=2, target_modules=["to_q", "to_k"], init_lora_weights=False)
        pipe.unet.add_adapter(config, "own")
    with_adapter = same(plain, graphed, arguments)
    assert not np.array_equal(with_adapter, first)
    for pipe in (plain, graphed):
        pipe.unet.set_adapters("own", 0.25)
    assert not np.array_equal(same(plain, graphed, arguments), with_adapter)
    for pipe in (plain, graphed):
        pipe.unet.disable_adapters()
    assert np.array_equal(same(plain, graphed, arguments), first)


# --- Patching and back -----------------------------------------------------------------------------------------------


def test_unpatch_undoes_it(graphs: list[EmulatedGraph]) -> None:
    pipe, arguments = make("DDPM")
    before = set(vars(pipe.unet))
    expected = pictures(pipe, arguments)
    report = fastdiff.patch(pipe, cuda_graph=True)
    assert [(part.where, part.name) for part in report.captured] == [("unet", "UNet2DModel")]
    assert "patch: captured unet: UNet2DModel" in str(report)
    pictures(pipe, arguments)
    back = fastdiff.unpatch([pipe])
    assert [part.where for part in back.captured] == ["0.unet"]
    assert "unpatch: released 0.unet: UNet2DModel" in str(back)
    assert set(vars(pipe.unet)) == before
    assert type(pipe.scheduler) is diffusers.DDPMScheduler
    replays = graphs[0].replays
    assert np.array_equal(pictures(pipe, arguments), expected)
    assert graphs[0].replays == replays
    assert not fastdiff.unpatch(pipe).captured


def test_patching_twice_keeps_the_graph(graphs: list[EmulatedGraph]) -> None:
    pipe, arguments = make("DDPM")
    fastdiff.patch(pipe)
    assert fastdiff.patch(pipe, cuda_graph=True).captured
    pictures(pipe, arguments)
    again = fastdiff.patch(pipe, cuda_graph=True)
    assert not again.captured
    assert [(part.where, part.reason) for part in again.left if part.where == "unet"] == [("unet", "captured already")]
    fastdiff.patch(pipe)
    pictures(pipe, arguments)
    assert len(graphs) == 1


def test_captured_pipeline_is_saved_and_copied_like_any(graphs: list[EmulatedGraph], tmp_path: Any) -> None:
    plain, graphed, arguments = pair("DDPM")
    expected = same(plain, graphed, arguments)
    graphed.save_pretrained(tmp_path)
    loaded = diffusers.DDPMPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert "forward" not in vars(loaded.unet)
    fastdiff.patch(loaded)
    assert np.array_equal(pictures(loaded, arguments), expected)
    other = copy.deepcopy(graphed.unet)
    assert isinstance(vars(other)["forward"], CapturedForward)
    assert vars(other)["forward"]._module is other


def _controlnet() -> Any:
    control = diffusers.ControlNetModel.from_unet(unet(), conditioning_embedding_out_channels=(4, 8))
    return diffusers.StableDiffusionControlNetPipeline(
        vae=vae(), text_encoder=None, tokenizer=None, unet=unet(), controlnet=control, safety_checker=None,
        scheduler=diffusers.DDIMScheduler(), feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def _user_scheduler() -> Any:
    class Mine(diffusers.DDPMScheduler):
        pass

    return unconditional(diffusers.DDPMPipeline)(Mine())


def _with(change: Any) -> Any:
    pipe = stable_diffusion(diffusers.StableDiffusionPipeline)(diffusers.DDIMScheduler())
    change(pipe.unet)
    return pipe


def _other_forward(model: Any) -> None:
    model.conv_in.forward = lambda x: x


def _compiled(model: Any) -> None:
    model._compiled_call_impl = lambda *args: None


def _hooked(model: Any) -> None:
    model.mid_block._hf_hook = object()


REFUSED = {
    "two models a step": (_controlnet, ValueError, "has controlnet beside unet, so that a step is more"),
    "user's scheduler": (
        _user_scheduler,
        ValueError,
        "a scheduler that is not fused .a class of its own over DDPM",
    ),
    "compiled": (lambda: _with(_compiled), ValueError, "has a unet that is compiled as a whole"),
    "offloaded": (lambda: _with(_hooked), ValueError, "has a unet that has a hook of accelerate in mid_block"),
    "other forward": (lambda: _with(_other_forward), ValueError, "another forward than its class in conv_in"),
    "no pipeline": (diffusers.DDIMScheduler, TypeError, "is a DDIMScheduler that is none of diffusers' pipelines"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_other_pipelines_are_refused_and_unchanged(graphs: list[EmulatedGraph], case: str) -> None:
    build, error, message = REFUSED[case]
    pipe = build()
    scheduler = getattr(pipe, "scheduler", pipe)
    kind, state = type(scheduler), dict(vars(scheduler))
    before = {name: dict(vars(part)) for name, part in vars(pipe).items() if isinstance(part, torch.nn.Module)}
    with pytest.raises(error, match=message) as caught:
        fastdiff.patch(pipe, cuda_graph=True)
    assert str(caught.value).startswith("patch: pipe is a ")
    assert "without cuda_graph" in str(caught.value) or "sampler" in str(caught.value)
    assert type(scheduler) is kind
    assert vars(scheduler) == state
    for name, attributes in before.items():
        assert vars(getattr(pipe, name)).keys() == attributes.keys()


def test_pipeline_on_the_cpu_is_refused() -> None:
    pipe, _ = make("DDPM")
    with pytest.raises(ValueError, match="has its unet on cpu, and CUDA graphs are for CUDA devices"):
        fastdiff.patch(pipe, cuda_graph=True)
    assert type(pipe.scheduler) is diffusers.DDPMScheduler
    assert "forward" not in vars(pipe.unet)


# --- The example -----------------------------------------------------------------------------------------------------


def test_captured_ways_of_the_example_agree(graphs: list[EmulatedGraph]) -> None:
    example = runpy.run_path(str(Path(__file__).parents[2] / "examples" / "compiled_loop.py"))
    latents = torch.randn(example["SHAPE"], generator=torch.Generator().manual_seed(1))
    model = example["small_unet"]("cpu")
    with torch.no_grad():
        scheduler = fastdiff.diffusers.DDIMScheduler(**example["SCHEDULE"])
        expected = example["whole_loop"](model, scheduler, latents, STEPS)()
        of_model = example["graph_of_model"](latents, STEPS)
        for _ in range(2):
            assert torch.equal(of_model(), expected)
        assert [graph.replays for graph in graphs] == [2 * STEPS]
        own = example["sampler_graph"](model, latents, STEPS)()
    assert graphs[1].replays == 1
    # Two ways to the same coefficients, in float64 and rounded once.
    torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-4)
