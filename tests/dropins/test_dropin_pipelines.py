# SPDX-License-Identifier: MIT
"""Real pipelines with small random weights: equal pictures with the original and the patched scheduler."""

import numpy as np
import pytest
import torch

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers", reason="diffusers has its text-to-image pipelines only beside transformers")

import fastdiff  # noqa: E402
from fastdiff.diffusers import FusedScheduler  # noqa: E402
from fastdiff.diffusers.guiders import GUIDERS  # noqa: E402
from support.pipeline_cases import CASES, pooled, stable_diffusion_xl  # noqa: E402

STEPS = 10


@pytest.fixture(autouse=True)
def _one_thread():
    """Use one thread: small models gain nothing by more, and lose time waiting for a core."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def call(pipe, arguments):
    """Return a pipeline's pictures or frames as an array."""
    arguments = {"num_inference_steps": STEPS, "generator": torch.Generator().manual_seed(0), **arguments}
    output = pipe(output_type="np", **arguments)
    return np.asarray(output.frames if hasattr(output, "frames") else output.images)


@pytest.mark.parametrize("case", CASES)
def test_patched_pipeline_gives_same_pictures(case):
    make, scheduler, arguments = CASES[case]
    torch.manual_seed(0)
    pipe = make(scheduler())
    pipe.set_progress_bar_config(disable=True)
    expected = call(pipe, arguments)
    fastdiff.patch(pipe)
    assert isinstance(pipe.scheduler, FusedScheduler)
    for _ in range(2):  # the first loop compiles the plans, the second runs them from the first step on
        pictures = call(pipe, arguments)
        assert float(np.abs(pictures - expected).max()) <= 1.0 / 255.0
    fastdiff.unpatch(pipe)
    assert np.array_equal(call(pipe, arguments), expected)

    assert pictures.shape == expected.shape
    assert np.isfinite(expected).all()
    assert expected.std() > 1e-3  # a picture, and not one colour


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("ClassifierFreeGuidance", {"guidance_rescale": 0.7, "stop": 0.8}),
        ("ClassifierFreeZeroStarGuidance", {}),
        ("AdaptiveProjectedGuidance", {"adaptive_projected_guidance_momentum": -0.5, "eta": 0.5}),
        ("AdaptiveProjectedMixGuidance", {"adaptive_projected_guidance_start_step": 2}),
        ("TangentialClassifierFreeGuidance", {}),
    ],
)
def test_patched_modular_pipeline_gives_same_pictures(name, options):
    if name not in GUIDERS:
        pytest.skip(f"this diffusers has no {name} that returns a GuiderOutput")
    from diffusers.modular_pipelines.stable_diffusion_xl import StableDiffusionXLAutoBlocks

    torch.manual_seed(0)
    parts = stable_diffusion_xl(diffusers.EulerDiscreteScheduler())
    blocks = StableDiffusionXLAutoBlocks()
    blocks.sub_blocks.pop("text_encoder")
    pipe = blocks.init_pipeline()
    guider = GUIDERS[name].original(guidance_scale=5.0, **options)
    pipe.update_components(unet=parts.unet, vae=parts.vae, scheduler=parts.scheduler, guider=guider)
    arguments = pooled(32, 64) | {"num_inference_steps": STEPS, "output": "images", "output_type": "np"}
    del arguments["guidance_scale"]

    def pictures():
        return np.asarray(pipe(**arguments, generator=torch.Generator().manual_seed(0)))

    expected = pictures()
    assert {part.where for part in fastdiff.patch(pipe).replaced} == {"guider", "scheduler"}
    assert pipe.guider is guider
    patched = pictures()
    fastdiff.unpatch(pipe)
    assert np.array_equal(pictures(), expected)
    assert expected.std() > 1e-3
    assert float(np.abs(patched - expected).max()) <= 1.0 / 255.0
