# SPDX-License-Identifier: MIT
"""Real pipelines with small random weights: equal pictures with the original and the patched scheduler.

With `-s` the time of each call is printed, and the share of the scheduler's steps.  The models are tiny, so that share
is far larger than for a real model.
"""

import functools
import time

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


class Stopwatch:
    """Count of a scheduler's steps in a call of a pipeline, their time and that of the whole call."""

    def __init__(self, pipe, monkeypatch):
        self.steps, self.seconds, self.whole = 0, 0.0, 0.0
        kind = type(pipe.scheduler)
        step = kind.step

        @functools.wraps(step)  # pipelines look at its arguments
        def timed(*args, **kwargs):
            start = time.perf_counter()
            result = step(*args, **kwargs)
            self.seconds += time.perf_counter() - start
            self.steps += 1
            return result

        monkeypatch.setattr(kind, "step", timed)

    def __str__(self):
        each, share = self.seconds / self.steps, self.seconds / self.whole
        return f"whole call {self.whole * 1e3:6.1f} ms, the steps {share:5.1%} of it, {each * 1e6:5.0f} us each"


@pytest.fixture(autouse=True)
def _one_thread():
    """Use one thread: small models gain nothing by more, and lose time waiting for a core."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def call(pipe, arguments):
    """Return a pipeline's pictures or frames as an array, and the seconds it took."""
    arguments = {"num_inference_steps": STEPS, "generator": torch.Generator().manual_seed(0), **arguments}
    start = time.perf_counter()
    output = pipe(output_type="np", **arguments)
    seconds = time.perf_counter() - start
    return np.asarray(output.frames if hasattr(output, "frames") else output.images), seconds


def timed_calls(pipe, arguments, monkeypatch):
    """Return a pipeline's pictures, and the fastest of three calls after a warm-up."""
    pictures, _ = call(pipe, arguments)
    watches = []
    for _ in range(3):
        with monkeypatch.context() as patched:
            watches.append(Stopwatch(pipe, patched))
            again, watches[-1].whole = call(pipe, arguments)
        assert np.array_equal(again, pictures)
    return pictures, min(watches, key=lambda watch: watch.whole)


@pytest.mark.parametrize("case", CASES)
def test_patched_pipeline_gives_same_pictures(case, monkeypatch):
    make, scheduler, arguments = CASES[case]
    torch.manual_seed(0)
    pipe = make(scheduler())
    pipe.set_progress_bar_config(disable=True)
    expected, plain = timed_calls(pipe, arguments, monkeypatch)
    fastdiff.patch(pipe)
    assert isinstance(pipe.scheduler, FusedScheduler)
    pictures, fused = timed_calls(pipe, arguments, monkeypatch)
    fastdiff.unpatch(pipe)
    again, _ = call(pipe, arguments)
    assert np.array_equal(again, expected)

    assert pictures.shape == expected.shape
    assert plain.steps == fused.steps > 0
    assert np.isfinite(expected).all()
    assert expected.std() > 1e-3  # a picture, and not one colour
    assert float(np.abs(pictures - expected).max()) <= 1.0 / 255.0
    print(f"\n{case}: {fused.steps} steps\n  diffusers: {plain}\n  patched:   {fused}")


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
